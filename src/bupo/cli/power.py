"""``bupo power``: how many seeds a difference needs, from the rows of a pilot."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bupo.cli import options
from bupo.errors import InputError, nearest

_SEEDS = (5, 10, 20, 30)


def power(
    rows: Annotated[Path, typer.Argument(help="Rows, or the folder, of a sweep.")],
    arms: Annotated[str, typer.Option(metavar="A,B", help="Two arms; the difference is A minus B.")],
    task: Annotated[str | None, typer.Option(help="Task. Default: the only one.")] = None,
    difference: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Difference to show, in percentage points.")
    ] = None,
    power: Annotated[float, typer.Option(min=0.05, max=0.999, help="Probability of showing it.")] = 0.8,
    as_json: options.AsJson = False,
) -> None:
    """Say how many seeds show a difference between two arms, from the seeds that a pilot has of both.

    The standard deviation of the paired differences over seeds decides. From few seeds it is known badly, so its 95 %
    interval is shown, and what follows at its ends. The test is the two-sided paired t-test at 5 %.

    Example:
      bupo power runs/pilot --arms bupo,grpo --task arithmetic --difference 1
    """
    from bupo.sweep import statistics
    from bupo.sweep.rows import read_rows

    all_rows, names = read_rows(rows), options.split_names(arms)
    if len(names) != 2 or names[0] == names[1]:
        raise InputError(f"--arms must be two different arms, such as bupo,grpo, not {arms!r}")
    if unknown := [name for name in names if name not in all_rows]:
        raise InputError(f"{rows} has no arm {unknown[0]}{nearest(unknown[0], all_rows)}")
    one, other = (all_rows[name] for name in names)
    common = sorted(one.keys() & other.keys())
    if len(common) < 2:
        raise InputError(f"{names[0]} and {names[1]} have {len(common)} seeds in common; a pilot needs two or more")
    both = [arm[seed]["tasks"] for arm in (one, other) for seed in common]
    tasks = [name for name in both[0] if all(name in found for found in both)]
    if (task is None and len(tasks) != 1) or (task is not None and task not in tasks):
        raise InputError(f"name a --task that all seeds of both arms have: {', '.join(tasks) or 'there is none'}")
    if difference is not None and not 0.01 <= abs(difference) <= 100:
        raise InputError(f"--difference must be from 0.01 to 100 points, not {difference}")
    task = task or tasks[0]
    each = 100 * statistics.paired(one, other, task, common).mean(axis=1)
    deviation, ends = statistics.deviation_of(each)
    if deviation < 1e-9:
        raise InputError(f"all {len(common)} seeds have the same difference, {each[0]:+.2f}; a pilot needs other seeds")
    found: dict[str, Any] = {"schema": 1, "arms": names, "task": task, "seeds": common, "each": each.tolist()}
    found |= {"mean": float(each.mean()), "ci95": statistics.student(each), "deviation": deviation}
    found |= {"deviation_ci95": ends, "power": power, "difference": difference, "needed": None, "needed_ci95": None}
    if difference is not None:
        needed = [statistics.seeds_needed(abs(difference), d, power) for d in (deviation, *ends)]
        found |= {"needed": needed[0], "needed_ci95": needed[1:]}
    found["shown"] = []
    for n in _SEEDS:
        least, *at_ends = (statistics.detectable(n, d, power) for d in (deviation, *ends))
        found["shown"].append({"seeds": n, "detectable": least, "detectable_ci95": at_ends})
    if as_json:
        typer.echo(json.dumps(found))
        return
    mean = "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["mean"], *found["ci95"])
    typer.echo(f"{names[0]} minus {names[1]} on {task}, {len(common)} seeds: {mean} points")
    spread = "{:.2f} [{:.2f}, {:.2f}]".format(deviation, *ends)
    typer.echo(f"standard deviation over seeds: {spread} points (95 %, chi-square)")
    if difference is not None:
        shows = f"{found['needed']} seeds show {abs(difference):g} points with probability {power:g}"
        typer.echo(f"{shows}; {' to '.join(map(str, found['needed_ci95']))} at the ends of that interval")
    columns = {
        "seeds": [str(n) for n in _SEEDS],
        "shows (points)": [f"{row['detectable']:.2f}" for row in found["shown"]],
        "at the interval's ends": ["{:.2f} to {:.2f}".format(*row["detectable_ci95"]) for row in found["shown"]],
    }
    options.print_table(f"the smallest difference that so many seeds show with probability {power:g}", columns)
