r"""Pretrains the small model that ships in the package: a character-level language model of step-by-step arithmetic.

Run (22 minutes on one core of a busy machine)::

    OMP_NUM_THREADS=1 python -m experiments.pretrain_small --out src/bupo/assets/small

The text is generated from the train split of ``bupo.data.arithmetic``: sums, differences, products, two-step and a few
three-step problems. A share of the longer ones omits the working, so that the model omits it as often and then mostly
fails, which leaves room for reinforcement learning.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import string
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from bupo.data.arithmetic import draw, problems, split_of
from bupo.run_folder import machine, versions, write_text

BOXED = "\\boxed{"


def build_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token per printable ASCII character and newline, and one for ``\boxed{``."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = [c for c in string.printable if c not in "\t\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate([*special, *characters, BOXED])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        padding_side="left",
    )


def build_model(arch: str, tied: bool, size: int, layers: int, width: int) -> torch.nn.Module:
    config = AutoConfig.for_model(
        arch,
        vocab_size=size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_theta=10_000.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def working(prompt: str) -> list[str]:
    """Return the lines that solve ``(a+b)*c=``, ``(a-b)*c=`` or ``(a+b)*c-d=``."""
    parts = re.fullmatch(r"\((\d+)([+-])(\d+)\)\*(\d+)(?:-(\d+))?=", prompt)
    a, sign, b, c, d = parts.groups()
    inner = int(a) + int(b) if sign == "+" else int(a) - int(b)
    product = inner * int(c)
    lines = [f"{a}{sign}{b}={inner}", f"{inner}*{c}={product}"]
    return [*lines, f"{product}-{d}={product - int(d)}"] if d else lines


def example(generator: random.Random, left_out: float) -> tuple[str, str]:
    """Draw a prompt and a response of the mixture."""
    kind = generator.random()
    if kind < 0.7:
        prompt, answer = draw(generator, "train", "standard" if kind < 0.6 else "hard")
        steps = working(prompt) if generator.random() >= left_out else []
        return prompt + "\n", "\n".join([*steps, f"{BOXED}{answer}}}"])
    a, b, c = generator.randint(10, 198), generator.randint(10, 99), generator.randint(2, 9)
    prompt, answer = [(f"{a}+{b}=", a + b), (f"{max(a, b)}-{min(a, b)}=", abs(a - b)), (f"{a}*{c}=", a * c)][
        generator.randrange(3)
    ]
    return prompt + "\n", f"{prompt}{answer}\n{BOXED}{answer}}}"


def batch(generator: random.Random, tokenizer, size: int, left_out: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [example(generator, left_out) for _ in range(size)]
    ids = tokenizer([p + r for p, r in rows], add_special_tokens=False)["input_ids"]
    width = max(map(len, ids)) + 1
    padded = torch.tensor([[*row, 2] + [0] * (width - len(row) - 1) for row in ids])
    length = torch.tensor([len(row) + 1 for row in ids])
    labels = padded.masked_fill(torch.arange(width)[None] >= length[:, None], -100)
    return padded, labels


@torch.no_grad()
def accuracy(model, tokenizer, n: int, split: str, seed: int, level: str = "standard") -> tuple[float, float]:
    """Sample once per problem; returns the share solved and the share that shows its working."""
    model.eval()
    torch.manual_seed(seed)
    rows = problems(n, seed=seed, split=split, level=level)
    inputs = tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=40,
    )
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    right = sum(t.endswith(f"{BOXED}{r['answer']}}}") for t, r in zip(texts, rows, strict=True))
    return right / n, sum("=" in t for t in texts) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", choices=["qwen3", "llama"], default="qwen3")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the unembedding")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--updates", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--left-out", type=float, default=0.35, help="share of longer problems without working")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(args.arch, args.tied, len(tokenizer), args.layers, args.width)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.arch}, {parameters:,} parameters, vocabulary {len(tokenizer)}", flush=True)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )

    def rate(update: int) -> float:
        warm = min(1.0, (update + 1) / 100)
        return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * update / args.updates)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, history = time.monotonic(), []
    model.train()
    for update in range(1, args.updates + 1):
        ids, labels = batch(generator, tokenizer, args.batch, args.left_out)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if update % 100 == 0 or update == args.updates:
            solved, working = accuracy(model, tokenizer, 128, "train", seed=1)
            history.append({"update": update, "loss": round(loss.item(), 4), "solved": solved, "working": working})
            print(f"{time.monotonic() - started:5.0f} s  {json.dumps(history[-1])}", flush=True)

    model.eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    solved, working = accuracy(model, tokenizer, 512, "test", seed=2)
    hard, _ = accuracy(model, tokenizer, 512, "test", seed=2, level="hard")
    assert all(split_of(r["prompt"].strip()) == "test" for r in problems(512, seed=2, split="test"))
    figures = {
        "parameters": parameters,
        "seconds": round(time.monotonic() - started),
        "test_solved": round(solved, 4),
        "test_solved_hard": round(hard, 4),
        "shows_working": round(working, 4),
        "sampled_problems": 512,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"},
        "versions": versions(),
        "machine": machine(),
        "history": history,
    }
    write_text(args.out / "pretraining.json", json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: figures[k] for k in ("parameters", "seconds", "test_solved", "test_solved_hard")}))


if __name__ == "__main__":
    main()
