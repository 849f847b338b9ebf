"""`bupo.look`: the token explorer inline in a notebook, with the figure, the table and the files behind it."""

from __future__ import annotations

import html
from collections.abc import Sequence
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
from bupo.report.analysis_figures import entropy_flow
from bupo.report.page import ReportData, render
from bupo.report.results import ExploredTokens
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
        # a frame of its own: the page's style and names do not meet those of the notebook or of another explorer
        size = "width: 100%; height: 46rem; border: 0"
        return f'<iframe srcdoc="{html.escape(self._page)}" sandbox="allow-scripts" style="{size}"></iframe>'

    def plot(self) -> Figure:
        """Draw the mean entropies of the layer, attention and FFN policies."""
        return entropy_flow(self.analysis)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per explored response, token and layer (all from 1); ``top`` is the layer's most likely token."""
        rows = []
        for response, sample in enumerate(self.tokens["samples"], start=1):
            for at, n in product(range(len(sample["tokens"])), range(sample["layers"])):
                row = {"response": response, "position": at + 1, "token": sample["tokens"][at], "layer": n + 1}
                row |= {name: sample[name][n][at] for name in ("entropy", "logprob", "rank", "kl")}
                row["top"], row["top_probability"] = sample["top"][n][at][0]
                rows.append(row)
        return pandas.DataFrame(rows)

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
