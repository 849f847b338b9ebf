"""`bupo analyze` as a user runs it, in process: results, refusals (one clear line, exit code 2, nothing written)."""

import errno
import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoTokenizer

from bupo.cli import main
from bupo.errors import InputError
from bupo.lens.analyze import analyze_rollouts
from bupo.models.load import SMALL_MODEL
from tests.support import distributed
from tests.support.processes import launch
from tests.support.tiny import tiny_model

SMALL = ("analyze", "--model", "small")


def test_from_responses_with_statistics_and_every_token(bupo, tmp_path, responses):
    folder = tmp_path / "out"
    command = (*SMALL, "--responses", responses, "--output", folder)
    options = ("--statistics", "logprob,rank,kl,varentropy,top2", "--per-token", "--max-tokens", "6")
    code, out, _ = bupo(*command, *options)
    assert code == 0
    assert "read 6 of 6 response tokens" in " ".join(out.split())
    result = json.loads((folder / "analysis.json").read_text())
    assert (result["schema"], result["samples"], result["tokens"]) == (1, 2, 6)
    for figure in ("entropy_flow", "entropy_change", "residual_cosine"):
        assert (folder / f"{figure}.svg").exists()
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "run.json").read_text())
    assert (record["command"], record["config"]["seed"]) == ("analyze", 0)
    assert "transformers" in record["versions"]
    table = parquet.read_table(folder / "per_token.parquet").to_pylist()
    assert len(table) == 6 * 8 * 6  # tokens, layers, sites
    read = {(1, 1, 8), (1, 2, 9), (1, 3, 10), (1, 4, 11), (2, 1, 9), (2, 2, 2)}
    assert {(r["response"], r["position"], r["token"]) for r in table} == read
    for site in ("attn_in", "layer_in", "layer_out"):
        cells = [r for r in table if r["site"] == site and r["layer"] == 3]
        for name, means in (("entropy", result["sites"]), ("kl", result["statistics"]["kl"])):
            assert means[site][2] == pytest.approx(sum(r[name] for r in cells) / 6, abs=1e-4)
        assert all(len(r["top"]) == 2 and r["top_probability"][0] >= r["top_probability"][1] for r in cells)
        assert all(r["rank"] > 2 or r["top"][r["rank"] - 1] == r["token"] for r in cells)
    before = (folder / "run.json").read_text()
    code, _, err = bupo(*command)
    assert code == 2
    assert "--overwrite" in err
    assert (folder / "run.json").read_text() == before
    code, out, _ = bupo(*command, "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["boundary_layer"] == json.loads((folder / "analysis.json").read_text())["boundary_layer"]
    assert not (folder / "per_token.parquet").exists()  # nothing is left of the run that was replaced


def test_own_responses_are_kept_repeatable_and_explored(bupo, tmp_path):
    """As in the help: the context of the shipped model is shorter than the longest response by default."""
    for name, more in (("a", ["--explore", 1]), ("b", [])):
        code, out, _ = bupo(*SMALL, "--dataset", "arithmetic", "--limit", 3, "--output", tmp_path / name, *more)
        assert code == 0
        assert "boundary layer" in out
    assert (tmp_path / "a" / "analysis.json").read_text() == (tmp_path / "b" / "analysis.json").read_text()
    kept = tmp_path / "a" / "responses.jsonl"
    assert len(kept.read_text().splitlines()) == 3
    assert bupo(*SMALL, "--responses", kept, "--output", tmp_path / "c")[0] == 0
    again, direct = (json.loads((tmp_path / n / "analysis.json").read_text()) for n in ("c", "a"))
    assert again["sites"] == direct["sites"]
    (sample,) = json.loads((tmp_path / "a" / "tokens.json").read_text())["samples"]
    assert sample["layers"] == 8
    for key in ("entropy", "logprob", "kl", "rank", "top"):
        assert [len(row) for row in sample[key]] == [len(sample["tokens"])] * 8
    assert all(rank >= 1 for row in sample["rank"] for rank in row)
    assert bupo("report", tmp_path / "a", "--output", tmp_path / "r.html")[0] == 0
    assert "<canvas" in (tmp_path / "r.html").read_text()


@pytest.mark.slow
def test_processes_with_a_device_give_one_process_s_result(bupo, tmp_path, responses):
    arguments = ["--model", "small", "--responses", responses, "--device", "cpu", "--statistics", "kl,rank", "--output"]
    launch(2, distributed.command, tmp_path / "a", subcommand="analyze", arguments=[*arguments, tmp_path / "two"])
    assert bupo("analyze", *arguments, tmp_path / "one")[0] == 0
    one, two = (json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("one", "two"))
    assert two["tokens"] == one["tokens"]
    read = ([result["sites"], result["standard_errors"], *result["statistics"].values()] for result in (two, one))
    for found, wanted in zip(*read, strict=True):
        assert found.keys() == wanted.keys()
        assert all(found[site] == pytest.approx(wanted[site], abs=1e-5) for site in wanted)


def test_a_launcher_is_refused_where_its_processes_would_meet(refused, tmp_path, responses, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_device = (*SMALL, "--responses", responses, "--device", "cuda:0")
    assert "names one device for 2 processes; write cuda" in refused(*one_device, output=tmp_path / "o")
    for command, remedy in (
        (("eval", "--model", "small"), "start one process per GPU with --shard 1/n to n/n"),
        (("compare", "small", "a=small", "--responses", responses), "start it without a launcher"),
    ):
        line = refused(*command, output=tmp_path / "o")
        assert line.endswith(f"bupo {command[0]} runs in one process, but the launcher started 2; {remedy}")


def test_ctrl_c_and_a_full_disk_are_one_line(bupo, tmp_path, responses, monkeypatch):
    command = (*SMALL, "--responses", responses, "--output", tmp_path / "o")
    for target, error, code, told in (
        ("run_folder.write_bytes", OSError(errno.ENOSPC, "No space left on device"), 2,
         "bupo: error: No space left on device"),
        ("lens.analyze.analyze_rollouts", KeyboardInterrupt(), 130,
         "bupo: interrupted. Nothing was written; the same command starts again from the beginning."),
    ):  # fmt: skip

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"bupo.{target}", fail)
            found, _, err = bupo(*command)
        assert (found, err.splitlines()[-1]) == (code, told)
        assert not list(tmp_path.glob("o/*"))


def test_nothing_is_left_of_a_result_that_json_cannot_hold(bupo, tmp_path, responses, monkeypatch):
    def broken(*args, **kwargs):
        return {**analyze_rollouts(*args, **kwargs), "final_entropy": float("nan")}

    monkeypatch.setattr("bupo.lens.analyze.analyze_rollouts", broken)
    with pytest.raises(ValueError, match="JSON compliant"):
        bupo(*SMALL, "--responses", responses, "--output", tmp_path / "o")
    assert not list(tmp_path.glob("o/*"))


def test_an_output_that_cannot_be_written_is_found_first(bupo, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place, words in (("/proc/bupo", "in /proc"), (file / "o", f"Not a directory in {file}")):
        code, out, err = bupo(*SMALL, "--responses", file, "--output", place)
        assert (code, out) == (2, "")
        assert f"bupo: error: output folder {place} cannot be written: " in err
        assert err.endswith(f"{words}\n")


GOOD = '{"prompt_ids": [3], "response_ids": [4]}'
R = ["--responses", "r.jsonl"]


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        (GOOD, ["--model", "./nowhere", *R], "does not exist"),
        (GOOD, ["--model", "no-org/no-model", *R], "no-org/no-model"),
        (None, R, "does not exist"),
        ("", R, "empty"),
        ('{"colour": "red"}', ["--dataset", "r.jsonl"], "colour"),
        (None, [], "--dataset"),
        (None, ["--dataset", "arithmetic", "--max-new-tokens", "200"], "context of 128"),
        ("", ["--dataset", "arithmetic", *R], "not both"),
        ('{"prompt_ids": [3], "response_ids": [4000]}', R, "vocabulary"),
        ('{"prompt": "1+1="}', R, "response"),
        ("", [*R, "--statistics", "logprob,entropie"], "unknown statistic 'entropie'"),
        ("", [*R, "--template", "chatml"], "unknown template 'chatml'"),
        ("", [*R, "--choice-tokens", "9", "--no-choice"], "no effect with --no-choice"),
    ],
)
def test_wrong_input_is_refused(refused, tmp_path, monkeypatch, file, options, words):
    monkeypatch.chdir(tmp_path)
    if file is not None:
        Path("r.jsonl").write_text(file + "\n" * bool(file))
    assert words in refused(*SMALL, *options, output=tmp_path / "o")
    assert not list(tmp_path.glob(".per_token*"))


