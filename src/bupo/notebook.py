"""For notebooks: `bupo.look` at a model, and `bupo.read_results` of commands, with figures, tables and files."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure

from bupo.data.rollouts import read_responses
from bupo.errors import InputError, shown
from bupo.lens.analyze import AnalysisOptions, analyze_rollouts
from bupo.lens.tokens import explore_rollouts
from bupo.report import style
from bupo.report.analysis_figures import entropy_flow, overlay
from bupo.report.evaluations import average_dots
from bupo.report.inside_figures import comparison_figure, training_curves
from bupo.report.logs import TrainingRun
from bupo.report.page import ReportData, collect, render
from bupo.report.results import Analysis, Comparison, Evaluation, ExploredTokens
from bupo.report.sweeps import Sweep, effect_and_cost
from bupo.run_folder import claim, write_json, write_text


@dataclass(frozen=True, repr=False)
class Look:
    """What `look` saw. A notebook shows it as the token explorer, without a server or a network request.

    Attributes:
        analysis: the content of ``analysis.json`` for all responses.
        tokens: the content of ``tokens.json``: every layer's reading of each token of the explored responses.
    """

    analysis: dict[str, Any]
    tokens: dict[str, Any]

    def __repr__(self) -> str:
        return "Look({model}, samples={samples}, tokens={tokens}, layers={layers})".format(**self.analysis)

    @property
    def _page(self) -> str:
        name = self.analysis["model"]
        return render(name, ReportData(tokens=[(name, ExploredTokens.parse(self.tokens))]), "look.html.j2")

    def _repr_html_(self) -> str:
        return _framed(self._page)

    def plot(self) -> Figure:
        """Draw the mean entropies of the layer, attention and FFN policies."""
        return entropy_flow(self.analysis)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per explored response, token and layer (all from 1); ``top`` is the layer's most likely token."""
        return pandas.DataFrame(_token_rows(ExploredTokens.parse(self.tokens)))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``analysis.json``, the figure, ``tokens.json`` and ``look.html``; `bupo report` draws the folder."""
        path = claim(folder, overwrite=overwrite)
        write_json(path / "analysis.json", self.analysis)
        write_json(path / "tokens.json", self.tokens)
        style.save(self.plot(), path, "entropy_flow")
        write_text(path / "look.html", self._page)
        return path


def look(model: Any, tokenizer: Any, responses: str | Path | Sequence[Any], *, explore: int = 4) -> Look:
    """Read a text, or responses to prompts, at every layer of a model.

    Args:
        model, tokenizer: as `bupo.load_model` returns them.
        responses: a text (each token after the first is read), the `Path` of a responses file, or what
            `bupo.analyze_rollouts` takes.
        explore: number of responses in the token explorer; the analysis is of all.

    Raises:
        InputError: a text of fewer than two tokens, or responses or a model that cannot be read.
    """
    if isinstance(responses, Path):
        responses = read_responses(responses, tokenizer)
    elif isinstance(responses, str):
        ids = list(tokenizer(responses)["input_ids"])
        if len(ids) < 2:
            raise InputError(f"a text of two or more tokens can be read, not {shown(responses)}")
        responses = [(ids[:1], ids[1:])]
    if type(explore) is not int or explore < 1:
        raise InputError(f"explore must be a whole number of at least 1, not {shown(explore)}")
    analysis = analyze_rollouts(model, responses, options=AnalysisOptions(layer_choice=True))
    return Look(analysis, explore_rollouts(model, responses[:explore], tokenizer.decode))


@dataclass(frozen=True, repr=False)
class Results:
    """What commands wrote, as typed objects. A notebook shows it as the page of `bupo report`.

    Attributes:
        data: lists of names and contents by kind (``analyses``, ``runs``, ``evaluations``, ``comparisons``,
            ``tokens``, ``sweeps``), and ``differences``, the paired comparisons of the evaluations.
    """

    data: ReportData

    @property
    def kinds(self) -> list[str]:
        """The kinds of results that are there."""
        return [kind for kind in _VIEWS if getattr(self.data, kind)]

    def __repr__(self) -> str:
        names = {kind: ", ".join(name for name, _ in getattr(self.data, kind)) for kind in self.kinds}
        return f"Results({', '.join(f'{kind}: {given}' for kind, given in names.items())})"

    def _repr_html_(self) -> str:
        return _framed(render("Results", self.data))

    def plot(self, kind: str | None = None) -> Figure:
        """Draw one kind of results: accuracies, training curves, readings inside models, or entropies over layers."""
        view = _VIEWS[kind := self._one(kind, "plot")][0]
        if (figure := view(getattr(self.data, kind))) is None:
            raise InputError(f"these {kind} have nothing to draw")
        return figure

    def to_pandas(self, kind: str | None = None) -> pandas.DataFrame:
        """One kind of results as a table: a row per problem, logged update, arm, or layer (layers count from 1)."""
        rows = _VIEWS[kind := self._one(kind, "to_pandas")][1]
        named = getattr(self.data, kind)
        return pandas.DataFrame([{"name": name, **row} for name, content in named for row in rows(content)])

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``report.html``, and a figure and a CSV table of every kind of results."""
        path = claim(folder, overwrite=overwrite)
        for kind in self.kinds:
            if (figure := _VIEWS[kind][0](getattr(self.data, kind))) is not None:
                style.save(figure, path, kind)
            write_text(path / f"{kind}.csv", self.to_pandas(kind).to_csv(index=False))
        write_text(path / "report.html", render("Results", self.data))
        return path

    def _one(self, kind: str | None, method: str) -> str:
        if (kind is None and len(self.kinds) == 1) or kind in self.kinds:
            return kind or self.kinds[0]
        known = ", ".join(self.kinds)
        raise InputError(f"name one kind of these results ({known}), such as {method}({self.kinds[0]!r})")


