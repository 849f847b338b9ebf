"""Builds the Triton kernel for GPUs that need not be present, and reports registers, spills and instructions.

Run ``python -m benchmarks.kernel_build [--output FILE.json]``; it needs triton only, which includes the assembler. That
a kernel builds does not show that it runs; its results are tested in interpreter mode (`tests/lens/test_kernel.py`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bupo import run_folder as rundir
from bupo.lens import triton_kernel as kernel_triton

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
TARGETS = {80: "A100", 90: "H100"}
# sizes of real models are multiples of 16; at the first call, the compiler would find this out itself
DIVISIBLE = ("before", "states", "weight", "biases", "maxima", "sums", "weighted", "width", "part", "vocabulary")


def build(dtype: str, layers: int, capability: int) -> dict[str, Any]:
    """Compile one variant for one compute capability; returns registers and spilled bytes per thread, and counts."""
    function = kernel_triton._read
    constants = {
        "LAYERS": layers,
        "SOFTCAP": False,
        "BIAS": False,
        "PRECISE": dtype == "float32",
        "UPCAST": False,
        "ROWS": 64,
        "TILE": 128,
        "WIDTH_TILE": 32,
    }
    pointer = TYPES[dtype]
    signature = {
        **dict.fromkeys(("before", "states", "weight"), pointer),
        **dict.fromkeys(("biases", "maxima", "sums", "weighted"), "*fp32"),
        **dict.fromkeys(("tokens", "vocabulary", "width", "part"), "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(function.arg_names) if name in DIVISIBLE
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel_triton.WARPS, "num_stages": 3}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        "dtype": dtype,
        "layers": layers,
        "target": TARGETS[capability],
        "warps": kernel_triton.WARPS,
        "registers": found["REG"],
        "spilled_bytes": found["STACK"],
        "shared_bytes": made.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"wgmma\.mma|mma\.sync", made.asm["ptx"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes.split(","):
        for capability in TARGETS:
            rows.append(build(dtype, options.layers, capability))
            print(rows[-1], flush=True)
    if options.output:
        rundir.write_json(options.output, {"triton": triton.__version__, "builds": rows})


if __name__ == "__main__":
    main()
