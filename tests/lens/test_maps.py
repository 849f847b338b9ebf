"""Lenses: identities, the least squares fit, saved and published files, and policies read through a lens."""

import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bupo import Lens, internal_policy
from bupo.errors import InputError
from bupo.lens.batching import check_rollouts
from bupo.lens.maps import PLAIN
from bupo.lens.published import load_published
from bupo.lens.readings import read_layers
from bupo.lens.ridge import RidgeSums, sum_states
from tests.support.lens import pairs, random_lens
from tests.support.tiny import tiny_model, tokens

L, D = 4, 32
MODELS = {
    "llama": ("llama", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "softcap": ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 64}),
    "scaled": ("granite", {"logits_scaling": 3.0}),
}


def read(model, ids, layer, component, lens):
    """The definition by an ordinary forward: the map on what the module adds, the final norm, the model's own head."""
    seen = {}
    modules = {"layer": "", "attn": ".self_attn", "ffn": ".mlp"}
    where = model.get_submodule(f"model.layers.{layer - 1}{modules[component]}")
    with torch.no_grad():
        hook = where.register_forward_hook(lambda m, a, out: seen.update(x=out[0] if isinstance(out, tuple) else out))
        model(ids)
        hook.remove()
        state = seen["x"]
        if layer < L:
            bias = lens.biases[layer - 1] if component == "layer" else None
            state = torch.nn.functional.linear(state, lens.maps[layer - 1], bias)
        norm = model.model.norm
        hook = norm.register_forward_pre_hook(lambda m, a: (state,))
        logits = model(ids).logits
        hook.remove()
    return logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("component", ["layer", "attn", "ffn"])
def test_the_policy_through_a_lens_is_its_definition(name, component):
    layout, changes = MODELS[name]
    if component != "layer" and name in ("softcap", "scaled"):
        pytest.skip("what these modules add is normed or scaled first; the zoo tests that")
    model, ids, lens = tiny_model(layout, **changes), tokens(), random_lens()
    for layer in (1, 3, L):
        expected = read(model, ids, layer, component, lens)
        with torch.no_grad(), internal_policy(model, layer, component, lens=lens):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_identities():
    model, ids = tiny_model(), tokens()
    with torch.no_grad():
        whole = model(ids).logits
        for lens in (random_lens(), Lens.identity(), "norm"):
            with internal_policy(model, L, lens=lens):
                torch.testing.assert_close(model(ids).logits, whole)
        for same in ((Lens.identity(), "norm"), (Lens("raw"), "raw")):
            results = []
            for lens in same:
                with internal_policy(model, 2, lens=lens):
                    results.append(model(ids).logits)
            assert torch.equal(*results)
    with pytest.raises(InputError, match="unknown lens 'tuned'"), internal_policy(model, 2, lens="tuned"):
        pass


