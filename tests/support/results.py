"""Small result files of every kind that a report reads, and the hostile text that must not escape on its page."""

import json
import math
from pathlib import Path
from typing import Any

from bupo.evaluate.metrics import task_results
from bupo.report.evaluations import compare_evaluations
from bupo.report.logs import TrainingRun
from bupo.report.page import ReportData
from bupo.report.results import Analysis, Evaluation, ExploredTokens, SampledResponse

HOSTILE = '</script><script>document.title="owned"</script><img src="http://example.invalid/x.png" onerror=alert(1)>'
TOKENS = ["</script><script>window.owned = 1</script>", "<!--<script>", "<img src=x onerror='window.owned=1'>",
          "\u2028", "\u202eright to left", "\ud800", "plain"]  # fmt: skip


def analysis(layers: int = 6, boundary: int | None = 2, **more) -> dict[str, Any]:
    """The content of ``analysis.json`` with the three regions."""
    wave, errors = [math.sin(i / 2) for i in range(layers)], [0.05] * layers
    return {
        "schema": 1, "model": "tiny", "layers": layers, "vocabulary": 97, "tokens": 120, "samples": 4,
        "dtype": "float32", "final_entropy": 0.7,
        "sites": {f"{m}_{end}": [2 + w for w in wave] for m in ("attn", "ffn", "layer") for end in ("in", "out")},
        "standard_errors": dict.fromkeys(("attn_out", "ffn_out", "layer_out"), errors),
        "entropy_change": dict.fromkeys(("attn", "ffn", "layer"), wave),
        "entropy_change_standard_errors": dict.fromkeys(("attn", "ffn", "layer"), errors),
        "residual_cosine": {"attn": wave, "ffn": [-w for w in wave]},
        "regions": {"exploration": [1, 2] if boundary else None, "integration": [3, 4] if boundary else None,
                    "convergence": [5 if boundary else 1, layers]},
        "boundary_layer": boundary,
        "boundary_reason": "last positive change" if boundary else "the change is negative in every layer",
        **more,
    }  # fmt: skip


def layer_choice(layers: int = 6, knee: int | None = 3, **more) -> dict[str, Any]:
    """A ``layer_choice`` block whose curves all differ."""
    rising = [round(0.1 + 0.9 * i / layers, 3) for i in range(1, layers + 1)]
    kl = [round(3 - 2.9 * r, 3) for r in rising]
    curves = {
        lens: {"entropy": [f * v for v in kl], "kl": [v / f for v in kl], "top1": [r / f for r in rising],
               "recovered": [r / f - 0.1 for r in rising], "change": [None, *kl[1:]]}
        for lens, f in (("raw", 1.5), ("norm", 1.0), ("ridge", 0.9), ("other/lens", 0.8))
    }  # fmt: skip
    found = {"layer": knee, "reason": "it turns there", "standard_error": 0.4 if knee else None}
    errors = {lens: {kind: [0.01] * layers for kind in kinds} for lens, kinds in curves.items()}
    knees = {"norm": {**found, "layer": 4}, "ridge": found} if knee else {}
    return {"tokens": 40, "responses": 4, "seed": 0, "curves": curves, "knees": knees,
            "standard_errors": errors, **more}  # fmt: skip


def log(internal: int = 0, rollouts: int = 10, phase: str = "internal") -> list[dict[str, Any]]:
    """Rows of ``log.jsonl``, the first ``internal`` of them before the switch to the full policy."""
    return [
        {"step": 4 * n, "rollout": n, "phase": phase if inside else "full", "layer": 3 if inside else None,
         "reward": n / rollouts, "entropy": 1 / n, "internal_entropy": 2.0 if inside else None, "mean_length": 20.0,
         "loss": 0.0, "seconds": 2.0 * n, f"{'internal/' * inside}clip_ratio/region_mean": 0.01}
        for n in range(1, rollouts + 1) for inside in [n <= internal]
    ]  # fmt: skip


