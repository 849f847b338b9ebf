"""`bupo analyze` as a user runs it, in process: results, refusals (one clear line, exit code 2, nothing written)."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from bupo.cli import main
from bupo.errors import InputError
from bupo.models.load import SMALL_MODEL
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Two responses of the shipped model's size, as token ids."""
    path = tmp_path_factory.mktemp("data") / "responses.jsonl"
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}, {"prompt_ids": [7], "response_ids": [9, 2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    code = main(["analyze", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, output, *arguments):
    """The one line of a refusal; checks that nothing was written."""
    code, out, err = run(capsys, *arguments, "--output", output)
    assert code == 2
    assert not output.exists()
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("bupo: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_from_responses(capsys, tmp_path, responses):
    folder = tmp_path / "out"
    code, out, _ = run(capsys, "--model", "small", "--responses", responses, "--output", folder, "--json")
    assert code == 0
    summary = json.loads(out)
    result = json.loads((folder / "analysis.json").read_text())
    assert summary["boundary_layer"] == result["boundary_layer"]
    assert result["schema"] == 1
    assert result["samples"] == 2
    assert result["tokens"] == 6
    names = {p.name for p in folder.iterdir()}
    for figure in ("entropy_flow", "entropy_change", "residual_cosine"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "run.json").read_text())
    assert config["command"] == "analyze"
    assert config["config"]["seed"] == 0
    assert "transformers" in config["versions"]


def test_own_responses_are_generated_kept_and_repeatable(capsys, tmp_path):
    arguments = ("--model", "small", "--dataset", "arithmetic", "--limit", 3, "--max-new-tokens", 12, "--output")
    for name in ("a", "b"):
        code, out, _ = run(capsys, *arguments, tmp_path / name)
        assert code == 0
        assert "boundary layer" in out
    first, second = ((tmp_path / n / "analysis.json").read_text() for n in ("a", "b"))
    assert first == second
    rows = [json.loads(line) for line in (tmp_path / "a" / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    code, _, _ = run(
        capsys, "--model", "small", "--responses", tmp_path / "a" / "responses.jsonl", "--output", tmp_path / "c"
    )
    assert code == 0
    again, direct = (json.loads((tmp_path / n / "analysis.json").read_text()) for n in ("c", "a"))
    assert again["sites"] == direct["sites"]


def test_explored_tokens_reach_the_report(capsys, tmp_path):
    arguments = ("--dataset", "arithmetic", "--limit", 2, "--max-new-tokens", 8, "--explore", 1)
    assert run(capsys, "--model", "small", *arguments, "--output", tmp_path / "a")[0] == 0
    (sample,) = json.loads((tmp_path / "a" / "tokens.json").read_text())["samples"]
    count = len(sample["tokens"])
    assert sample["layers"] == 8
    for key in ("entropy", "logprob", "kl", "rank", "top"):
        assert [len(row) for row in sample[key]] == [count] * 8
    assert all(rank >= 1 for row in sample["rank"] for rank in row)
    assert main(["report", str(tmp_path / "a"), "--output", str(tmp_path / "r.html")]) == 0
    assert "<canvas" in (tmp_path / "r.html").read_text()


def test_a_folder_with_a_run_is_refused_without_overwrite(capsys, tmp_path, responses):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "kept.txt").write_text("mine")
    code, _, err = run(capsys, "--model", "small", "--responses", responses, "--output", folder)
    assert code == 2
    assert "--overwrite" in err
    assert [p.name for p in folder.iterdir()] == ["kept.txt"]
    code, _, _ = run(capsys, "--model", "small", "--responses", responses, "--output", folder, "--overwrite")
    assert code == 0


def test_processes_with_a_device_give_one_process_s_result(warm, capsys, tmp_path, responses):
    arguments = ["--model", "small", "--responses", str(responses), "--device", "cpu", "--output"]
    job = {"processes": 2, "job": "command", "subcommand": "analyze"}
    done = warm.call(
        "distributed:launch", **job, folder=str(tmp_path / "a"), arguments=[*arguments, str(tmp_path / "two")]
    )
    assert done["codes"] == [0, 0], "\n".join(done["told"])
    assert run(capsys, *arguments, tmp_path / "one")[0] == 0
    one, two = (json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("one", "two"))
    assert two["tokens"] == one["tokens"]
    assert two["sites"]["ffn_out"] == pytest.approx(one["sites"]["ffn_out"], abs=1e-6)


def test_a_launcher_refuses_one_device_for_all(capsys, tmp_path, responses, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ("--model", "small", "--responses", responses, "--device", "cuda:0")
    assert "names one device for 2 processes; write cuda" in refused(capsys, tmp_path / "o", *arguments)
    for command in (["eval", "--model", "small"], ["compare", "small", "a=small", "--responses", str(responses)]):
        assert main([*command, "--output", str(tmp_path / "o")]) == 2
        assert "runs in one process, but the launcher started 2" in capsys.readouterr().err


def test_ctrl_c_says_whether_the_command_continues(capsys, tmp_path, responses, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bupo.lens.analyze.analyze_rollouts", interrupt)
    code, _, err = run(capsys, "--model", "small", "--responses", responses, "--output", tmp_path / "o")
    assert code == 130
    assert err.endswith("bupo: interrupted. Nothing was written; the same command starts again from the beginning.\n")
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_one_line(capsys, tmp_path, responses, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bupo.run_folder.write_bytes", full)
    code, _, err = run(capsys, "--model", "small", "--responses", responses, "--output", tmp_path / "o")
    assert code == 2
    assert err.splitlines()[-1] == "bupo: error: No space left on device"


def test_nothing_is_left_of_a_result_that_json_cannot_hold(capsys, tmp_path, responses, monkeypatch):
    from bupo.lens.analyze import analyze_rollouts

    monkeypatch.setattr(
        "bupo.lens.analyze.analyze_rollouts",
        lambda *a, **k: {**analyze_rollouts(*a, **k), "final_entropy": float("nan")},
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        run(capsys, "--model", "small", "--responses", responses, "--output", tmp_path / "o")
    assert not list(tmp_path.glob("o/*"))


R = "r.jsonl"


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ('{"prompt_ids": [3], "response_ids": [4]}', ["--model", "./nowhere", "--responses", R], "does not exist"),
        (
            '{"prompt_ids": [3], "response_ids": [4]}',
            ["--model", "no-org/no-model", "--responses", R],
            "no-org/no-model",
        ),
        (None, ["--responses", R], "does not exist"),
        ("", ["--responses", R], "empty"),
        ('{"colour": "red"}', ["--dataset", R], "colour"),
        (None, [], "--dataset"),
        ("", ["--dataset", "arithmetic", "--responses", R], "not both"),
        ('{"prompt_ids": [3], "response_ids": []}', ["--responses", R], "empty"),
        (json.dumps({"prompt_ids": [3] * 100, "response_ids": [4] * 29}), ["--responses", R], "context of 128"),
        ('{"prompt_ids": [3], "response_ids": [4000]}', ["--responses", R], "vocabulary"),
        ('{"prompt": "1+1="}', ["--responses", R], "response"),
        ("", ["--responses", R, "--statistics", "logprob,entropie"], "unknown statistic 'entropie'"),
        ("", ["--responses", R, "--template", "chatml"], "unknown template 'chatml'"),
        ("", ["--responses", R, "--choice-tokens", "9", "--no-choice"], "no effect with --no-choice"),
    ],
)
def test_wrong_input_is_refused(capsys, tmp_path, monkeypatch, file, options, words):
    monkeypatch.chdir(tmp_path)
    if file is not None:
        Path(R).write_text(file + "\n" * bool(file))
    options = options if "--model" in options else ["--model", "small", *options]
    assert words in refused(capsys, tmp_path / "o", *options)
    assert not list(tmp_path.glob(".per_token*"))


def test_non_finite_weights(capsys, tmp_path, responses):
    from transformers import AutoTokenizer

    model = tiny_model(vocab_size=101)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(SMALL_MODEL).save_pretrained(tmp_path / "broken")
    line = refused(capsys, tmp_path / "o", "--model", tmp_path / "broken", "--responses", responses)
    assert "non-finite" in line


def test_a_model_that_is_no_language_model(capsys, tmp_path, responses):
    folder = tmp_path / "m"
    folder.mkdir()
    assert "config.json" in refused(capsys, tmp_path / "o", "--model", folder, "--responses", responses)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    assert "bupo: error" in refused(capsys, tmp_path / "o", "--model", folder, "--responses", responses)


@pytest.mark.parametrize("value", ["-1", str(2**32), str(2**70)])
@pytest.mark.parametrize("command", ["analyze", "eval", "compare", "demo"])
def test_a_seed_out_of_range_is_a_usage_error(capsys, command, value):
    assert main([command, "--seed", value]) == 2
    assert "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--temperature", "inf"), ("--temperature", "nan"), ("--temperature", "-1"),
                                     ("--max-new-tokens", "0"), ("--nonsense",)])  # fmt: skip
@pytest.mark.parametrize("command", ["analyze", "eval"])
def test_usage_errors_exit_with_2_before_anything_is_loaded(capsys, tmp_path, command, options):
    arguments = ["--model", "no/model", "--dataset", "arithmetic", "--output", str(tmp_path / "o")]
    assert main([command, *arguments, *options]) == 2
    assert options[0] in capsys.readouterr().err
    assert main([command, "--model", "small"]) == 2
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback_and_ends_at_a_double_dash(capsys, tmp_path):
    with pytest.raises(InputError):
        main(["report", str(tmp_path / "nothing"), "--debug"])
    assert main(["report", "--", str(tmp_path / "nothing"), "--debug"]) == 2
    assert "nothing does not exist" in capsys.readouterr().err


def test_statistics_max_tokens_and_every_token(capsys, tmp_path, responses):
    import pyarrow.parquet as parquet

    folder = tmp_path / "out"
    options = ["--statistics", "logprob,rank,kl,varentropy,top2", "--per-token", "--max-tokens", "6"]
    code, out, _ = run(capsys, "--model", "small", "--responses", responses, "--output", folder, *options)
    assert code == 0
    assert "read 6 of 6 response tokens" in " ".join(out.split())
    result = json.loads((folder / "analysis.json").read_text())
    table = parquet.read_table(folder / "per_token.parquet").to_pylist()
    assert len(table) == 6 * 8 * 6  # tokens, layers, sites
    assert sorted({(r["response"], r["position"], r["token"]) for r in table}) == [
        *((1, t + 1, 8 + t) for t in range(4)),
        (2, 1, 9),
        (2, 2, 2),
    ]
    for site in ("attn_in", "layer_in", "layer_out"):
        cells = [r for r in table if r["site"] == site and r["layer"] == 3]
        for name, means in (("entropy", result["sites"]), ("kl", result["statistics"]["kl"])):
            mean = sum(r[name] for r in cells) / 6
            assert means[site][2] == pytest.approx(mean, abs=1e-4)
        assert all(len(r["top"]) == 2 and r["top_probability"][0] >= r["top_probability"][1] for r in cells)
        for r in cells:
            assert r["rank"] > 2 or r["top"][r["rank"] - 1] == r["token"]
    code, _, _ = run(capsys, "--model", "small", "--responses", responses, "--output", folder, "--overwrite")
    assert code == 0
    assert not (folder / "per_token.parquet").exists()  # nothing is left of the run that was replaced


def test_the_example_in_the_help_runs(capsys, tmp_path):
    """The context of the shipped model is shorter than the longest response by default."""
    folder = tmp_path / "out"
    code, out, _ = run(capsys, "--model", "small", "--dataset", "arithmetic", "--limit", "2", "--output", folder)
    assert code == 0, out
