"""The weights as decoding reads them: each layer's own, adapters joined, nothing lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_sampler import NEVER, ROWS, SAMPLING, prompts, rollouts, student
from tiny import MODEL

from vigos_jax.models.decoder import join_adapters, layer_of
from vigos_jax.rollouts import sampler as sampling
from vigos_jax.rollouts.decode_weights import decode_weights, own_layers
from vigos_jax.rollouts.sampler import Sampler, row_keys


def test_joined_adapters_are_those_of_the_projections():
    """x A_joined B_joined is each projection's scaled x A B: a row for every layer."""
    lora = tiny.weights()[1]["layers"]
    joined = join_adapters(lora, scale=1.7, dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((5, MODEL.config.hidden_size)).astype(np.float32)
    for names, old, new in (
        (("q_proj", "k_proj", "v_proj"), lora, joined),
        (("gate_proj", "up_proj"), lora["mlp"], joined["mlp"]),
    ):
        for layer in range(MODEL.config.num_layers):
            for name in names:
                expected = 1.7 * (x @ old[name]["a"][layer]) @ old[name]["b"][layer]
                got = (x @ new["joined"][layer]) @ new[name]["b"][layer]
                assert np.abs(expected).max() > 1e-3 and "a" not in new[name]
                np.testing.assert_allclose(got, expected, atol=1e-5)
    for old, new in ((lora["o_proj"], joined["o_proj"]), (lora["mlp"]["down_proj"], joined["mlp"]["down_proj"])):
        np.testing.assert_allclose(new["a"], 1.7 * old["a"], rtol=1e-6)
        np.testing.assert_array_equal(new["b"], old["b"])


def test_projections_without_an_adapter_stay_without():
    lora = {name: x for name, x in tiny.weights()[1]["layers"].items() if name in ("v_proj", "o_proj")}
    joined = join_adapters(lora, scale=1.0, dtype=jnp.bfloat16)
    assert set(joined) == {"v_proj", "o_proj", "joined"} and joined["joined"].dtype == jnp.bfloat16
    assert joined["joined"].shape == lora["v_proj"]["a"].shape


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj"), ()])
def test_any_choice_of_adapters_decodes(adapted):
    """Sampled log-probabilities are those of the same student scored by whole forward passes."""
    lora = dataclasses.replace(MODEL.lora, language=frozenset(adapted))
    model = MODEL.clone(lora=lora if adapted else None)

    def kept(tree):
        out = {}
        for name, node in tree.items():
            if "a" in node:
                if name in adapted:
                    out[name] = node
            elif inner := kept(node):
                out[name] = inner
        return out

    variables = {"params": student()["params"]}
    if adapted:
        variables["lora"] = {"layers": kept(student()["lora"]["layers"])}
    s = Sampler(model, dataclasses.replace(SAMPLING, max_tokens=3), eos_ids=NEVER)
    out = s(variables, prompts(), row_keys(0, 0, len(ROWS)))
    from oracles import objective as oracle

    for i in (0, 2):
        ids = ROWS[i].student.ids
        logits = oracle.logits(model, variables, ROWS[i].images, ids + out.ids[i])
        logp = oracle.log_softmax(logits)[len(ids) - 1 : -1]
        np.testing.assert_allclose(out.logps[i], logp[np.arange(3), out.ids[i]], atol=1e-5)


def test_a_stack_read_in_place_gives_the_same_rollouts(monkeypatch):
    """As on a TPU, whose compiler reads slices where they lie."""
    monkeypatch.setattr(sampling, "reads_stack", lambda mesh: True)
    s = Sampler(MODEL, SAMPLING, eos_ids=NEVER)
    weights = s.weights(student())
    assert weights.is_stacked and weights.layers["params"] is student()["params"]["layers"]
    assert s(student(), prompts(), row_keys(0, 0, len(ROWS))).ids == rollouts().ids


def test_each_layer_has_its_own_weights():
    variables = student()
    weights = decode_weights(variables, own_layers(MODEL, variables, stacked=False), stacked=False)
    assert len(weights.layers) == MODEL.config.num_layers and set(weights.outer) == {
        "embedding",
        "norm",
        "lm_head",
    } & set(variables["params"])
    for i, layer in enumerate(weights.layers):
        want = layer_of(variables["params"]["layers"], i, MODEL.config)
        jax.tree.map(np.testing.assert_array_equal, layer["params"], want)