def sampled(text: str = "a", rollout: int = 1, groups: int = 2) -> list[dict[str, Any]]:
    """Rows of ``rollouts/rollout-*.jsonl``: groups of three responses, the last one without a reward."""
    return [
        {"rollout": rollout, "phase": "internal", "layer": 3, "group": group, "prompt": f"prompt {group} {text}",
         "response": f"{text} {i}", "reward": reward, "advantage": advantage, "length": 10 + i, "cut_off": i == 1}
        for group in range(groups) for i, (reward, advantage) in enumerate([(0.0, -0.7), (1.0, 0.7), (None, 0.0)])
    ]  # fmt: skip


def results(right: int, problems: int = 40, samples: int = 4, task: str = "sums") -> dict[str, Any]:
    """The content of ``results.json``; ``right`` (0 to 10) moves the accuracy of all problems."""
    rows = [
        {"problem_id": f"{task}/{p}", "reward": float(ok), "status": "correct" if ok else "wrong", "length": 20,
         "finished": True}
        for p in range(problems) for s in range(samples) for ok in [(7 * p + 3 * s) % 11 < right]
    ]  # fmt: skip
    return {"schema": 1, "model": "tiny", "tasks": {task: task_results(rows, k=samples)}}


def evaluations(**right: int) -> list[tuple[str, Evaluation]]:
    """Named evaluations, for instance ``evaluations(grpo=4, bupo=8)``."""
    return [(name.replace("_", "-"), Evaluation.parse(results(n))) for name, n in right.items()]


def explored(tokens: list[str], layers: int = 5) -> dict[str, Any]:
    """``tokens.json``: entropy grows with layer and token, so that every cell has a value of its own."""
    over, t = range(1, layers + 1), range(len(tokens))
    sample = {
        "problem_id": "sums/1", "prompt": "What is <b>1 + 2</b>? " + tokens[0], "tokens": tokens, "layers": layers,
        "entropy": [[n + i / 10 for i in t] for n in over], "logprob": [[-(n + i) / 4 for i in t] for n in over],
        "kl": [[None if i == 0 else (layers - n) * 0.5 for i in t] for n in over],
        "rank": [[float(n * i + 1) for i in t] for n in over],
        "top": [[[[f"first{n}.{i}", 0.625], [tokens[i], 0.25]] for i in t] for n in over],
    }  # fmt: skip
    second = {"problem_id": "sums/2", "prompt": "", "tokens": ["a", "b"], "layers": 2}
    return {"schema": 1, "samples": [sample, {**second, "entropy": [[1.0, 2.0], [3.0, 4.0]]}]}


def everything(name: str = "tiny", tokens: list[str] | None = None) -> ReportData:
    """Results of every kind; text from outside is ``name``."""
    scored = evaluations(start=3, grpo=6, bupo=6)
    record = {"name": name, "command": "eval", "argv": ["eval", name], "config": {"seed": 7},
              "versions": {"python": "3.11"}, "machine": {"cores": 2}, "seconds": 12.5}  # fmt: skip
    response = {"problem_id": name, "prompt": name, "answer": name, "model": "start", "response": name,
                "status": "wrong"}  # fmt: skip
    rows = [SampledResponse.model_validate(row) for row in sampled(name)]
    groups = [rows[:3], rows[3:]]
    return ReportData(
        analyses=[(name, Analysis.parse(analysis(layer_choice=layer_choice())))], evaluations=scored,
        runs=[("grpo", TrainingRun(log())), ("bupo", TrainingRun(log(4), batches=[groups]))],
        notes=[f"a note on {name}"], differences=compare_evaluations(scored)[0], samples={("sums", name): [response]},
        records=["a sentence", record],
        tokens=[("tiny", ExploredTokens.parse(explored(tokens)))] if tokens else [],
    )  # fmt: skip


def write(folder: Path, name: str, value: Any) -> Path:
    """Write a result file (one row per line for ``.jsonl``) and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in value) if name.endswith("l") else json.dumps(value)
    (folder / name).write_text(text)
    return folder
