"""`bupo doctor`: its checks pass here, and find what is wrong."""

import json

import torch

from bupo.cli import main
from bupo.lens import selftest
from bupo.models import internal_policy


def test_every_check_passes_here_and_is_reported(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["checks"]) == 2 * len(selftest.LAYOUTS) + 2
    assert all(check["passed"] and check["deviation"] < selftest.TOLERANCE for check in found["checks"])
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"


def test_wrong_readings_and_errors_are_found(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "LAYOUTS", ("qwen3",))
    right = internal_policy.internal_policy
    monkeypatch.setattr(selftest, "internal_policy", lambda model, layer, **how: right(model, min(layer + 1, 3), **how))
    monkeypatch.setattr(selftest, "residual_group_stats", lambda *arguments: torch.ones(2, 3) @ torch.ones(4, 5))
    assert main(["doctor", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAILED") == 4
    assert "RuntimeError: mat1 and mat2" in text


def test_a_device_that_is_not_there_is_one_line(capsys):
    for device in ("nodev", "cuda:99"):
        assert main(["doctor", "--device", device]) == 2
        assert capsys.readouterr().err == (
            f"bupo: error: device {device!r} cannot be used here; leave out --device, or name one that can\n"
        )