def test_adapters_are_read_and_trained_through_a_lens():
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, ids, lens = get_peft_model(tiny_model(), lora).eval(), tokens(), random_lens()
    with internal_policy(model, 2, lens=lens):
        logits = model(ids).logits
    logits.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad and re.search("layers.[01].", n)}
    expected = read(model.merge_and_unload(), ids, 2, "layer", lens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_state_and_not_into_the_map(checkpointing):
    model, ids, lens = tiny_model().train(), tokens(), random_lens()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with internal_policy(model, 2, lens=lens):
        model(ids, use_cache=False).logits.log_softmax(-1)[..., 5].mean().backward()
    assert lens.maps.grad is None
    reference = tiny_model().train()
    hidden = reference(ids, output_hidden_states=True).hidden_states[2]
    state = torch.nn.functional.linear(hidden, lens.maps[1], lens.biases[1])
    reference.lm_head(reference.model.norm(state)).log_softmax(-1)[..., 5].mean().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_lens_samples_and_reads_in_bfloat16():
    model, lens = tiny_model().bfloat16(), random_lens()
    with torch.no_grad(), internal_policy(model, 2, lens=lens):
        assert model(tokens()).logits.dtype == torch.bfloat16
        assert model.generate(tokens(1), max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_ridge_recovers_a_linear_network_and_halves_add_up():
    torch.manual_seed(0)
    x, b = torch.randn(3, 200, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    a = torch.randn(3, D, D, dtype=torch.float64)
    y = torch.randn(200, D, dtype=torch.float64)
    x = torch.stack([torch.linalg.solve(a[i], (y - b[i]).T).T for i in range(3)])  # y = A_l x_l + b_l in every layer

    def sums(rows):
        one = torch.ones(len(rows), 1, dtype=torch.float64)
        left = [torch.cat([x[i][rows], one], -1) for i in range(3)]
        return RidgeSums(torch.stack([le.T @ torch.cat([le[:, :-1], y[rows], one], -1) for le in left]))

    maps, biases = sums(torch.arange(200)).solve([1e-12] * 3)
    torch.testing.assert_close(maps, a.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(biases, b.float(), rtol=1e-3, atol=1e-3)
    parts = sums(torch.arange(80)) + sums(torch.arange(80, 200))
    assert parts.tokens == 200
    torch.testing.assert_close(parts.values, sums(torch.arange(200)).values)


def test_sums_are_those_of_the_model():
    model, responses = tiny_model(), check_rollouts(tiny_model(), pairs())
    everything = [range(len(p.response_ids)) for p in responses]
    whole = sum_states(model, responses, everything, range(4), batch_tokens=16)
    halves = [sum_states(model, responses, everything, part) for part in ((0, 2), (1, 3))]
    torch.testing.assert_close(whole.values, (halves[0] + halves[1]).values, rtol=1e-3, atol=1e-4)
    x, y, hidden = 0, 0, []
    hooks = [layer.register_forward_hook(lambda m, a, out: hidden.append(out)) for layer in model.model.layers]
    for pair in responses:
        ids = torch.tensor([[*pair.prompt_ids, *pair.response_ids]])[:, :-1]
        hidden.clear()
        model(ids)
        at = slice(len(pair.prompt_ids) - 1, None)
        x, y = x + hidden[1][0, at].double().sum(0), y + hidden[-1][0, at].double().sum(0)
    for hook in hooks:
        hook.remove()
    assert whole.tokens == sum(map(len, everything))
    torch.testing.assert_close(whole.values[1, -1, :D], x.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.values[1, -1, D:-1], y.detach(), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def fitted():
    return Lens.fit(tiny_model(), pairs([(3, 12)] * 24))


def test_a_fit_reads_held_out_responses_better_than_the_norm_alone(fitted):
    held, factors = fitted.card["held_out"], fitted.card["ridge_factors"]
    assert len(factors) == L - 1
    assert fitted.card["tokens"] == 24 * 12
    curves = held["curves"]
    assert curves["ridge"]["kl"][-1] == curves["norm"]["kl"][-1] == pytest.approx(0, abs=1e-6)
    assert all(a < b for a, b in zip(curves["ridge"]["kl"][:-1], curves["norm"]["kl"][:-1], strict=True))
    with pytest.raises(InputError, match="two or more prompts"):
        Lens.fit(tiny_model(), [([3, 4], [5, 6]), ([3, 4], [7])])


def test_a_fit_on_few_tokens_is_the_norm_at_worst():
    lens = Lens.fit(tiny_model(), pairs([(3, 2)] * 4))
    assert None in lens.card["ridge_factors"]
    layer = lens.card["ridge_factors"].index(None) + 1
    states = torch.randn(5, D)
    assert torch.equal(lens.transport(layer, states), states)


def test_readings_are_the_policies(fitted):
    model, responses = tiny_model(), check_rollouts(tiny_model(), pairs())
    drawn = [range(len(p.response_ids)) for p in responses]
    readings = read_layers(model, responses, drawn, [*PLAIN.values(), fitted])
    for index, lens in enumerate([*PLAIN, fitted]):
        entropies = []
        for pair in responses:
            ids = torch.tensor([[*pair.prompt_ids, *pair.response_ids]])[:, :-1]
            with torch.no_grad(), internal_policy(model, 2, lens=lens):
                logits = model(ids).logits[0, len(pair.prompt_ids) - 1 :]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
        torch.testing.assert_close(readings.values[index, 0, 1].float(), torch.cat(entropies), rtol=1e-4, atol=1e-5)


def test_a_saved_lens_comes_back_and_belongs_to_its_model(fitted, tmp_path):
    fitted.save(tmp_path)
    again = Lens.load(tmp_path)
    assert torch.equal(again.maps, fitted.maps)
    assert torch.equal(again.biases, fitted.biases)
    assert again.card["held_out"] == fitted.card["held_out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.check(tiny_model()) is again
    for other, message in ((tiny_model(num_hidden_layers=3), "4 layers"), (tiny_model("llama"), "Qwen3ForCausalLM")):
        with pytest.raises(InputError, match=message):
            again.check(other)
    again.card.update(model="Qwen/Qwen3-4B", revision="abc")
    with pytest.warns(UserWarning, match=r"made on Qwen/Qwen3-4B \(revision abc\)"):
        again.check(tiny_model())
    (tmp_path / "lens.safetensors").unlink()  # the file is mapped into memory
    (tmp_path / "lens.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="holds no lens"):
        Lens.load(tmp_path)
    again.maps[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        again.complete()


def test_published_lenses_are_read_as_they_are_defined(tmp_path):
    torch.manual_seed(0)
    matrices = {layer: torch.randn(D, D).half() for layer in range(L - 1)}
    torch.save({"J": matrices, "n_prompts": 100, "d_model": D}, tmp_path / "jacobian.pt")
    lens = load_published(str(tmp_path / "jacobian.pt"))
    x = torch.randn(5, D)
    for layer in range(1, L):  # counted from 0 there
        torch.testing.assert_close(lens.transport(layer, x), x @ matrices[layer - 1].float().T)
    assert torch.equal(lens.transport(L, x), x)

    tuned = tmp_path / "tuned"
    tuned.mkdir()
    translators = {f"{i}.{n}": torch.randn(*s) for i in range(L) for n, s in (("weight", (D, D)), ("bias", (D,)))}
    torch.save(translators, tuned / "params.pt")
    config = {"base_model_name_or_path": "gpt2", "d_model": D, "num_hidden_layers": L, "base_model_revision": "main"}
    (tuned / "config.json").write_text(json.dumps(config))
    for source in (tuned, tuned / "params.pt"):
        lens = load_published(str(source))
        for layer in range(1, L):  # translator 0 reads the embedding
            expected = x + x @ translators[f"{layer}.weight"].T + translators[f"{layer}.bias"]
            torch.testing.assert_close(lens.transport(layer, x), expected)
    assert lens.card["model"] == "gpt2"

    for content, message in (({"J": {0: matrices[0], 2: matrices[2]}, "n_prompts": 1}, "not for every layer"),
                             ({"weights": 1}, "holds no published lens")):  # fmt: skip
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(InputError, match=message):
            load_published(str(tmp_path / "bad.pt"))
    for missing, message in (("./nothing.pt", "does not exist"), ("nobody/nothing/lens.pt", "cannot be read from")):
        with pytest.raises(InputError, match=message):
            load_published(missing)
