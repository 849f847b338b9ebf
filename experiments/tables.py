"""Writes the tables of README.md and the docs from the result files.

Run ``make figures``, or ``python -m experiments.tables`` after `experiments.summary`. With ``--check`` nothing is
written, and the exit code is 1 if a page differs from the result files.

A table stands between ``<!-- table NAME TASK METRIC [TASK METRIC ...] -->`` and ``<!-- end -->``. NAME is a table of
`experiments.summary`, METRIC is ``avg`` or ``pass``. Other tables: ``<!-- table record FAMILY -->``
(`experiments.record`), ``<!-- table styles -->`` (contrasts of `experiments.styles`), ``<!-- table styles cells -->``
(its models), ``<!-- table inside -->`` (the measurements of `experiments/grids/inside.yaml`), ``<!-- table cost NAME
-->`` (the number of runs of a table and their time), ``<!-- table gallery -->`` (the models of `experiments.gallery`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import record
from experiments.summary import TABLES, read_lines

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
PAGES = (REPOSITORY / "README.md", *(REPOSITORY / "docs" / f"{page}.md" for page in ("evidence", "gallery")))
NAMES = {
    **record.NAMES, "rloo": "RLOO", "reinforce++": "REINFORCE++", "bupo": "BuPO (layer 4, 8 batches)",
    "norm": "BuPO through the final norm", "temperature": "BuPO at a fitted temperature",
    "frozen4": "GRPO, layers 1-4 frozen", "upper0.1": "GRPO, 0.1x learning rate above layer 4",
    "layer2": "BuPO, layer 2", "layer6": "BuPO, layer 6", "layer8": "BuPO, layer 8", "steps4": "4", "steps16": "16",
    "steps30": "30", "steps45": "45, the whole run", "auto45": "guarded, at most 45", "rate1e-5": "GRPO, 1e-5",
    "ridge4x45": "ridge, layer 4, all 45", "upper4": "GRPO on layers 5-8 alone", "lower6": "GRPO on layers 1-6 alone",
    "rate6e-5": "GRPO, 6e-5", "rate3e-6": "GRPO, 3e-6", "rate1e-4": "GRPO, 1e-4",
}  # fmt: skip
OWN = {
    "inside": {"steps45": "layer 4, all 45 batches"},
    "main_smollm2": {"bupo": "BuPO (layer 6, 2 batches)"},
    "twice_smollm2": {"grpo20": "GRPO, 20 batches", "bupo20": "BuPO (layer 6, 2 batches), 20 batches"},
    "tuning_smollm2": {"grpo": "GRPO, 1e-5", "rate3e-5": "GRPO, 3e-5"},
    "guard": {"grpo": "0 (GRPO)", "bupo": "8"},
    "worth": {
        "bupo": "8 internal, 37 of GRPO",
        "grpo37": "37 of GRPO",
        "steps16": "16 internal, 29 of GRPO",
        "grpo29": "29 of GRPO",
        "steps30": "30 internal, 15 of GRPO",
        "grpo15": "15 of GRPO",
    },
    "tuning": {"grpo": "GRPO, 3e-5"},
}
TASKS = {"arithmetic": "", "arithmetic-hard": "harder, ", "held-out": "", "shifted": "shifted, "}
MARK = re.compile(r"(<!-- table (?P<what>[^>]+?) -->\n).*?(<!-- end -->)", re.S)


def markdown(what: str) -> str:
    """Render one table.

    Raises:
        FileNotFoundError: its results do not exist, or its baseline has not run with all seeds.
    """
    name, *rest = what.split()
    if name == "cost":
        return _cost(*rest)
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if name in OTHERS:
        return _cells(result) if rest == ["cells"] else OTHERS[name](result, *rest)
    return _comparison(name, result, *rest)


def _comparison(name: str, found: dict[str, Any], *measures: str) -> str:
    """One row per arm: its mean, and its difference from the baseline; further measures add a difference each."""
    (metric, table), *others = [
        next((m, t) for m, t in found["tasks"][task].items() if m.startswith(kind))
        for task, kind in zip(measures[::2], measures[1::2], strict=True)
    ]
    names = {**NAMES, **OWN.get(name, {})}
    base = table["baseline"]
    if "minus_baseline" not in table:
        raise FileNotFoundError(f"{name}: the baseline has not been run with all seeds")
    other = "its own baseline" if isinstance(base, dict) else names[base]
    timed = any("update_time" in away for away in table["minus_baseline"].values())
    header = ["", f"{metric.capitalize()}, %", "seeds", f"minus {other}, points [95 % over seeds] [over problems]"]
    header += [f"{TASKS[task]}{m.capitalize()}" for task, (m, _) in zip(measures[2::2], others, strict=True)]
    header += [f"time of updates / {other}'s"] * timed
    rows = [header, ["---"] * len(header), ["before training", f"{table['start']:.1f}"] + [""] * (len(header) - 2)]
    for arm, row in table["arms"].items():
        every = [each["minus_baseline"].get(arm) for each in (table, *(t for _, t in others))]
        rows.append([names[arm], f"{row['mean']:.1f}", str(row["seeds"]), *map(_points, every)])
        time = (every[0] or {}).get("update_time")
        rows[-1] += [f"{time['mean']:.2f} [{time['ci95'][0]:.2f}, {time['ci95'][1]:.2f}]" if time else ""] * timed
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _points(away: dict[str, Any] | None) -> str:
    return "" if away is None else f"{away['mean']:+.1f} {_span(away.get('ci95'))} {_span(away['ci95_problems'])}"


def _span(ends: list[float] | None) -> str:
    return "[one seed]" if ends is None else f"[{ends[0]:+.1f}, {ends[1]:+.1f}]"


def _few(mean: float, each: list[float], ends: list[float] | None) -> str:
    """A mean with its interval over seeds; for two seeds their values, because their interval would be meaningless."""
    if len(each) < 3 or ends is None:
        return ", ".join(f"{value:+.2f}" for value in each)
    return f"{mean:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"


def _styles(found: dict[str, Any]) -> str:
    measures = {
        "late_share_raw": "late share of the fall, raw",
        "late_share_norm": "late share, final norm",
        "ffn_last_step": "last step of the FFN change, nats",
        "ffn_positive_layers": "layers with FFN change above 0",
    }
    rows = [f"| contrast | pairs | {' | '.join(measures.values())} |", "| --- | --- |" + " --- |" * len(measures)]
    for name, contrast in found["contrasts"].items():
        cells = []
        for key in measures:
            away = contrast["differences"].get(key)
            cells.append("" if away is None else _few(away["mean"], away["each"], away.get("ci95")))
        rows.append(f"| {name} | {len(contrast['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cells(found: dict[str, Any]) -> str:
    """One row per kind of model, with the value of each seed."""
    rows = [
        "| model | solved, % | late share, raw | late share, final norm | boundary layer |",
        "| --- |" + " --- |" * 4,
    ]
    names = {"worked": "", "bare": ", answers only", "longer": ", trained longer"}
    for cell in found["cells"]:
        kind = f"{cell['arch']}, {'tied' if cell['tied'] else 'untied'}{names[cell['data']]}"
        values = cell["measures"]
        late = [" ".join(f"{v:.2f}" for v in values[f"late_share_{reading}"]["each"]) for reading in ("raw", "norm")]
        layers = " ".join("-" if layer is None else str(layer) for layer in cell["boundary_layers"])
        rows.append(f"| {kind} | {100 * values['solved']['mean']:.1f} | {late[0]} | {late[1]} | {layers} |")
    return "\n".join(rows)


def _inside(found: dict[str, Any]) -> str:
    keys = list(next(iter(found["arms"].values()))["measures"])
    rows = [f"| | seeds | {' | '.join(keys)} |", "| --- | --- |" + " --- |" * len(keys)]
    first = next(iter(found["arms"].values()))
    rows.append("| before training | | " + " | ".join(f"{first['measures'][k]['before']:.2f}" for k in keys) + " |")
    for arm, row in found["arms"].items():
        cells = []
        for key in keys:
            measure = row["measures"][key]
            cells.append(_few(measure["change"], list(measure["each"].values()), measure.get("ci95")))
        name = {**NAMES, **OWN["inside"]}[arm]
        rows.append(f"| {name}, change | {len(row['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cost(name: str) -> str:
    """The number of runs behind a table and their median time, from its lines."""
    settings = TABLES.get(name, {"rows": f"{name}.jsonl"})
    lines = read_lines(RESULTS / settings["rows"])
    if "arms" in settings:
        lines = [r for r in lines if r.get("arm") in settings["arms"] and r["seed"] < settings["seeds"]]
    middle = statistics.median(row["seconds"] for row in lines) / 60
    return f"{len(lines)} runs of about {middle:.0f} minutes on one core (median)."


def _gallery(found: dict[str, Any]) -> str:
    """One row per model and lens: entropies and divergences at four depths, and both shares."""
    rows = ["| model | lens | entropy at layers 1, L/2, 3L/4, L | KL at layers 1, L/2, 3L/4, L-1 | late, % | left, % |"]
    rows += ["| --- |" + " --- |" * 5]
    for name, model in found["models"].items():
        depth = len(model["curves"]["raw"]["kl"])
        for lens, curves in model["curves"].items():
            places = [1, depth // 2, model["shares"][lens]["layer"]]
            cells = [
                ", ".join(f"{curves[kind][layer - 1]:.2f}" for layer in (*places, last))
                for kind, last in (("entropy", depth), ("kl", depth - 1))
            ]
            cells += [_share(model["shares"][lens][kind]) for kind in ("late", "left")]
            rows.append(f"| {name} ({depth} layers) | {lens} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _share(found: dict[str, float] | None) -> str:
    """A share in per cent with its 95 % interval over responses."""
    if found is None:
        return "no fall"
    half = 1.96 * found["standard_error"]
    return f"{100 * found['share']:.0f} [{100 * (found['share'] - half):.0f}, {100 * (found['share'] + half):.0f}]"


OTHERS: dict[str, Callable[..., str]] = {
    "record": record.markdown,
    "styles": _styles,
    "inside": _inside,
    "gallery": _gallery,
}


def render(text: str) -> str:
    """Render all tables of a page; a table without results becomes a note."""

    def one(found: re.Match[str]) -> str:
        try:
            table = markdown(found["what"])
        except FileNotFoundError:
            table = "*not run yet*"
        return f"{found[1]}{table}\n{found[3]}"

    return MARK.sub(one, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with code 1 if a page differs")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = render(text)
        if made != text and args.check:
            sys.exit(f"{page.name} differs from the results; run `make figures`")
        if not args.check and made != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.name}: tables written")


if __name__ == "__main__":
    main()
