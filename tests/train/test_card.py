"""The card beside a trained model, and its upload, up to the network."""

import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from bupo.errors import InputError
from bupo.run_folder import describe_run
from bupo.train import card
from bupo.train.build import check_recipe
from bupo.train.paper import PAPER
from bupo.train.trainer import BuPOTrainer
from tests.cli.conftest import bupo  # noqa: F401  (a fixture)
from tests.cli.test_cli_train import recipe  # noqa: F401  (a fixture)

RAW = {"model": "Qwen/Qwen3-4B", "dataset": "arithmetic", "rollouts": 6, "internal_layer": 2, "internal_steps": 3,
       "prompts_per_rollout": 4, "samples_per_prompt": 4, "micro_batch": 4}  # fmt: skip
RESULT = {"rollouts": 6, "updates": 6, "internal_layer": 2, "reward_first": 0.25, "reward_last": 0.5,
          "phase_end": {"rollouts": 2, "action": "keep", "reason": "no transfer"}}  # fmt: skip


def written(folder, log=(), result=RESULT, **changes):
    what = check_recipe({**RAW, **changes})
    record = describe_run("train", what.model_dump(mode="json"), seed=7, result=result)
    (folder / "run" / "model").mkdir(parents=True)
    return what, ModelCard.load(card.write_card(folder / "run" / "model", what, record, log))


def test_the_card_has_method_data_recipe_measurements_and_citation(tmp_path):
    log = [{"step": 3, "eval_reward": 0.1}, {"step": 6, "eval_reward": 0.375}, {"step": 6, "reward": 0.5}]
    what, found = written(tmp_path, log)
    assert found.data.base_model == "Qwen/Qwen3-4B"
    assert found.data.tags == ["bupo", "trl", "grpo"]
    assert found.text.startswith("\n# run\n\nQwen/Qwen3-4B trained with Bottom-up Policy Optimization on arithmetic")
    for words in ("of layer 2. A guard ended this phase after rollout batch 2: no transfer.", "0.25 → 0.5",
                  "- `eval_reward`: 0.375", PAPER["citation"], "| seed | 7 |"):  # fmt: skip
        assert words in found.text
    block = yaml.safe_load(re.search(r"```yaml\n(.*?)```", found.text, re.S)[1])
    assert check_recipe({**RAW, "rollouts": block["rollouts"]}) == what


def test_a_plain_run_of_a_local_model_says_so(tmp_path):
    _, found = written(
        tmp_path, (), RESULT | {"internal_layer": None, "phase_end": None}, model="small", internal_steps=0
    )
    assert found.data.base_model is None
    assert "small trained with GRPO on arithmetic" in found.text
    assert "All rollout batches trained the full policy." in found.text
    assert "no held-out problems" in found.text


def test_an_upload_goes_where_the_settings_say_and_a_failed_one_says_what_to_do(tmp_path, monkeypatch):
    sent = []

    class Hub:
        def __init__(self, token):
            sent.append(token)

        def upload_folder(self, **about):
            sent.append(about)
            if len(sent) > 2:
                raise ConnectionError("no route to the hub")

    monkeypatch.setattr(card, "HfApi", Hub)
    settings = SimpleNamespace(hub_token="t", hub_revision="v2")
    trainer = SimpleNamespace(args=settings, hub_model_id="me/run")
    card.upload(trainer, tmp_path)
    assert sent == ["t", {"repo_id": "me/run", "folder_path": tmp_path, "revision": "v2"}]
    with pytest.raises(InputError, match=rf"is saved, but not uploaded .*no route.*: hf upload me/run {tmp_path}"):
        card.upload(trainer, tmp_path)


def test_a_run_uploads_its_whole_model_once(bupo, recipe, tmp_path, monkeypatch):  # noqa: F811
    sent = []
    monkeypatch.setattr(BuPOTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", self.args.hub_model_id))
    monkeypatch.setattr(card, "HfApi", lambda token: SimpleNamespace(upload_folder=lambda **about: sent.append(about)))
    code, _, problem = bupo("train", recipe(), "--output", tmp_path / "mine", "--set", "push_to_hub=true")
    assert code == 0, problem
    assert sent == [{"repo_id": "mine", "folder_path": tmp_path / "mine" / "model", "revision": None}]
    assert {"README.md", "config.json", "model.safetensors"} <= {p.name for p in sent[0]["folder_path"].iterdir()}
