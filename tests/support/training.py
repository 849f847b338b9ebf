"""Shared by the training tests: a tiny tokenizer, a reward with signal, trainers on a tiny random model, references."""

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from bupo.train.config import BuPOConfig
from bupo.train.guard import Decision
from bupo.train.trainer import BuPOTrainer
from tests.support.tiny import tiny_model, word_tokenizer

VOCABULARY, L = 97, 4
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: ``w3`` is id 3."""
    return word_tokenizer([f"w{i}" for i in range(3, VOCABULARY)], "w3", WhitespaceSplit(), padding_side="left")


def prompts(n: int = 24) -> Dataset:
    """Prompts of two to four words."""
    rows = [" ".join(f"w{3 + (7 * i + 5 * j) % 90}" for j in range(2 + i % 3)) for i in range(n)]
    return Dataset.from_dict({"prompt": rows})


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward: the share of even tokens."""
    return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]


DEFAULTS: dict[str, Any] = {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 1}
DEFAULTS |= {"max_steps": 8, "max_completion_length": 6, "learning_rate": 1e-2, "internal_layer": 2, "seed": 3}
DEFAULTS |= {"save_strategy": "no", "report_to": [], "bf16": False, "use_cpu": True, "disable_tqdm": True}
DEFAULTS |= {"gradient_checkpointing": False}


def config(folder: Any, kind: type = BuPOConfig, **changes: Any) -> Any:
    """Settings for a tiny run. ``phases`` replaces the default internal layer."""
    settings = {**DEFAULTS, **({"internal_layer": None} if "phases" in changes else {}), **changes}
    if kind is not BuPOConfig:
        settings = {k: v for k, v in settings.items() if not k.startswith("internal_")}
    return kind(output_dir=str(folder), **settings)


def make_trainer(folder: Any, kind: type = BuPOTrainer, args: Any = None, model: Any = None, **changes: Any) -> Any:
    """A trainer on a tiny random model (4 layers), ready to train."""
    names = ("rollout_func", "peft_config", "callbacks", "train_dataset", "eval_dataset", "optimizers", "reward_funcs")
    names += ("reward_processing_classes",)
    more = {k: changes.pop(k) for k in names if k in changes}
    more = {"train_dataset": prompts(), "reward_funcs": even_share, **more}
    trainer = kind(
        model=model if model is not None else tiny_model("qwen3", spread=3.0),
        args=args if args is not None else config(folder, **changes),
        processing_class=tiny_tokenizer(),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(*arguments: Any, **changes: Any) -> Any:
    """A trainer that has trained. Make trainers to compare one after the other: making one seeds the generators."""
    trainer = make_trainer(*arguments, **changes)
    trainer.train()
    return trainer


def resumed(folder: Any, whole: Any, step: int, **settings: Any) -> Any:
    """A trainer with other initial weights that continued from a checkpoint of ``whole``, which it must equal."""
    rest = make_trainer(folder, model=tiny_model("qwen3", seed=9), **settings)
    rest.train(resume_from_checkpoint=str(whole.args.output_dir) + f"/checkpoint-{step}")
    assert rest.state.global_step == whole.state.global_step
    assert same_weights(weights(whole.model), weights(rest.model))
    assert untimed_log(whole) == untimed_log(rest)
    return rest


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def phases(trainer: Any) -> list[float]:
    return [row["phase"] for row in trainer.state.log_history if "phase" in row]


def untimed_log(trainer: Any) -> list[dict[str, Any]]:
    timed = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    return [{k: v for k, v in row.items() if k not in timed} for row in trainer.state.log_history]


def above(name: str, layer: int) -> bool:
    """Whether the internal policy of a layer does not use this parameter."""
    return name.endswith("model.norm.weight") or any(f"layers.{k}." in name for k in range(layer, L))


# -- what happens in training ----------------------------------------------------------------------------------------


class Recorder(BuPOTrainer):
    """Keeps, for every micro-batch, the model before it, its inputs, the loss and the log-probabilities."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        before = copy.deepcopy(self.model)
        loss = super()._compute_loss(model, inputs)
        self.__dict__.setdefault("seen", []).append((before, dict(inputs), loss.detach().clone(), self.latest))
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.latest = scores[0].detach().clone()
        return scores


class Gradients(TrainerCallback):
    """The gradient of every parameter that has one, update by update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.updates.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def scripted(script: str) -> Callable[[Any], Decision]:
    """Stands in for `guard.decide`: one letter per batch, k keep, s switch, r restore, anything else continue."""

    def decide(history: Any) -> Decision:
        letter = script[len(history) - 1]
        action: Any = {"s": "switch", "r": "restore"}.get(letter, "continue")
        return Decision(action, "as scripted" if action != "continue" else "", keep=letter == "k")

    return decide


def internal_logps(
    model: Any, inputs: Any, layer: int, norm: bool = False, temperature: float = 1.0, lens: Any = None
) -> Any:
    """log pi^l of the responses from an ordinary forward's hidden states, and its entropies."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    states: list[torch.Tensor] = []
    hook = model.model.layers[layer - 1].register_forward_hook(lambda m, i, o: states.append(o))
    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    hook.remove()
    state = states[0] if lens is None else lens.transport(layer, states[0])
    state = model.model.norm(state) if norm else state
    logits = state @ model.lm_head.weight.T / temperature
    logps = logits[:, inputs["prompt_ids"].size(1) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, inputs["completion_ids"][..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def surrogate(logps: Any, old: Any, inputs: Any, loss_type: str = "dapo", level: str = "token", **clip: float) -> Any:
    """Eq. 9 written out, with the aggregation of each loss type; four updates per rollout batch."""
    mask, advantages = inputs["completion_mask"], inputs["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    log_ratio = logps - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip.get("low", 0.2), 1 + clip.get("high", 0.2))
    token = -torch.min(ratio * advantages, clipped * advantages) * mask
    if loss_type == "grpo":
        return (token.sum(-1) / mask.sum(-1)).mean()
    if loss_type == "bnpo":
        return token.sum() / mask.sum()
    if loss_type == "dr_grpo":
        return token.sum() / (len(token) * 6)
    return token.sum() / (inputs["num_items_in_batch"] / 4)  # dapo: the rollout batch's tokens per update


# -- rewards that recipes name ----------------------------------------------------------------------------------------


def digits(completions: list[str], **_: Any) -> list[float]:
    """The share of digits among the characters."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


INTERRUPT_IN_ROLLOUT = [0, 0]  # the rollout batch whose reward presses Ctrl-C (0: none), and how many have been scored


def digits_then_interrupt(completions: list[str], **more: Any) -> list[float]:
    """As `digits`; in one rollout batch somebody presses Ctrl-C."""
    INTERRUPT_IN_ROLLOUT[1] += 1
    if INTERRUPT_IN_ROLLOUT[0] == INTERRUPT_IN_ROLLOUT[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return digits(completions)


def much_memory(completions: list[str], **_: Any) -> list[float]:
    """Asks for more memory than any machine has."""
    return torch.empty(1 << 60).tolist()
