"""The layer choice of an analysis as text: every criterion beside the recommendation, never a number alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {
    "boundary": "boundary (the paper's rule)",
    "norm_entropy": "same rule, normed entropies",
    "fitted_entropy": "same rule, fitted entropies",
    "knee": "knee of agreement",
}


def print_choice(console: Console, result: dict[str, Any]) -> None:
    """Print the evidence over layers, every criterion's answer with its bootstrap shares, and the recommendation."""
    block = result["layer_choice"]
    console.print(_evidence(block, result["layers"]))
    console.print(_criteria(block))
    best = block["recommendation"]
    console.print(f"recommended layer: {name(best['layer'])} ({certainty(best)}). {best['reason']}.")


def name(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def certainty(answer: dict[str, Any]) -> str:
    """``83 % of bootstrap draws; 7: 12 %, none: 5 %``."""
    others = [f"{other}: {_percent(share)}" for other, share in list(answer["other"].items())[:4]]
    return "; ".join([f"{_percent(answer['share'])} of bootstrap draws", *([", ".join(others)] if others else [])])


def _percent(share: float) -> str:
    if 0 < share < 0.005 or 0.995 <= share < 1:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _evidence(block: dict[str, Any], layers: int) -> Any:
    from rich.table import Table

    curves, errors = block["curves"], block["standard_errors"]
    table = Table(
        title=f"layers against the final policy: {block['tokens']} random tokens of {block['responses']} responses",
        caption="agree: 0 is no better than uniform, 100 is the final policy; ±: its standard error; KL, H in nats",
    )
    for head in ("layer", "agree %", "±", "top-1 %", "KL raw", "KL norm", "H norm", "H fit", "T fit"):
        table.add_column(head, justify="right")
    at = {
        "recovered": curves["norm_fitted"]["recovered"],
        "error": errors["norm_fitted"]["recovered"],
        "top1": curves["norm"]["top1"],
        "kl": curves["raw"]["kl"],
        "kl_norm": curves["norm"]["kl"],
        "norm": curves["norm"]["entropy"],
        "fitted": curves["fitted"]["entropy"],
        "temperature": curves["fitted"]["temperature"],
    }
    for i in range(layers):
        row = {key: values[i] for key, values in at.items()}
        temperature = row["temperature"]
        mark = "> " if block["recommendation"]["layer"] == i + 1 else ""
        table.add_row(
            f"{mark}{i + 1}",
            f"{100 * row['recovered']:.1f}",
            f"{100 * row['error']:.1f}",
            f"{100 * row['top1']:.0f}",
            *(_short(row[key]) for key in ("kl", "kl_norm", "norm", "fitted")),
            "inf" if temperature is None else _short(temperature),
        )
    return table


def _criteria(block: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"criteria ({block['draws']} bootstrap draws: {block['bootstrap']})")
    for head in ("criterion", "layer", "how sure"):
        table.add_column(head, justify="right" if head == "layer" else "left")
    for answer in block["criteria"]:
        table.add_row(SHORT[answer["name"]], name(answer["layer"]), certainty(answer))
    return table
