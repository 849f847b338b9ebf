"""Checks all families of the zoo; writes ``docs/architectures.md`` and ``experiments/results/architectures.json``.

    python -m experiments.verify_architectures [NAME ...] [--no-write]

Builds a tiny random model of each family (four layers, width 32, no download), and compares its internal policies with
an independent reference: the model's own code after the final norm, applied to states that hooks recorded in an
ordinary forward. Exits with code 1 if a family does not behave as the tests expect. About a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from bupo import analyze_rollouts, internal_policy
from bupo.data.rollouts import Rollout
from bupo.errors import InputError
from bupo.models.layout import find_layout
from bupo.models.residual import find_residual_writes
from bupo.run_folder import write_json, write_text
from tests.support.tiny import tokens
from tests.support.zoo import BY_NAME, ZOO, zoo_model
from tests.support.zoo_checks import decodes_alike, read_all

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python -m experiments.verify_architectures"
PAGE = """# Architectures

This page is written by `{command}` ({transformers}, {torch}); do not edit it. It lists {count} layouts of {families}
families, each built as a tiny random model in float32 and checked: **{whole} are supported fully** (states of layers,
attention and FFN), {layer_only} for layers only, {unreadable} not at all.

A and F are *what a layer adds to the residual stream*, after post-norms and multipliers. Submodule names are not
trusted: on a short probe batch, bupo records the output of every submodule and solves `H^l - H^(l-1) = a A + b F` in
float64. *Identity* is the largest deviation over all layers, relative to the size of the terms, element by element
(float32 rounds at 6e-8; up to 1e-5 is allowed, 2e-2 in bfloat16). *Policies* is the largest relative deviation of an
internal policy's logits, over all layers and components, from the model's own head applied to states that hooks
recorded in an ordinary forward. *Decoding* tells whether `generate()` with a cache, inside the context, equals decoding
without a cache. Logit scale, soft-capping and a bias of the unembedding are applied as the model itself applies them,
checked against its logits.

Layers with a single contribution (Mamba, Nemotron-H) have no A and F: component `layer` works, but `attn`, `ffn` and
`bupo analyze` are refused. The same holds for post-norm layers that change the stream itself (MiniMax, RWKV's first).

| layout | class | A | F | identity | policies | logits | decoding | status |
|---|---|---|---|---|---|---|---|---|
{rows}

## Around the decoder

Tested in `tests/models/test_wrapped_models.py`:

- **Multimodal models** (`AutoModelForImageTextToText`: Gemma-3, LLaVA, Mistral-3, PaliGemma, Qwen2-VL): the language
  decoder is read on text. Llama-3.2-Vision is refused, because text alone skips its cross-attention layers.
- **Quantised weights** (bitsandbytes 4 and 8 bit, dynamic int8, GGUF left packed): supported as long as the
  unembedding is not packed; `bupo` refuses a packed one, because its numbers cannot be read.
- **`device_map`**: accelerate's hooks stay active, also with layers offloaded to disk; an offloaded unembedding is
  refused.
"""


def check(name: str) -> dict[str, Any]:
    """Check one family; ``as_expected`` tells whether the result is what the tests expect."""
    entry = BY_NAME[name]
    model, ids = zoo_model(name), tokens(2, 7)
    row: dict[str, Any] = {"name": name, "family": entry.family, "class": type(model).__name__, "note": entry.note}
    components: tuple[str, ...] = ("layer", "attn", "ffn")
    try:
        writes = find_residual_writes(model)
        row["attn"] = sorted({str(w.attn) for w in writes})
        row["ffn"] = sorted({str(w.ffn) for w in writes})
        row["identity"] = max(w.deviation for w in writes)
        result = analyze_rollouts(model, [Rollout([5, 6, 7], [8, 9, 10, 11])])
        row["logit_scale"], row["softcap"] = result["readout"]["logit_scale"], result["readout"]["softcap"]
        row["bias"] = getattr(find_layout(model).unembedding, "bias", None) is not None
    except InputError as error:
        row["refused"], components = str(error), ("layer",)
    try:
        if entry.unreadable:
            with internal_policy(model, 2):
                model(input_ids=ids, use_cache=False)
            raise AssertionError("this family should be refused")
        row["reading"], row["wrong_layers"] = read_all(model, ids, components)
        row["decoding"] = None
        if entry.generates:
            same = []
            for layer in (1, 2, 3):
                with internal_policy(model, layer):
                    same.append(decodes_alike(model, ids[:, :5], 4))
            row["decoding"] = all(same)
    except InputError as error:
        row["unreadable"] = str(error)
    row["as_expected"] = (
        ("unreadable" in row) == entry.unreadable
        and ("refused" in row) == (entry.refused is not None)
        and row.get("reading", 0.0) < 1e-5
        and not row.get("wrong_layers")
        and row.get("decoding") is not False
    )
    return row


def table_row(row: dict[str, Any]) -> str:
    def code(names: list[str] | None) -> str:
        return "<br>".join(f"`{n}`" for n in names) if names else "–"

    def number(key: str) -> str:
        return f"{row[key]:.0e}" if row.get(key) else ("0" if row.get(key) == 0 else "–")

    logits = []
    if row.get("logit_scale", 1.0) != 1.0:
        logits.append(f"× {row['logit_scale']:g}")
    if row.get("softcap"):
        logits.append(f"soft-cap {row['softcap']:g}")
    if row.get("bias"):
        logits.append("bias")
    decoding = {True: "yes", None: "–", False: "**no**"}[row.get("decoding")]
    reason = row.get("refused", "").split(";")[0].split(": it has")[0]
    status = "full" if not reason else (f"refused: {reason}" if "unreadable" in row else f"layer only: {reason}")
    if not row["as_expected"]:
        status = f"**unexpected** {status}"
    name = row["name"] + (f" ({row['note']})" if row["note"] else "")
    cells = [name, f"`{row['class']}`", code(row.get("attn")), code(row.get("ffn")), number("identity")]
    cells += [number("reading"), ", ".join(logits) or "–", decoding, status.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="layouts to check (default: all)")
    parser.add_argument("--no-write", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for name in arguments.names or [entry.name for entry in ZOO]:
        rows.append(check(name))
        print(table_row(rows[-1]), flush=True)
    whole = [r for r in rows if "refused" not in r]
    if not arguments.no_write and not arguments.names:
        page = PAGE.format(
            command=COMMAND,
            transformers=f"transformers {transformers.__version__}",
            torch=f"torch {torch.__version__}",
            count=len(rows),
            families=len({r["family"] for r in rows}),
            whole=f"{len(whole)} layouts of {len({r['family'] for r in whole})} families",
            layer_only=sum("refused" in r and "unreadable" not in r for r in rows),
            unreadable=sum("unreadable" in r for r in rows),
            rows="\n".join(table_row(row) for row in rows),
        )
        write_text(ROOT / "docs" / "architectures.md", page)
        versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
        write_json(
            ROOT / "experiments" / "results" / "architectures.json",
            {"schema": 1, "command": COMMAND, "versions": versions, "layouts": rows},
        )
    wrong = [row["name"] for row in rows if not row["as_expected"]]
    print(f"{len(rows)} layouts, {len(whole)} full, unexpected: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
