"""The card of a trained model, and its way to the Hugging Face hub."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData

from bupo.errors import InputError, shown
from bupo.recipe import Recipe
from bupo.run_folder import write_text
from bupo.train.paper import PAPER

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = """---
{data}
---

# {name}

{model} trained with {method} on {dataset}, by [bupo](https://arxiv.org/abs/{paper}) {version}.

{phases}

| | |
| --- | --- |
| rollout batches | {rollouts} |
| updates | {updates} |
| reward, mean of the first and the last tenth of the rollout batches | {rewards} |
| seed | {seed} |
| software | {software} |

{held_out}

## Recipe

```yaml
{recipe}
```

## Citation

```bibtex
{citation}
```
"""


def write_card(folder: Path, recipe: Recipe, record: Mapping[str, Any], log: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``README.md`` beside the trained model in ``folder``: method, data, recipe, what was measured, citation.

    ``record`` is the content of ``run.json``, and ``log`` the rows of ``log.jsonl``.
    """
    result, config, dataset = record["result"], record["config"], _hub_name(recipe.dataset)
    internal = result["internal_layer"] is not None
    about = ModelCardData(
        base_model=_hub_name(recipe.model),
        datasets=None if dataset is None else [dataset],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["bupo", "trl", recipe.estimator],
    )
    last = ([row for row in log if "eval_reward" in row] or [{}])[-1]  # on the held-out problems of the recipe
    held_out = {name: last[name] for name in ("eval_reward", "eval_completions/mean_length") if name in last}
    measured = "\n".join(f"- `{name}`: {value:.4g}" for name, value in held_out.items())
    text = _CARD.format(
        data=about.to_yaml(),
        name=folder.absolute().parent.name,
        model=recipe.model,
        method="Bottom-up Policy Optimization" if internal else recipe.estimator.upper(),
        dataset=recipe.dataset,
        paper=PAPER["id"],
        version=record["versions"].get("bupo", ""),
        phases=_phases(result),
        rollouts=result["rollouts"],
        updates=result["updates"],
        rewards=f"{result['reward_first']} → {result['reward_last']}",
        seed=record["seed"],
        software=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        held_out=f"On the recipe's held-out problems:\n\n{measured}"
        if measured
        else "The run had no held-out problems.",
        recipe=yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False).strip(),
        citation=PAPER["citation"],
    )
    return write_text(folder / "README.md", text)


def _hub_name(name: str) -> str | None:
    """The name of a model or dataset if it is one of the hub's."""
    return name if _ON_HUB.fullmatch(name) and not Path(name).exists() else None


def _phases(result: Mapping[str, Any]) -> str:
    if result["internal_layer"] is None:
        return "All rollout batches trained the full policy."
    text = f"The first rollout batches trained the internal policy of layer {result['internal_layer']}."
    if end := result["phase_end"]:
        text += f" A guard ended this phase after rollout batch {end['rollouts']}: {end['reason']}."
    return text


def upload(trainer: Any, folder: Path) -> None:
    """Upload a model folder to the repository of the settings ``push_to_hub``; `InputError` if that fails."""
    args, target = trainer.args, trainer.hub_model_id
    try:
        HfApi(token=args.hub_token).upload_folder(repo_id=target, folder_path=folder, revision=args.hub_revision)
    except Exception as error:  # of the network, or the hub's
        by_hand = f"hf upload {target} {folder}"
        raise InputError(f"{folder} is saved, but not uploaded ({shown(error, 200)}); do it with: {by_hand}") from error
