"""Tries a run before its first update: the longest batch goes through an update, two groups are sampled and graded.

Nothing is left changed. No optimizer steps, gradients are removed, and the random state is put back, so that weights
and log of the run are bit for bit those of a run without the check.
"""

import math
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from bupo.errors import TrainingStopped, gib, out_of_memory
from bupo.models.layout import find_layout
from bupo.recipe import Recipe
from bupo.train.advantages import total_rewards
from bupo.train.config import engine
from bupo.train.schedule import FULL, Phase, Schedule

REMEDY = "lower micro_batch or max_completion_length, set gradient_checkpointing to true, or use lora"
SECONDS = 30.0  # of sampling, where it can be stopped
_MAXRSS = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss` in bytes


class Check(TrainerCallback):
    """Passes what `examine` finds to ``then``, before the first update and before any tracker begins."""

    def __init__(self, trainer: Any, recipe: Recipe, then: Callable[..., None]):
        self._trainer, self._recipe, self._then = trainer, recipe, then
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._then(**examine(self._trainer, self._recipe))


def examine(trainer: Any, recipe: Recipe) -> dict[str, Any]:
    """What the first minute of a run tells; every process calls this, in ``on_train_begin``, and gets the same.

    ``problems`` say why the run cannot work, ``warnings`` why it may teach nothing; both name the recipe's keys.
    ``memory`` has the bytes of an update per process by phase, ``sampled`` what became of two groups of responses.
    """
    args, found = trainer.args, dict[str, Any](prompts=len(trainer.train_dataset), memory=[], sampled=None)
    found |= {"notes": [], "warnings": [], "problems": []}
    found["schedule"] = in_words(trainer.schedule, recipe.rollouts, recipe.updates(1), args.guarded)
    with _untouched(trainer):
        if engine(args) == "deepspeed":
            found["notes"].append("no update is tried under DeepSpeed, whose backward passes step")
        else:
            for phase in _phases(trainer, recipe.rollouts):
                ones = gather_object([_try_update(trainer, recipe, phase)])
                worst = max(ones, key=lambda one: math.inf if one["ran_out"] else one["bytes"] / one["of"])
                found["memory"].append(worst)
                if worst["ran_out"] or worst["bytes"] > worst["of"]:
                    took, remedy = in_memory(worst, recipe), f"it does not fit; {REMEDY}"
                    found["problems"].append(f"{took}: {remedy}")
                    break
        if args.estimator == "ppo":
            found["notes"].append("the critic of estimator ppo is not tried; its updates need about as much again")
        if args.use_vllm and args.vllm_mode == "server":
            found["notes"].append("no responses are sampled, because vLLM is a server")
        elif not found["problems"]:
            found["sampled"] = _sample(trainer)
            found["warnings"] = sample_warnings(found["sampled"], recipe.max_completion_length)
    return found


@contextmanager
def _untouched(trainer: Any) -> Iterator[None]:
    """Within this context the model is in training mode; afterwards random state and what is logged are as before."""
    device, names = trainer.accelerator.device, ("phase", "rewards", "sampling_seconds")
    before = {name: getattr(trainer, name) for name in names}
    tokens, states = trainer.state.num_input_tokens_seen, (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            trainer.model_wrapped.train()
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        vars(trainer).update(before)
        trainer.state.num_input_tokens_seen = tokens
        for logged in (trainer._metrics["train"], trainer._pending_metrics, trainer._pending_extra_logs):
            logged.clear()  # nothing has been logged before the first update


def in_words(schedule: Schedule, rollouts: int, updates: int, guarded: bool) -> str:
    """For instance "8 rollout batches train layer 4, then 37 the full policy; 4 updates per rollout batch"."""
    parts = []
    for phase in schedule.internal:
        joint = "" if phase.weight == 1.0 else f" (weight {phase.weight:g}, beside the full policy)"
        what = "the boundary layer" if phase.layer == "auto" else f"layer {phase.layer}"
        parts.append((f"{'up to ' * guarded}{phase.rollouts}", what + joint))
    left = rollouts - sum(phase.rollouts or 0 for phase in schedule.internal)
    parts += [("the others", "the full policy")] if guarded else [(str(left), "the full policy")] if left else []
    (count, what), *rest = parts
    first = f"{count} rollout {'batch trains' if count == '1' else 'batches train'} {what}"
    then = "".join(f", then {count} {what}" for count, what in rest)
    return f"{first}{then}; {updates} update{'s' * (updates > 1)} per rollout batch"


def in_memory(tried: Mapping[str, Any], recipe: Recipe) -> str:
    """What an update took, as a sentence without its end."""
    where = f"{tried['phase']} phase" + (f", layer {tried['layer']}" if tried["layer"] else "")
    lengths = f"{recipe.max_prompt_length} + {recipe.max_completion_length} tokens"
    took = f"runs out of {tried['ran_out']} memory," if tried["ran_out"] else f"takes {gib(tried['bytes'])}"
    batch = f"micro_batch {recipe.micro_batch} x ({lengths})"
    return f"an update of {batch} in the {where} {took} of {gib(tried['of'])} per process"


def _phases(trainer: Any, rollouts: int) -> list[Phase]:
    """The phases whose updates take most: the deepest internal and joint ones, and the full policy's if it is reached.

    A layer that is not known yet is taken to be a sixth of the depth, as in `bupo plan`.
    """
    depth = find_layout(trainer.accelerator.unwrap_model(trainer.model)).n_layers
    internal = trainer.schedule.with_layer(max(1, depth // 6)).internal
    deepest = {phase.name: phase for phase in sorted(internal, key=lambda phase: phase.layer)}
    reached = trainer.args.guarded or sum(phase.rollouts for phase in internal) < rollouts
    return [*deepest.values(), *([FULL] if reached else [])]


def _try_update(trainer: Any, recipe: Recipe, phase: Phase) -> dict[str, Any]:
    """Put the longest batch through an update of this process, but for the optimizer's step, and say what it took."""
    device, moments = trainer.accelerator.device, _moments(trainer, phase)
    tried: dict[str, Any] = {"phase": phase.name, "layer": phase.layer, "bytes": None, "of": None, "ran_out": None}
    trainer.phase = phase
    try:
        if device.type == "cpu":
            tried["of"] = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            with suppress(OSError):  # Linux only: elsewhere the peak is that since the process began
                Path("/proc/self/clear_refs").write_text("5")
            tried["bytes"] = psutil.Process().memory_info().rss + moments * 3 // 2  # at the least, with gradients
            if all(gather_object([tried["bytes"] <= tried["of"]])):
                _update(trainer, recipe, phase)
                tried["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS + moments
        else:
            tried["of"] = torch.accelerator.get_memory_info(device)[1]
            torch.accelerator.reset_peak_memory_stats(device)
            optimizer_state = torch.empty(moments, dtype=torch.uint8, device=device)
            _update(trainer, recipe, phase)
            tried["bytes"] = torch.accelerator.max_memory_allocated(device)
            del optimizer_state
    except (RuntimeError, MemoryError) as error:
        tried["ran_out"] = out_of_memory(error)
        if tried["ran_out"] is None:
            raise
    trainer.model_wrapped.zero_grad()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    return tried


def _update(trainer: Any, recipe: Recipe, phase: Phase) -> None:
    """Forward and backward passes as the run makes them, twice where gradients of a first one wait for the next.

    The loss is a sum of log-probabilities: the surrogate adds numbers per token only, and its metrics would have the
    processes wait for one that ran out of memory. So would DDP, which is left out: its buckets exist already, and what
    reaches its hooks would count as used in the first update.
    """
    model, args, accelerator = trainer.model, trainer.args, trainer.accelerator
    prompt = trainer.processing_class(text=[trainer.train_dataset[0]["prompt"]])["input_ids"][0]
    row, length = torch.tensor(prompt, device=accelerator.device), recipe.max_completion_length
    total = recipe.max_prompt_length + length
    ids = row.repeat(-(-total // len(row)))[:total].repeat(recipe.micro_batch, 1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # batches have padding, with which attention may take another path
    wanted = {"compute_entropy": True, "compute_aux_loss": trainer.aux_loss_enabled}
    hooks, held = engine(args) == "ddp" and args.ddp_find_unused_parameters, []
    for last in [False, True][-args.gradient_accumulation_steps :]:
        losses = []
        with nullcontext() if last else accelerator.no_sync(model), trainer.compute_loss_context_manager():
            for scored in dict.fromkeys((phase, FULL) if phase.weight < 1.0 else (phase,)):
                with trainer._scoring(scored):
                    logps, _, more = trainer._get_per_token_logps_and_entropies(model, ids, mask, length, **wanted)
                losses.append(logps.mean() if more is None else logps.mean() + more)
            loss, trained = torch.stack(losses).sum(), [p for p in model.parameters() if p.requires_grad]
            held.append(torch.autograd.grad(loss, trained, allow_unused=True) if hooks else loss.backward())


def _moments(trainer: Any, phase: Phase) -> int:
    """Bytes of what Adam will keep of the parameters that a phase trains; 0 for other optimizers."""
    if not isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.Adam | torch.optim.AdamW):
        return 0
    model, above = trainer.accelerator.unwrap_model(trainer.model), set()
    if isinstance(phase.layer, int) and phase.weight == 1.0:
        above = {id(p) for layer in find_layout(model).layers[phase.layer :] for p in layer.parameters()}
    trained: list[Any] = [p for p in model.parameters() if p.requires_grad and id(p) not in above]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
    return 2 * sum(p.numel() * p.element_size() for p in local)


def _sample(trainer: Any) -> dict[str, Any]:
    """Sample and grade responses to two prompts, or to one per process, as the run does; the same on every process."""
    accelerator, args, data, size = trainer.accelerator, trainer.args, trainer.train_dataset, trainer.num_generations
    here = 2 if accelerator.num_processes == 1 else 1
    first, groups = accelerator.process_index * here, accelerator.num_processes * here
    rows = [data[(first + i) * len(data) // groups] for i in range(here) for _ in range(size)]
    prompts, seconds = [row["prompt"] for row in rows], None
    if not (args.use_vllm or args.use_transformers_continuous_batching) and engine(args) in ("one", "ddp"):
        seconds = SECONDS  # elsewhere a process that stops would leave the others waiting
        trainer.generation_config.max_time, limit = seconds, trainer.generation_config.max_time
    _, ids, _, completions, *_ = trainer._generate(prompts)
    if seconds:
        trainer.generation_config.max_time = limit
    with suppress(TrainingStopped):  # no response has a reward, which need not hold for a whole rollout batch
        trainer._calculate_rewards(rows, prompts, completions, ids)
    rewards = total_rewards(trainer.rewards, trainer.reward_weights).view(-1, size)
    spreads = (rewards.nan_to_num(nan=-math.inf).amax(1) - rewards.nan_to_num(nan=math.inf).amin(1)).clamp(min=0)
    unread = gather_object(list(trainer._pending_metrics.get("grading/unparsable", [])))
    names = ("clipped_ratio", "mean_length", "max_length")
    cut_off, mean, longest = (trainer._metrics["train"][f"completions/{name}"][-1] for name in names)
    return {
        "prompts": groups,
        "responses": rewards.numel(),
        "cut_off": cut_off,
        "mean_length": mean,
        "stopped_at": int(longest) if seconds and cut_off and longest < args.max_completion_length else None,
        "no_answer": sum(unread) / len(unread) if unread else None,
        "reward": None if rewards.isnan().all() else rewards.nanmean().item(),
        "spreads": spreads.tolist(),
    }


def sample_warnings(sampled: Mapping[str, Any], limit: int) -> list[str]:
    """What the samples say against the run, with the keys to change; nothing if it was the check that stopped them."""
    number, reward = sampled["responses"], sampled["reward"]
    same = reward is not None and not any(sampled["spreads"])
    checks = {
        f"all {number} sampled responses were cut off at max_completion_length {limit}, before they ended; raise it, "
        "or choose a template after which the model ends its responses": sampled["cut_off"] == 1.0,
        f"none of {number} sampled responses has an answer that the reward can read; change template or raise "
        "max_completion_length": sampled["no_answer"] == 1.0,
        f"no reward function gave any of {number} sampled responses a number; change reward or dataset": reward is None,
        "all sampled responses to the same prompt got the same reward, from which nothing is learned; change reward, "
        "raise samples_per_prompt, or choose a dataset of which the model solves a part": same,
    }
    return [] if sampled["stopped_at"] else [message for message, holds in checks.items() if holds]