def read_results(*paths: str | Path) -> Results:
    """Read what `bupo analyze`, `train`, `eval`, `compare` and `sweep` wrote, each a folder or file, or ``NAME=PATH``.

    Raises `InputError` for a path without results, or results that are damaged.
    """
    return Results(collect([str(path) for path in paths]))


def _framed(page: str) -> str:
    # a frame of its own: the page's style and names do not meet those of the notebook or of another page
    size = "width: 100%; height: 46rem; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" style="{size}"></iframe>'


def _token_rows(explored: ExploredTokens) -> Iterator[dict[str, Any]]:
    for response, sample in enumerate(explored.samples, start=1):
        for at, n in product(range(len(sample.tokens)), range(sample.layers)):
            row: dict[str, Any] = {"response": response, "position": at + 1, "token": sample.tokens[at], "layer": n + 1}
            for name in ("entropy", "logprob", "rank", "kl"):
                if (values := getattr(sample, name)) is not None:
                    row[name] = values[n][at]
            if sample.top is not None:
                row["top"], row["top_probability"] = sample.top[n][at][0]
            yield row


def _layer_rows(layers: int, columns: Mapping[str, tuple[int, Sequence[Any]]]) -> list[dict[str, Any]]:
    """A row per layer; each column starts at its own layer, and may go on to the output, which is layer L + 1."""
    last = max(first + len(values) for first, values in columns.values()) - 1
    return [
        {"layer": n}
        | {name: values[n - first] for name, (first, values) in columns.items() if first <= n < first + len(values)}
        for n in range(1, max(layers, last) + 1)
    ]


def _comparison_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for model in comparison.models:
        columns = {
            "entropy": (1, model.entropy.mean),
            "cosine": (1, model.cosine_of_layer.mean),
            "divergence": (comparison.layer + 1, model.divergence.mean),
        }
        yield from ({"model": model.name, **row} for row in _layer_rows(comparison.layers, columns))


def _analysis_figure(analyses: Sequence[tuple[str, Analysis]]) -> Figure:
    return entropy_flow(analyses[0][1]) if len(analyses) == 1 else overlay(analyses)


def _analysis_rows(analysis: Analysis) -> list[dict[str, Any]]:
    return _layer_rows(analysis.layers, {name: (1, values) for name, (values, _) in analysis.curves.items()})


def _problem_rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for task, score in evaluation.tasks.items():
        yield from ({"task": task, "problem": problem, "correct": share} for problem, share in score.shares.items())


def _training_figure(runs: Sequence[tuple[str, TrainingRun]]) -> Figure | None:
    logged = [(name, run) for name, run in runs if run.log]  # others hold readings only
    return training_curves(logged) if logged else None


def _arm_rows(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for task, arms in sweep.tasks.items():
        for arm in arms:
            away = {f"difference_{name}": value for name, value in (arm["difference"] or {}).items() if name != "seeds"}
            yield {"task": task, **{name: value for name, value in arm.items() if name != "difference"}, **away}


# of each kind: its figure, and the rows of its table
_VIEWS: dict[str, tuple[Callable[[Any], Figure | None], Callable[[Any], Any]]] = {
    "evaluations": (average_dots, _problem_rows),
    "runs": (_training_figure, lambda run: run.log),
    "comparisons": (lambda comparisons: comparison_figure(comparisons[0][1]), _comparison_rows),
    "analyses": (_analysis_figure, _analysis_rows),
    "tokens": (lambda tokens: None, _token_rows),
    "sweeps": (lambda sweeps: effect_and_cost(sweeps[0][1]), _arm_rows),
}
