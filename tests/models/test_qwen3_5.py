"""Qwen3.5 against transformers (torch, float32): every position, every visual token, the adapter's gradient.

The parity check has to see a dropped feature, so it is run on broken weights too: `test_parity_notices`.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models as tm
from cases import others_slow
from parity import NOTICEABLE, Pair, Reference, make_pair, make_run, pack, worst

from vigos_jax.errors import InputError
from vigos_jax.models.attention_masks import Causal
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.decoder import LayerInputs
from vigos_jax.models.families import FAMILIES, adapter_table
from vigos_jax.models.hybrid import DeltaState, LinearLayer
from vigos_jax.models.variables import cast_floats
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import adapters, writing

LENGTH = 96
TARGETS = FAMILIES["qwen3_5"].language_adapters
sample = functools.partial(tm.make_sample, family="qwen3_5")
SAMPLES = {
    "no image": sample([12], seed=1),
    "one image": sample([4, tm.WIDE, 7], seed=2),
    "two images": sample([3, tm.TALL, tm.SMALL, 5], seed=3),
    "longer than a chunk": sample([70, (1, 2, 2), 3], seed=4),
    "video": sample([3, tm.Video((3, 4, 6)), 4], seed=5),
    "image and video": sample([2, tm.SMALL, 3, tm.Video((2, 6, 4)), 4], seed=6),
}
# Groups of four in a short stack; groups of two in a stack that is compiled as a loop, with as many key as value heads.
MODELS = {
    "tied": {"config": tm.tiny_qwen3_5_config(tied=True), "seed": 0},
    "untied": {
        "config": tm.tiny_qwen3_5_config(
            tied=False, layers=10, layer_types=["linear_attention", "full_attention"] * 5, linear_num_key_heads=4
        ),
        "seed": 1,
    },
}


@functools.cache
def reference(head: str) -> torch.nn.Module:
    return tm.tiny_model_of(MODELS[head]["config"], seed=MODELS[head]["seed"])


REFERENCE = Reference(SAMPLES, reference)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {head: make_pair(reference(head), tmp_path_factory.mktemp(head)) for head in MODELS}


@pytest.fixture(scope="module")
def batch(pairs):
    return pack(list(SAMPLES.values()), pairs["tied"].config, length=LENGTH, slots=256)


def worst_logits(logits, head: str) -> float:
    return max(REFERENCE.worst_logits(logits, head).values())


# -- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", others_slow(MODELS))
def test_parity(pairs, batch, head):
    REFERENCE.check(pairs[head], batch, head)


@pytest.mark.slow
def test_rows_described_by_their_lengths(pairs, batch):
    """As the student's rows and the prompts are; and padded in front instead, as other programs do."""
    pair = pairs["tied"]
    lengths = np.array([len(s.ids) for s in SAMPLES.values()])

    @functools.partial(jax.jit, static_argnames="described")
    def run(base, vision, text, described):
        images = pair.model.apply({"params": base}, vision, method="encode_images")
        mask = Causal(jnp.sum(text.segment_ids > 0, -1)) if described else None
        hidden, _ = pair.model.apply({"params": base}, text, images, mask=mask)
        return pair.model.apply({"params": base}, hidden, method="logits")

    assert worst_logits(run(pair.base, batch.vision, batch.text, True), "tied") <= tm.TOLERANCE
    turn = lambda x: np.stack([np.roll(a, LENGTH - n, -1) for a, n in zip(x, lengths, strict=True)])  # noqa: E731
    logits = np.asarray(run(pair.base, batch.vision, jax.tree.map(turn, batch.text), False))
    front = [np.roll(row, n - LENGTH, 0) for row, n in zip(logits, lengths, strict=True)]
    assert worst_logits(np.stack(front), "tied") <= tm.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("head", MODELS)
def test_greedy_tokens_are_those_of_transformers(pairs, batch, head):
    """Both kinds of layers keep what they need."""
    REFERENCE.check_greedy_tokens(pairs[head], batch, head)


@pytest.mark.slow
def test_one_token_goes_on_from_a_state(pairs):
    """Prefill of padded rows, then token by token: what a linear layer gives for whole rows."""
    pair = pairs["tied"]
    c, rng = pair.config, np.random.default_rng(0)
    layer, params = LinearLayer(c, None, None), jax.tree.map(lambda x: x[0], pair.base["layers"]["linear_1"])
    x = jnp.asarray(rng.normal(size=(3, 12, c.hidden_size)), jnp.float32)
    lengths = np.array([8, 2, 5])  # of the prefill; the second is shorter than the convolution

    def inputs(real):
        segments = jnp.asarray(real, jnp.int32)
        return LayerInputs(angles=None, mask=None, image_index=None, deepstack=None, segment_ids=segments, keep=True)

    at = np.arange(12)
    whole, _ = layer.apply({"params": params}, x, jnp.int32(1), inputs(np.ones((3, 12))), True)
    prefill = inputs(at[:8] < lengths[:, None])
    out, state = layer.apply({"params": params}, x[:, :8], jnp.int32(1), prefill, True)
    assert isinstance(state, DeltaState) and state.state.before.dtype == jnp.float32
    for row, n in enumerate(lengths):
        assert tm.max_difference(out[row, :n], whole[row, :n]) <= 1e-5
    one = inputs(np.ones((3, 1)))
    step = jax.jit(lambda x, state: layer.apply({"params": params}, x, jnp.int32(1), one, True, state))
    for i in range(4):
        token = x[np.arange(3), lengths + i][:, None]
        out, state = step(token, state)
        assert tm.max_difference(out[:, 0], whole[np.arange(3), lengths + i]) <= 1e-5


