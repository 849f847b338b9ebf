r"""Makes a fair instrument of SmolLM2-135M: sums of which it solves some, neither none nor most, before training.

Run ``make smollm2``, then (the time on one core is in what it writes)::

    OMP_NUM_THREADS=1 python -m experiments.warm_smollm2 --out models/smollm2-warm

It writes the task, ``train.jsonl``, ``held-out.jsonl`` (a two-digit number plus or minus a one-digit one) and
``shifted.jsonl`` (three one-digit, or two two-digit numbers), without overlap, and trains the model by supervision
(TRL's trainer) on *other* sums, of the same kind and of two one-digit numbers. It tests the model on sums of
``train.jsonl`` every few updates and stops as soon as a third of its samples are right. ``warm-up.json`` holds the
curve.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bupo.data.grading import Grader
from bupo.data.problems import Problem
from bupo.data.prompts import prompt_ids
from bupo.evaluate.engines import Sampling
from bupo.evaluate.hf_engine import sample
from bupo.run_folder import machine, versions, write_json
from experiments.smollm2_sums import sums, write_rows

ENOUGH, EVERY, TESTED = 1 / 3, 5, 64  # share of right samples, updates between tests, sums in a test


def task(seed: int = 3) -> dict[str, list[dict[str, str]]]:
    """The three sets of the task, and the other sums that the warm-up shows."""
    every = [f"{a} {sign} {b}" for a in range(10, 100) for b in range(1, 10) for sign in "+-"]
    random.Random(seed).shuffle(every)
    answers = {text: int(a) + int(f"{sign}{b}") for text in every for a, sign, b in [text.split()]}
    rows = [{"id": text.replace(" ", ""), "prompt": f"{text} =", "answer": str(answers[text])} for text in every]
    shifted = sums(3, 1, 64, seed + 1) + sums(2, 2, 64, seed + 2)
    other = rows[1216:] + sums(2, 1, 150, seed + 3)
    random.Random(seed).shuffle(other)
    return {"held-out": rows[:256], "train": rows[256:1216], "shifted": shifted, "other": other}


class StopsAtEnough(TrainerCallback):
    """Tests the model every few updates on sums that training will show, and ends the warm-up once enough are right."""

    def __init__(self, tokenizer: Any, rows: list[dict[str, str]]):
        self.tokenizer, self.curve = tokenizer, []
        self.problems = [Problem(row["id"], row["prompt"], row["answer"], "sums") for row in rows]
        self.prompts = [prompt_ids(problem.prompt, tokenizer, "raw") for problem in self.problems]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        if state.global_step % EVERY == 0:
            model.eval()
            found = sample(model, self.tokenizer, self.prompts, Sampling(7, 1.0, 1.0, 0), samples=4, batch_size=256)
            model.train()
            texts = [self.tokenizer.decode(one, skip_special_tokens=True) for four in found for one in four]
            with Grader() as grader:
                grades = grader.grade(texts, [problem for problem in self.problems for _ in range(4)])
            share = sum(grade.reward for grade in grades) / len(grades)
            self.curve.append({"update": state.global_step, "right": round(share, 4)})
            print(f"update {state.global_step}: {share:.1%} of {len(grades)} samples are right", flush=True)
            control.should_training_stop = share >= ENOUGH
        return control


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-warm"))
    out: Path = parser.parse_args().out
    started, sets = time.monotonic(), task()
    for name in ("train", "held-out", "shifted"):
        write_rows(out / "sums" / f"{name}.jsonl", sets[name])
    model = AutoModelForCausalLM.from_pretrained("models/smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("models/smollm2")
    rows = [{"prompt": row["prompt"], "completion": f" \\boxed{{{row['answer']}}}"} for row in sets["other"]]
    settings = SFTConfig(
        output_dir=str(out / "checkpoints"), max_steps=200, per_device_train_batch_size=32, learning_rate=1e-4,
        warmup_steps=5, lr_scheduler_type="constant_with_warmup", save_strategy="no", report_to=[], seed=0, bf16=False,
        gradient_checkpointing=False, logging_steps=EVERY, disable_tqdm=True,
    )  # fmt: skip
    stops = StopsAtEnough(tokenizer, sets["train"][:TESTED])
    trainer = SFTTrainer(
        model, settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[stops]
    )
    trainer.train()
    if stops.curve[-1]["right"] < ENOUGH:
        raise SystemExit(f"after {settings.max_steps} updates only {stops.curve[-1]['right']:.1%} are right")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"machine": machine(), "versions": versions(), "seconds": round(time.monotonic() - started)}
    shown = {"samples": TESTED * 4, "learning_rate": settings.learning_rate, "batch": 32, "seed": settings.seed}
    write_json(out / "warm-up.json", {**shown, "curve": stops.curve, **facts})
    print(json.dumps(stops.curve[-1]), f"model in {out}")


if __name__ == "__main__":
    main()
