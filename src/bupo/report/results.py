"""The result files that a report reads, as types that check what they load and name the command that writes them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from bupo.errors import InputError

Values = list[float | None]


def _check_length(name: str, values: Sequence[Any], expected: int, unit: str) -> None:
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} values for {expected} {unit}")


class ResultFile(BaseModel):
    """A whole result file of schema 1; keys that no figure needs are ignored."""

    command: ClassVar[str]
    schema_version: Literal[1] = Field(alias="schema")

    @classmethod
    def parse(cls, content: Any, where: object = "the result") -> Self:
        """Check the content of a file, or raise `InputError` naming the key and the command to run again."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            words = [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]
            problem = f"{where} is not a complete result of {cls.command}: {': '.join(filter(None, words))}"
            raise InputError(f"{problem}; write it again with `{cls.command}`") from None


class Knee(BaseModel):
    """Where agreement turns to climbing: a layer (from 1) or None, and the reason as a sentence without a full stop."""

    layer: int | None
    reason: str
    standard_error: float | None = None


class Readings(BaseModel):
    """Every layer through lenses, compared with the output, by lens and kind; a knee is a candidate, never trained."""

    tokens: int
    responses: int
    seed: int = 0
    knees: dict[str, Knee] = {}
    curves: dict[str, dict[str, Values]]
    standard_errors: dict[str, dict[str, Values]] = {}

    @property
    def layers(self) -> int:
        return len(next(iter(self.curves.values()))["kl"])

    @model_validator(mode="after")
    def _all_kinds(self) -> Self:
        for path in (f"{lens}.{kind}" for lens in self.curves or ("raw",) for kind in ("entropy", "kl", "top1")):
            lens, _, kind = path.rpartition(".")
            if kind not in self.curves.get(lens, {}):
                raise ValueError(f"curves.{path} is missing")
            _check_length(f"curves.{path}", self.curves[lens][kind], self.layers, "layers")
        return self


class LensCard(ResultFile):
    command = "bupo lens"  # writes lens.json
    kind: str
    model: str | None
    held_out: Readings | None = None


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
    layer_choice: Readings | None = None

    @cached_property
    def curves(self) -> dict[str, tuple[Values, Values | None]]:
        """Every curve and its standard errors by its place in the file, for instance ``entropy_change.ffn``."""
        groups = {"sites": (self.sites, self.standard_errors)}
        groups["entropy_change"] = self.entropy_change, self.entropy_change_standard_errors
        groups["residual_cosine"] = self.residual_cosine, self.residual_cosine_standard_errors
        if (choice := self.layer_choice) is not None:
            for lens, curves in choice.curves.items():
                groups[f"layer_choice.curves.{lens}"] = curves, choice.standard_errors.get(lens, {})
        return {
            f"{group}.{name}": (values, errors.get(name))
            for group, (curves, errors) in groups.items()
            for name, values in curves.items()
        }

    @property
    def knees(self) -> dict[str, Knee]:
        return self.layer_choice.knees if self.layer_choice else {}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        required = ["sites.attn_out", "sites.ffn_out", "sites.layer_out", "entropy_change.attn", "entropy_change.ffn"]
        if missing := [path for path in required if path not in self.curves]:
            raise ValueError(f"{missing[0]} is missing")
        for path, columns in self.curves.items():
            for values in filter(None, columns):
                _check_length(path, values, self.layers, "layers")
        return self


class ExploredSample(BaseModel):
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
                _check_length(name, rows, self.layers, "layers")
                for row in rows:
                    _check_length(name, row, len(self.tokens), "tokens")
        return self


class ExploredTokens(ResultFile):
    command = "bupo analyze --explore N"  # writes tokens.json
    samples: list[ExploredSample] = Field(min_length=1)


class Estimate(BaseModel):
    """Avg@K or Pass@K with its 95 % interval, as shares."""

    k: int
    mean: float
    ci95: tuple[float, float]


class ProblemScore(BaseModel):
    id: str
    correct: float


class TaskScore(BaseModel):
    """What an evaluation measured on one task."""

    n_problems: int
    n_samples: int
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
    command = "bupo eval"  # writes results.json
    tasks: dict[str, TaskScore]


class Means(BaseModel):
    mean: list[float] = []
    standard_error: Values = []


class Quantity(BaseModel):
    value: float
    standard_error: float | None = None


class _Curves(BaseModel):
    entropy: Means
    cosine_of_layer: Means
    divergence: Means


class Change(_Curves):
    """Difference from the baseline, paired by token."""

    perplexity_ratio: Quantity | None = None


class ModelReading(_Curves):
    """Statistics of one model (or of one moment of training) on fixed responses."""

    name: str = ""
    perplexity: Quantity
    change: Change | None = None


class _OfLayer(ResultFile):
    layer: int
    layers: int
    samples: int = 0
    tokens: int = 0


class Comparison(_OfLayer):
    command = "bupo compare"  # writes compare.json
    kind: Literal["comparison"]
    models: list[ModelReading] = Field(min_length=1)


class TrainingReading(_OfLayer, ModelReading):
    command = "bupo train (with inside_every)"  # writes inside/after-*.json, as `bupo.callbacks.LayerReadings` does
    done: int = Field(validation_alias=AliasChoices("rollouts_done", "updates_done"))
    updates_done: int | None = None
    drift: Means | None = None  # of each layer's states since the start: 1 - cosine

    @property
    def unit(self) -> str:
        return "rollout batches trained on" if self.updates_done is None else "updates"


class SampledResponse(BaseModel):
    """A row of ``rollouts/rollout-*.jsonl``; the rows of a group answer the same prompt."""

    rollout: int
    phase: str = "full"
    layer: int | None = None
    group: int
    prompt: str
    response: str
    reward: float | None
    advantage: float
    length: int
    cut_off: bool
