"""What TRL's own tests of its trainer exercise, on runs with an internal phase: images, tools, streams, callbacks."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import EarlyStoppingCallback, HfArgumentParser, PreTrainedTokenizerFast

from bupo import BuPOConfig, BuPOTrainer, Lens
from bupo.errors import ConfigError
from bupo.train.diagnostics import choose_layer
from bupo.train.images import choose_rows, image_inputs
from bupo.train.schedule import Phase
from tests.support.tiny import tiny_model
from tests.support.training import DEFAULTS, Recorder, config, even_share, moved, phases, prompts, tiny_tokenizer
from tests.support.vision import image_prompts, processor, vision_model
from tests.support.zoo_checks import layer_list

FIELDS = ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids")


def vision_trainer(folder: Any, family: str, kind: type = BuPOTrainer, **changes: Any) -> Any:
    more = {"processing_class": processor(family), "train_dataset": image_prompts()}
    settings = config(folder, **{"internal_steps": 1, "max_steps": 4, **changes})
    return kind(vision_model(family, spread=3.0), even_share, settings, **more)


def logps_of(model: Any, inputs: Any, layer: int) -> torch.Tensor:
    """log pi^l of the responses, from a hook on an ordinary forward with the images."""
    states: list[Any] = []
    hook = layer_list(model)[layer - 1].register_forward_hook(lambda m, i, out: states.append(out))
    ids, mask = (torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))
    model.base_model(input_ids=ids, attention_mask=mask, **{n: inputs[n] for n in FIELDS if n in inputs})
    hook.remove()
    state = states[0][0] if isinstance(states[0], tuple) else states[0]
    logits = (state @ model.get_output_embeddings().weight.T)[:, inputs["prompt_ids"].size(1) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
def test_internal_phases_of_vision_language_models(tmp_path, family):
    run = vision_trainer(tmp_path, family, Recorder)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    drift, checked = [], []

    def check(batch: Any, rollout: int) -> None:
        phase = Phase(2, 1)
        whole, entropies = run.score(batch, phase, compute_entropy=True)
        rows = [13, 0, 5]  # of three prompts, whose images differ and may have several rows of pixels each
        torch.testing.assert_close(run.score(choose_rows(batch, rows), phase)[0], whole[rows])
        saved = io.BytesIO()
        torch.save(run.monitor.state_dict(), saved)
        run.monitor.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))  # as a resumed run does
        mask = batch["completion_mask"]
        mean = ((entropies * mask).sum() / mask.sum()).item()
        choice = choose_layer(run.model, batch, run.accelerator)  # as for internal_layer: auto
        checked.extend([choice.analysis["sites"]["layer_out"][1], mean])

    run.on_rollout.append(check)
    run.train()
    for model, inputs, _, scored in run.seen:
        mask = inputs["completion_mask"]
        torch.testing.assert_close(scored * mask, logps_of(model, inputs, 2) * mask, rtol=1e-4, atol=1e-4)
        drift.append(((scored - inputs["old_per_token_logps"]) * mask).abs().max().item())
    assert drift[0] < 1e-5 < drift[3]
    assert checked[0] == pytest.approx(checked[1], abs=1e-4)
    named = dict(run.model.named_parameters())
    changed = moved(before, named)
    above = {id(p) for layer in layer_list(run.model)[2:] for p in layer.parameters()}
    assert not [name for name in changed if id(named[name]) in above]
    assert any("visual" in name or "vision" in name for name in changed)
    assert ["internal/divergence" in row for row in run.state.log_history if "phase" in row] == [True]


def test_the_critic_sees_the_images(tmp_path):
    run = vision_trainer(tmp_path, "qwen2_vl", estimator="ppo")
    seen = []

    def check(batch: Any, rollout: int) -> None:
        values = run.critic.values(batch)  # after the critic's first updates
        torch.testing.assert_close(run.critic.values(batch, slice(5, 9)), values[5:9])
        seen.append((run.critic.values({**batch, "pixel_values": -batch["pixel_values"]}) - values).abs().max().item())

    run.on_rollout.append(check)
    run.train()
    assert seen[0] > 1e-4


def test_a_lens_is_fitted_on_responses_to_images(tmp_path, monkeypatch):
    run = vision_trainer(tmp_path, "qwen2_vl", internal_lens="ridge", internal_lens_tokens=60)
    same = {"prompt": [[{"role": "user", "content": "w5"}]] * 8, "image": image_prompts(8)["image"]}
    run.train_dataset, rows = Dataset.from_dict(same), []  # prompts that differ in their images only
    monkeypatch.setattr(Lens, "fit", lambda model, responses, **_: rows.extend(responses) or Lens.identity())
    run.lens.before_rollout([run.train_dataset[i] for i in range(8)])
    monkeypatch.undo()
    batch = run._generate_and_score_completions([run.train_dataset[int(row["problem_id"])] for row in rows])
    for number, row in enumerate(rows):
        made, expected = row["image_inputs"], image_inputs(batch, number)
        torch.testing.assert_close(made["pixel_values"], expected["pixel_values"])
        assert torch.equal(made["image_grid_thw"], expected["image_grid_thw"])
        length = len(row["prompt_ids"]) + len(row["response_ids"]) - 1
        assert made["mm_token_type_ids"][0].nonzero().tolist() == expected["mm_token_type_ids"][0].nonzero().tolist()
        assert made["mm_token_type_ids"].shape == (1, length)
    assert Lens.fit(run.model, rows).card["responses"] == len(rows)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen-3's marks and chat template, whose tool calls TRL can read; tokens are what often occurs in the template."""
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    more = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": special, "show_progress": False}
    inner.train_from_iterator([template], trainers.BpeTrainer(vocab_size=500, **more))
    inner.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])
    named = {"pad_token": special[0], "eos_token": special[2], "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **named)


def add(step: int) -> int:
    """Adds one to a number.

    Args:
        step: The number.
    """
    return step + 1


class Counter:
    """Counts on request."""

    def reset(self, **_: Any) -> None:
        self.total = 0

    def add(self, step: int) -> int:
        """Adds to the counter.

        Args:
            step: The number to add.
        """
        self.total += step
        return self.total


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("more", [{"tools": [add]}, {"environment_factory": Counter}], ids=["tools", "environments"])
def test_tools_and_environments_in_an_internal_phase(tmp_path, more, monkeypatch):
    tokenizer = chat_tokenizer()
    call = '<tool_call>\n{"name": "add", "arguments": {"step": 2}}\n</tool_call><|im_end|>'
    called, idle, done = (tokenizer(t)["input_ids"] for t in (call, "I know no tool.<|im_end|>", "Done!<|im_end|>"))

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:  # every other response calls the tool
        n = len(input_ids)
        rows = [called if i % 2 else idle for i in range(n)] if n == 4 else [done] * n
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in rows])], dim=1)

    text = [[{"role": "user", "content": f"What comes after {i}?"}] for i in range(8)]
    batch = {"per_device_train_batch_size": 2, "num_generations": 2, "updates_per_rollout": 2}
    run = Recorder(
        tiny_model("qwen3", vocab_size=len(tokenizer), bos_token_id=None, max_position_embeddings=1024),
        lambda completions, **_: [float(len(messages)) for messages in completions],
        config(tmp_path, internal_steps=1, max_steps=4, max_completion_length=60, **batch),
        Dataset.from_dict({"prompt": text}),
        processing_class=tokenizer,
        **more,
    )
    monkeypatch.setattr(run.model, "generate", generate)
    run.train()
    log = [row for row in run.state.log_history if "phase" in row]
    kept = ("phase", "tools/call_frequency", "tools/failure_frequency")
    assert [[row[name] for name in kept] for row in log] == [[1.0, 0.5, 0.0], [2.0, 0.5, 0.0]]
    _, inputs, _, _ = run.seen[0]  # its order is shuffled
    masked = (inputs["completion_mask"] - inputs["completion_mask"] * inputs["tool_mask"]).sum(dim=1)
    with_call = inputs["completion_mask"].sum(dim=1) > len(idle)
    assert torch.equal(masked > 0, with_call)
    if "environment_factory" in more:
        assert sorted(environment.total for environment in run.environments) == [0] * 2 + [2] * 2
        with pytest.raises(ConfigError, match="internal_lens ridge samples its responses without environments"):
            Recorder(run.model, run.reward_funcs, config(tmp_path, internal_steps=1, internal_lens="ridge"),
                     run.train_dataset, processing_class=tokenizer, **more)  # fmt: skip