@pytest.mark.slow
def test_bfloat16_keeps_the_decay_in_float32(pairs, batch):
    """Computation follows the dtype, but for the islands."""
    pair = pairs["tied"]
    base = cast_floats(pair.base, jnp.bfloat16)
    narrow = jax.tree_util.tree_leaves_with_path(base)
    wide = {jax.tree_util.keystr(path) for path, x in narrow if x.dtype == jnp.float32}
    assert wide and all("A_log" in name or "gated_norm" in name for name in wide)
    images, logits = make_run(pair.model.clone(dtype=jnp.bfloat16))({"params": base}, batch.vision, batch.text)
    assert images.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    differences = np.abs(np.asarray(logits)[0, :12] - REFERENCE.outputs("tied")["no image"][1])
    assert tm.TOLERANCE < differences.mean() < 0.2


# -- the adapter ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(pairs, tmp_path_factory):
    """peft's adapter on every projection that ours cover, and ours read from its folder: (torch, model, lora)."""
    pair = pairs["tied"]
    peft_model = tm.with_adapter(pair.torch, r=4, lora_alpha=2, target_modules=list(TARGETS))
    folder = pathlib.Path(tm.save(peft_model, tmp_path_factory.mktemp("adapter")))
    spec = adapters.adapter_spec(folder, dropout=0.0)
    assert spec.language == set(TARGETS) and not spec.vision
    model = VisionLanguageModel(pair.config, lora=spec)
    return peft_model, model, adapters.load_adapter(folder, pair.config, spec, abstract_variables(model)["lora"])


@pytest.mark.slow
def test_adapter_and_its_gradient(pairs, batch, adapted):
    """Logits at every position, and the gradient of each A and B for random weights of all logits."""
    pair, (peft_model, model, lora) = pairs["tied"], adapted
    rng = np.random.default_rng(7)
    real = np.asarray(batch.text.segment_ids) > 0
    weights = rng.normal(size=(*real.shape, tm.VOCAB)).astype(np.float32) * real[:, :, None]

    @jax.jit
    def gradient(lora, base, batch):
        def loss(lora):
            variables = {"params": base, "lora": lora}
            images = model.apply(variables, batch.vision, method="encode_images")
            hidden, _ = model.apply(variables, batch.text, images)
            logits = model.apply(variables, hidden, method="logits")
            return jnp.sum(logits * weights), logits

        return jax.grad(loss, has_aux=True)(lora)

    grads, logits = gradient(lora, pair.base, batch)
    expected = [tm.torch_logits(peft_model, [s])[0] for s in SAMPLES.values()]
    assert max(worst(logits, expected)) <= tm.TOLERANCE
    assert worst_logits(logits, "tied") > NOTICEABLE  # it does something

    for s, w in zip(SAMPLES.values(), weights, strict=True):
        n = len(s.ids)
        (peft_model(**s.torch_inputs()).logits[0] * torch.tensor(w[:n])).sum().backward()
    theirs = {n.replace(".default", ""): p.grad.numpy() for n, p in peft_model.named_parameters() if p.requires_grad}
    ours = dict(writing.file_tensors(grads, adapter_table(pair.config, model.lora), pair.config, dtype=np.float32))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * (6 * 6 + 2 * 7)  # projections of 6 linear and 2 full layers
    for name, g in theirs.items():
        assert tm.max_difference(ours[name], g) <= 1e-4 * np.abs(g).max(), name


# -- the check can fail -----------------------------------------------------------------------------------------


def scaled(base, change):
    """The base with `change(path, leaf)` in place of every leaf of the decoder's layers."""
    layers = jax.tree_util.tree_map_with_path(
        lambda path, x: change("/".join(key.key for key in path), x), base["layers"]
    )
    return {**base, "layers": layers}


