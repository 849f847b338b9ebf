"""The result files that a report reads, as types: each knows the command that writes it, and checks what it loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bupo.errors import InputError

Values = list[float | None]


class _Part(BaseModel):
    """A part of a result file; keys that no figure needs are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ResultFile(_Part):
    """A whole result file of schema 1."""

    command: ClassVar[str]
    schema_version: Literal[1] = Field(alias="schema")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            InputError: the file is not such a result; the message names the key and the command to run again.
        """
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls, content: Any, where: str = "the result") -> Self:
        """Check content that was read or computed already; raises as `load` does."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(
                f"{where} is not a complete result of {cls.command}: {f'{key}: ' if key else ''}{message}; "
                f"write it again with `{cls.command}`"
            ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `InputError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} does not contain a JSON object")
    return content


def _check_lengths(name: str, columns: Sequence[Sequence[Any]], expected: int, unit: str) -> None:
    for column in columns:
        if len(column) != expected:
            raise ValueError(f"{name} has {len(column)} values for {expected} {unit}")


class Criterion(_Part):
    """What one criterion gives: a layer (from 1) or None, and the reason as a sentence without a full stop."""

    name: str
    layer: int | None
    reason: str
    standard_error: float | None = None


class LayerChoice(_Part):
    """Agreement of every layer with the model's output, and the layers that criteria name."""

    tokens: int
    responses: int
    seed: int = 0
    criteria: list[Criterion]
    curves: dict[str, dict[str, Values]]
    standard_errors: dict[str, dict[str, Values]] = {}

    @property
    def knee(self) -> Criterion | None:
        """The knee of the agreement curve: a candidate, which nobody has tried in training."""
        return next((criterion for criterion in self.criteria if criterion.name == "knee"), None)


class Analysis(ResultFile):
    """``analysis.json``; lists run over layers 1..L."""

    command = "bupo analyze"
    model: str = "model"
    layers: int = Field(ge=1)
    vocabulary: int | None = None
    tokens: int | None = None
    samples: int | None = None
    dtype: str | None = None
    final_entropy: float | None = None
    sites: dict[str, Values]
    standard_errors: dict[str, Values] = {}
    entropy_change: dict[str, Values]
    entropy_change_standard_errors: dict[str, Values] = {}
    residual_cosine: dict[str, Values]
    residual_cosine_standard_errors: dict[str, Values] = {}
    regions: dict[str, tuple[int, int] | None] = {}
    boundary_layer: int | None = None
    boundary_reason: str = "no reason recorded"
    layer_choice: LayerChoice | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        groups: dict[str, Any] = {name: getattr(self, name) for name in ("sites", "entropy_change", "residual_cosine")}
        errors = {f"{name}_standard_errors": getattr(self, f"{name}_standard_errors") for name in list(groups)[1:]}
        groups |= {"standard_errors": self.standard_errors, **errors}
        required = ["sites.attn_out", "sites.ffn_out", "sites.layer_out", "entropy_change.attn", "entropy_change.ffn"]
        if self.layer_choice is not None:
            groups |= {f"layer_choice.curves.{name}": curves for name, curves in self.layer_choice.curves.items()}
            lenses = [f"layer_choice.curves.{name}" for name in ("raw", "norm")]
            required += [f"{lens}.{kind}" for lens in lenses for kind in ("entropy", "kl", "top1")]
        for path in required:
            group, _, name = path.rpartition(".")
            if name not in groups.get(group, {}):
                raise ValueError(f"{path} is missing")
        for name, columns in groups.items():
            _check_lengths(name, list(columns.values()), self.layers, "layers")
        return self


class ExploredSample(_Part):
    """One response in the token explorer: tables of L layers x T tokens."""

    problem_id: str | None = None
    prompt: str | None = None
    tokens: list[str] = Field(min_length=1)
    layers: int = Field(ge=1)
    entropy: list[Values]
    logprob: list[Values] | None = None
    kl: list[Values] | None = None
    rank: list[Values] | None = None
    top: list[list[list[tuple[str, float]]]] | None = None

    @model_validator(mode="after")
    def _tables(self) -> Self:
        for name in ("entropy", "logprob", "kl", "rank", "top"):
            if (rows := getattr(self, name)) is not None:
                _check_lengths(name, [rows], self.layers, "layers")
                _check_lengths(name, rows, len(self.tokens), "tokens")
        return self


class ExploredTokens(ResultFile):
    """``tokens.json``."""

    command = "bupo analyze --explore N"
    samples: list[ExploredSample] = Field(min_length=1)


class Estimate(_Part):
    """Avg@K or Pass@K with its 95 % interval, as shares."""

    k: int
    mean: float
    ci95: tuple[float, float]


class ProblemScore(_Part):
    """Number of correct samples of one problem."""

    id: str
    correct: float


class TaskScore(_Part):
    """What an evaluation measured on one task."""

    n_problems: int | None = None
    n_samples: int | None = None
    avg_at_k: Estimate | None = None
    pass_at_k: list[Estimate] = []
    mean_length: float | None = None
    truncation_rate: float | None = None
    unparsable_rate: float | None = None
    reason: str = "no reason recorded"
    problems: list[ProblemScore] = []

    @property
    def shares(self) -> dict[str, float]:
        """Share of correct samples per problem."""
        return {p.id: p.correct / self.n_samples for p in self.problems} if self.n_samples else {}


class Evaluation(ResultFile):
    """``results.json``."""

    command = "bupo eval"
    tasks: dict[str, TaskScore]


class Means(_Part):
    """Means with standard errors."""

    mean: list[float] = []
    standard_error: Values = []


class Quantity(_Part):
    """One value with its standard error."""

    value: float
    standard_error: float | None = None


class Change(_Part):
    """Difference from the baseline, paired by token."""

    entropy: Means
    cosine_of_layer: Means
    divergence: Means
    perplexity_ratio: Quantity | None = None


class ModelReading(_Part):
    """Statistics of one model (or of one moment of training) on fixed responses."""

    name: str = ""
    perplexity: Quantity
    entropy: Means
    cosine_of_layer: Means
    divergence: Means
    change: Change | None = None


class _OfLayer(ResultFile):
    """Results about the policy of one layer."""

    layer: int
    layers: int
    samples: int = 0
    tokens: int = 0


class Comparison(_OfLayer):
    """``compare.json``."""

    command = "bupo compare"
    kind: Literal["comparison"]
    models: list[ModelReading] = Field(min_length=1)


class TrainingReading(_OfLayer, ModelReading):
    """``inside/after-*.json`` of a training run."""

    command = "bupo train (with inside_every)"
    rollouts_done: int


def load_readings(folder: Path) -> list[TrainingReading]:
    """The readings that a training run saved, in order of training; an empty list if there are none."""
    readings = [TrainingReading.load(path) for path in folder.glob("after-*.json")]
    return sorted(readings, key=lambda reading: reading.rollouts_done)