def test_a_stream_evaluation_the_best_model_callbacks_and_the_card(tmp_path):
    """With settings from a parser, and arguments by position, as TRL's trainer takes them."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "eval_on_start": True}
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    settings = {**DEFAULTS, "output_dir": str(tmp_path), "internal_steps": 2, "max_steps": 12, **best, **every}
    (args,) = HfArgumentParser(BuPOConfig).parse_dict({**settings, "per_device_eval_batch_size": 4})
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)  # after the first that fails
    evaluated = prompts(4).to_iterable_dataset()
    run = BuPOTrainer(tiny_model(), even_share, args, prompts().to_iterable_dataset(), evaluated, tiny_tokenizer(),
                      None, [stop])  # fmt: skip
    run.train()
    rewards = {row["step"]: row["eval_reward"] for row in run.state.log_history if "eval_reward" in row}
    assert 0 in rewards
    assert run.state.best_metric == max(reward for step, reward in rewards.items() if step)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{run.state.best_global_step}")
    assert run.state.global_step == 8
    assert phases(run) == [1.0, 1.0]
    run.create_model_card(model_name="mine", dataset_name="words", tags=["extra"])
    card = (tmp_path / "README.md").read_text()
    assert all(
        part in card
        for part in ("- bupo", "- trl", "- extra", "trained with BuPO", "papers/2512.19673", "@article{tan2025bupo")
    )