def without_gate(path: str, x):
    """A gate of one half, made up for behind it."""
    if path.endswith("full_3/q_proj/kernel"):
        groups, width, n = x.shape
        return x.reshape(groups, width, -1, 2, n // 8).at[..., 1, :].set(0).reshape(x.shape)  # 4 heads
    return 2 * x if path.endswith("full_3/o_proj/kernel") else x


BROKEN = {
    "no decay": lambda path, x: x - 1e9 if path.endswith("A_log") else x,
    "no output gate": without_gate,
    "1 + w in the gated norm": lambda path, x: x + 1 if "gated_norm" in path else x,
    "w in the other norms": lambda path, x: x - 1 if path.endswith(("input_norm/scale", "post_norm/scale")) else x,
    "w in the norms of heads": lambda path, x: x - 1 if path.endswith(("q_norm/scale", "k_norm/scale")) else x,
    "a shifted convolution": lambda path, x: jnp.roll(x, 1, axis=1) if path.endswith("conv") else x,
    "no dt_bias": lambda path, x: 0 * x if path.endswith("dt_bias") else x,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_parity_notices(pairs, batch, broken):
    pair = pairs["tied"]
    _, logits = pair.run({"params": scaled(pair.base, BROKEN[broken])}, batch.vision, batch.text)
    assert worst_logits(logits, "tied") > NOTICEABLE


def test_parity_notices_a_rounded_decay(pairs, batch):
    pair = pairs["tied"]
    rounded = lambda path, x: x.astype(jnp.bfloat16).astype(jnp.float32) if path.endswith("A_log") else x  # noqa: E731
    _, logits = pair.run({"params": scaled(pair.base, rounded)}, batch.vision, batch.text)
    assert worst_logits(logits, "tied") > 10 * tm.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"mrope_section": (8, 4, 4)}, {"mrope_interleaved": False}, {"norm_offset": 0.0}],
    ids=["rotary over all dimensions", "sections in runs", "no offset"],
)
def test_parity_notices_another_config(pairs, batch, change):
    pair = pairs["tied"]
    model = VisionLanguageModel(dataclasses.replace(pair.config, **change))
    _, logits = make_run(model)({"params": pair.base}, batch.vision, batch.text)
    assert worst_logits(logits, "tied") > NOTICEABLE


# -- config.json ------------------------------------------------------------------------------------------------


def test_config_json_says_what_the_model_is(pairs):
    c = pairs["tied"].config
    assert (c.family, c.qkv_bias, c.qk_norm, c.mrope_interleaved) == ("qwen3_5", False, True, True)
    assert (c.norm_offset, c.attention_gate, c.mrope_section, c.head_dim) == (1.0, True, (2, 1, 1), 32)
    assert (c.layer_pattern, c.groups, c.chunk) == (("linear",) * 3 + ("full",), 2, 64)
    assert (c.delta.channels, c.delta.width, c.delta.conv_width) == (2 * 2 * 16 + 4 * 8, 4 * 8, 4)
    assert (c.vision.deepstack_blocks, c.vision.num_positions) == ((), 36)
    assert pairs["untied"].config.layer_pattern == ("linear", "full")


@pytest.mark.parametrize(
    "types, pattern",
    [
        (["linear_attention"] * 3, ("linear",)),
        (["full_attention"] * 2, ("full",)),
        (["linear_attention", "full_attention", "linear_attention"], ("linear", "full", "linear")),
    ],
)
def test_any_order_of_layers(types, pattern):
    raw = tm.tiny_qwen3_5_config(tied=True).to_dict()
    raw["text_config"] |= {"layer_types": types, "num_hidden_layers": len(types)}
    assert ModelConfig.from_hf(raw).layer_pattern == pattern


@pytest.mark.parametrize(
    "part, change, named",
    [
        ("text_config", {"layer_types": ["linear_attention"]}, ["layer_types", "8 layers"]),
        ("text_config", {"layer_types": ["sliding_attention"] * 8}, ["layer_types", "full_attention"]),
        ("text_config", {"linear_num_value_heads": 3}, ["linear_num_value_heads 3", "linear_num_key_heads 2"]),
        ("text_config", {"linear_conv_kernel_dim": 0}, ["linear_conv_kernel_dim 0"]),
        ("text_config", {"attention_bias": True}, ["attention_bias=true"]),
        ("vision_config", {"num_position_embeddings": 35}, ["num_position_embeddings 35", "square"]),
        ("vision_config", {"out_hidden_size": 32}, ["out_hidden_size 32", "hidden_size 64"]),
    ],
)
def test_a_config_that_cannot_be_used(part, change, named):
    raw = tm.tiny_qwen3_5_config(tied=True).to_dict()
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(raw | {part: raw[part] | change})
    assert all(word in str(error.value) for word in named)


def test_what_rotates_is_named():
    raw = tm.tiny_qwen3_5_config(tied=True).to_dict()
    rope = raw["text_config"]["rope_parameters"] | {"partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match=r"mrope_section \(2, 1, 1\) .* head size 32: 16"):
        ModelConfig.from_hf(raw | {"text_config": raw["text_config"] | {"rope_parameters": rope}})


@pytest.mark.parametrize("name, called", [("qwen3_5_moe", "Qwen3.5-MoE"), ("qwen3_5_text", "without its vision tower")])
def test_relatives_are_refused_by_name(name, called):
    with pytest.raises(InputError, match=f"{called}.*is not supported; choices: qwen2_5_vl, qwen3_vl, qwen3_5$"):
        ModelConfig.from_hf({"model_type": name})
