"""The layer choice of an analysis as text: every criterion beside the recommendation, never a number alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {
    "boundary": "boundary (the paper's rule)",
    "knee": "knee of agreement",
}


def print_choice(console: Console, result: dict[str, Any]) -> None:
    """Print the evidence over layers, every criterion's layer, and the recommendation."""
    block = result["layer_choice"]
    console.print(_evidence(block, result["layers"]))
    console.print(_criteria(block))
    best = block["recommendation"]
    console.print(f"recommended layer: {name(best['layer'])}. {best['reason']}.")


def name(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _evidence(block: dict[str, Any], layers: int) -> Any:
    from rich.table import Table

    curves, errors = block["curves"], block["standard_errors"]["norm"]["recovered"]
    table = Table(
        title=f"layers against the final policy: {block['tokens']} random tokens of {block['responses']} responses",
        caption="agree: 0 is no better than uniform, 100 is the final policy; ±: its standard error; KL, H in nats",
    )
    for head in ("layer", "agree %", "±", "top-1 %", "KL raw", "KL norm", "H raw", "H norm"):
        table.add_column(head, justify="right")
    for i in range(layers):
        mark = "> " if block["recommendation"]["layer"] == i + 1 else ""
        raw, norm = ({kind: values[i] for kind, values in curves[lens].items()} for lens in ("raw", "norm"))
        table.add_row(
            f"{mark}{i + 1}",
            f"{100 * norm['recovered']:.1f}",
            "" if errors[i] is None else f"{100 * errors[i]:.1f}",
            f"{100 * norm['top1']:.0f}",
            *(_short(value) for value in (raw["kl"], norm["kl"], raw["entropy"], norm["entropy"])),
        )
    return table


def _criteria(block: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="criteria")
    for head in ("criterion", "layer", "±"):
        table.add_column(head, justify="left" if head == "criterion" else "right")
    for answer in block["criteria"]:
        error = answer.get("standard_error")
        table.add_row(SHORT[answer["name"]], name(answer["layer"]), "" if error is None else f"{error:.1f}")
    return table