def test_models_that_cannot_be_read_are_refused(refused, tmp_path, responses):
    model = tiny_model(vocab_size=101)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(SMALL_MODEL).save_pretrained(tmp_path / "nan")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen3"}')
    for folder, words in (("nan", "non-finite"), ("empty", "config.json"), ("bare", "bupo: error")):
        command = ("analyze", "--model", tmp_path / folder, "--responses", responses)
        assert words in refused(*command, output=tmp_path / "o")


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("analyze", ["--temperature", "0.5"], "--responses takes no --temperature: no responses are generated"),
        ("lens fit", ["--samples", "1"], "--responses takes no --samples"),  # also where the value is the default
        ("lens load x", ["--revision", "main"], "takes no --revision: it is not on the hub"),
    ],
)
def test_options_without_effect_are_refused(tiny_folder, responses, tmp_path, refused, command, option, words):
    arguments = [*command.split(), "--model", tiny_folder, "--responses", responses, *option]
    assert words in refused(*arguments, output=tmp_path / "o")


def test_a_file_has_no_splits(tiny_folder, tmp_path, refused):
    (tmp_path / "q.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
    arguments = ("analyze", "--model", tiny_folder, "--dataset", tmp_path / "q.jsonl", "--split", "train")
    assert "takes no --split: it has no splits" in refused(*arguments, output=tmp_path / "o")


@pytest.mark.parametrize("command", ["analyze", "eval", "compare", "demo"])
def test_usage_errors_exit_with_2_before_anything_is_loaded(bupo, tmp_path, command):
    wrong = [("--seed", "-1"), ("--seed", 2**32), ("--seed", 2**70)]
    if command in ("analyze", "eval"):
        wrong += [("--temperature", "inf"), ("--temperature", "nan"), ("--temperature", "-1")]
        wrong += [("--max-new-tokens", "0"), ("--nonsense",)]
        assert bupo(command, "--model", "small")[0] == 2
    required = {"compare": ["a", "b", "--responses", "r.jsonl"], "demo": []}
    arguments = required.get(command, ["--model", "no/model", "--dataset", "arithmetic"])
    for options in wrong:
        code, _, err = bupo(command, *arguments, "--output", tmp_path / "o", *options)
        assert code == 2
        assert options[0] in err
    assert not (tmp_path / "o").exists()


def test_debug_shows_the_traceback_and_ends_at_a_double_dash(bupo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where report.html is not there yet
    with pytest.raises(InputError):
        main(["report", str(tmp_path / "nothing"), "--debug"])
    code, _, err = bupo("report", "--", tmp_path / "nothing", "--debug")
    assert code == 2
    assert "nothing does not exist" in err
