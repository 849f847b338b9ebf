"""Runs bupo in process, as a user does."""

import json

import pytest

from bupo.cli import main


@pytest.fixture
def bupo(capsys):
    """A function of arguments that returns the exit code, standard output and standard error.

    Runs are not tried first, which takes a quarter of a second each, unless ``check`` says so.
    """

    def run(*arguments, check=False):
        untried = ["--no-check"] if arguments[0] == "train" and not check else []
        code = main([*map(str, arguments), *untried])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(bupo):
    """A function of arguments and ``--output`` that returns the one line of a refusal; nothing was written."""

    def run(*arguments, output):
        code, out, err = bupo(*arguments, "--output", output)
        assert (code, out) == (2, "")
        assert not output.exists()
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("bupo: error: ")]
        return line

    return run


@pytest.fixture(scope="session")
def responses(tmp_path_factory):
    """Two responses as token ids."""
    path = tmp_path_factory.mktemp("data") / "responses.jsonl"
    rows = [{"prompt_ids": [5, 6, 7], "response_ids": [8, 9, 10, 11]}, {"prompt_ids": [7], "response_ids": [9, 2]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
