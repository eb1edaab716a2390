"""Qwen3-VL against transformers (torch, float32), and videos of both families: every position, every visual token.

The parity check has to see a dropped feature, so it is run on broken models too: `test_parity_notices_*`. One public
port drops DeepStack and interleaves nothing, and passes its own tests.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models as tm
from parity import NOTICEABLE, Pair, Reference, check_packed_row, make_pair, make_run, pack, worst

from vigos_jax.errors import InputError
from vigos_jax.models import decoder, layers, positions, qwen3_vl
from vigos_jax.models.config import PARSERS, ModelConfig
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.tensor_names import MLP_PROJECTIONS
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.weights import adapters

HEADS = ("tied", "untied")
LENGTH = 96
sample = functools.partial(tm.make_sample, family="qwen3_vl")
# Grids larger, smaller and much wider than the table of 6 x 6 positions; one of one visual token.
SAMPLES = {
    "no image": sample([12], seed=1),
    "one image": sample([4, tm.WIDE, 7], seed=2),
    "two images": sample([3, tm.TALL, tm.SMALL, 5], seed=3),
    "text between images": sample([(1, 2, 2), 6, (1, 2, 16), 2], seed=4),
    "video": sample([3, tm.Video((3, 4, 6)), 4], seed=5),
    "image and video": sample([2, tm.SMALL, 3, tm.Video((2, 6, 4)), 4], seed=6),
}
REFERENCE = Reference(SAMPLES, lambda head: tm.cached_model(tied=head == "tied", family="qwen3_vl"))
worst_logits, worst_features = REFERENCE.worst_logits, REFERENCE.worst_features


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {head: make_pair(REFERENCE.model(head), tmp_path_factory.mktemp(head)) for head in HEADS}


@pytest.fixture(scope="module")
def batch(pairs):
    return pack(list(SAMPLES.values()), pairs["tied"].config, length=LENGTH, slots=256)


# -- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_parity(pairs, batch, head):
    """DeepStack's features stand beside the visual tokens."""
    images = REFERENCE.check(pairs[head], batch, head)
    assert images.shape[-1] == 64 * (1 + len(pairs[head].config.vision.deepstack_blocks))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_greedy_tokens_are_those_of_transformers(pairs, batch, head):
    """DeepStack goes into the cache."""
    REFERENCE.check_greedy_tokens(pairs[head], batch, head)


def test_a_packed_row_equals_its_branches_alone(pairs):
    check_packed_row(pairs["untied"])


@pytest.mark.slow
def test_remat_and_bfloat16(pairs, batch):
    """What a layer keeps changes no number; computation follows the dtype."""
    pair = pairs["tied"]

    def gradient(remat):
        model = pair.model.clone(remat=remat)

        def loss(base):
            images = model.apply({"params": base}, batch.vision, method="encode_images")
            return jnp.mean(jnp.square(model.apply({"params": base}, batch.text, images)[0]))

        return jax.jit(jax.grad(loss))(pair.base)

    kept, recomputed = gradient("none"), gradient("full")
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        size = np.abs(a).max()  # of the gradient, which is not of the order of one
        assert size > 0 and tm.max_difference(a / size, b / size) <= 1e-5
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.base)
    images, logits = make_run(pair.model.clone(dtype=jnp.bfloat16))({"params": base}, batch.vision, batch.text)
    assert images.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    differences = np.abs(np.asarray(logits)[0, :12] - REFERENCE.outputs("tied")["no image"][1])
    assert tm.TOLERANCE < differences.mean() < 0.1


# -- the check can fail -----------------------------------------------------------------------------------------


def broken_run(pair, batch, monkeypatch, change):
    """The batch's visual tokens and logits after `change(monkeypatch)`, compiled anew."""
    change(monkeypatch)
    return make_run(pair.model.clone())({"params": pair.base}, batch.vision, batch.text)


@pytest.fixture(scope="module")
def logits_of(pairs, batch):
    """The tied model's logits from visual tokens."""
    pair = pairs["tied"]

    @jax.jit
    def run(base, images):
        hidden, _ = pair.model.apply({"params": base}, batch.text, images)
        return pair.model.apply({"params": base}, hidden, method="logits")

    return functools.partial(run, pair.base)


def test_parity_notices_dropped_deepstack(pairs, batch, logits_of):
    pair = pairs["tied"]
    images = np.array(pair.run({"params": pair.base}, batch.vision, batch.text)[0])
    images[..., pair.config.hidden_size :] = 0.0
    wrong = worst_logits(logits_of(images), "tied")
    assert wrong.pop("no image") <= tm.TOLERANCE
    assert min(wrong.values()) > NOTICEABLE


@pytest.mark.parametrize("order", [(1, 0), (0, 0)])
def test_parity_notices_deepstack_of_the_wrong_block(pairs, batch, logits_of, order):
    pair = pairs["tied"]
    images = pair.run({"params": pair.base}, batch.vision, batch.text)[0]
    parts = np.split(np.asarray(images), 3, -1)
    swapped = np.concatenate([parts[0], *(parts[1 + i] for i in order)], -1)
    wrong = worst_logits(logits_of(swapped), "tied")
    assert min(v for k, v in wrong.items() if k != "no image") > NOTICEABLE


def test_parity_notices_positions_that_are_not_interleaved(pairs, batch):
    pair = pairs["tied"]
    model = VisionLanguageModel(dataclasses.replace(pair.config, mrope_interleaved=False))
    wrong = worst_logits(make_run(model)({"params": pair.base}, batch.vision, batch.text)[1], "tied")
    assert wrong.pop("no image") <= tm.TOLERANCE
    assert min(wrong.values()) > NOTICEABLE


def nearest(table, hw, grid):
    side = round(table.shape[0] ** 0.5)
    at = jnp.round(hw * ((side - 1) / jnp.maximum(grid - 1, 1))).astype(jnp.int32)
    return table[at[..., 0] * side + at[..., 1]]


def uncornered(table, hw, grid):
    """Bilinear, but with the centres of the outer patches at the table's edge (align_corners=False)."""
    side = round(table.shape[0] ** 0.5)
    at = jnp.clip((hw + 0.5) * side / jnp.maximum(grid, 1) - 0.5, 0, side - 1)
    return qwen3_resample(table, at * 1000, jnp.full_like(grid, 1000 * (side - 1) + 1))


qwen3_resample = qwen3_vl.resample
BREAKS = {
    "nearest position": lambda m: m.setattr(qwen3_vl, "resample", nearest),
    "corners not aligned": lambda m: m.setattr(qwen3_vl, "resample", uncornered),
    "no learned positions": lambda m: m.setattr(qwen3_vl, "resample", lambda t, hw, grid: 0.0 * nearest(t, hw, grid)),
    "no rotary positions": lambda m: m.setattr(
        qwen3_vl, "grid_angles", lambda hw, head_dim: 0.0 * layers.grid_angles(hw, head_dim=head_dim)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_parity_notices_a_broken_tower(pairs, batch, monkeypatch, name):
    images, logits = broken_run(pairs["tied"], batch, monkeypatch, BREAKS[name])
    assert worst_features(images, "tied")["one image"] > NOTICEABLE
    assert worst_logits(logits, "tied")["one image"] > NOTICEABLE


def test_parity_notices_missing_query_norm(pairs, batch, monkeypatch):
    class NoScale(layers.RMSNorm):
        def __call__(self, x):
            return x if self.name in ("q_norm", "k_norm") else super().__call__(x)

    change = lambda m: m.setattr(decoder, "RMSNorm", NoScale)  # noqa: E731
    _, logits = broken_run(pairs["tied"], batch, monkeypatch, change)
    assert min(worst_logits(logits, "tied").values()) > NOTICEABLE


def test_parity_notices_frames_that_see_each_other(pairs, batch):
    pair = pairs["tied"]
    one = batch.vision.replace(image_ids=np.minimum(batch.vision.image_ids, 1))
    images, _ = pair.run({"params": pair.base}, one, batch.text)
    wrong = worst_features(images, "tied")
    assert wrong["one image"] <= tm.TOLERANCE and wrong["video"] > NOTICEABLE and wrong["two images"] > NOTICEABLE


# -- videos of Qwen2.5-VL ---------------------------------------------------------------------------------------

VIDEOS = {
    "video": tm.make_sample([3, tm.Video((3, 4, 6), seconds=1.0), 5], seed=11),
    "slow video": tm.make_sample([2, tm.Video((4, 4, 4), seconds=2.5), 4], seed=12),  # longer than it is wide
    "fast video": tm.make_sample([2, tm.Video((4, 8, 4), seconds=0.4), 4], seed=13),  # fractions of a position
    "image, text, video": tm.make_sample([2, tm.SMALL, 3, tm.Video((2, 12, 4), seconds=0.5), 2], seed=14),
}


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory) -> Pair:
    return make_pair(tm.cached_model(tied=True), tmp_path_factory.mktemp("qwen2_5"))


def test_video_parity_of_qwen2_5_vl(qwen2_5):
    samples = list(VIDEOS.values())
    batch = pack(samples, qwen2_5.config, length=72, slots=512)
    images, logits = qwen2_5.run({"params": qwen2_5.base}, batch.vision, batch.text)
    features = [tm.torch_images(qwen2_5.torch, s) for s in samples]
    assert max(worst(images, features)) <= tm.TOLERANCE
    expected = [tm.torch_logits(qwen2_5.torch, [s])[0] for s in samples]
    assert max(worst(logits, expected)) <= tm.TOLERANCE
    # And with frames one position apart, whatever the seconds between them, it fails.
    untimed = [tm.Sample(s.ids, tuple(dataclasses.replace(i, time_step=1.0) for i in s.images)) for s in samples]
    batch = pack(untimed, qwen2_5.config, length=72, slots=512)
    _, logits = qwen2_5.run({"params": qwen2_5.base}, batch.vision, batch.text)
    assert min(worst(logits, expected)) > NOTICEABLE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", VIDEOS)
def test_positions_are_those_of_transformers(family, name):
    parts = {
        "video": [3, tm.Video((3, 4, 6), 1.0), 5],
        "slow video": [2, tm.Video((4, 4, 4), 2.5), 4],
        "fast video": [2, tm.Video((4, 8, 4), 0.4), 4],
        "image, text, video": [2, tm.SMALL, 3, tm.Video((2, 12, 4), 0.5), 2],
    }[name]
    s = tm.make_sample(parts, seed=0, family=family)
    inputs = s.torch_inputs()
    inputs = {k: v for k, v in inputs.items() if not k.startswith("pixel") and k != "attention_mask"}
    expected, _ = tm.cached_model(tied=True, family=family).model.get_rope_index(**inputs)
    steps = [image.time_step for image in s.images]
    options = {"visual_ids": (tm.IMAGE, tm.VIDEO), "merge_size": 2, "time_steps": steps}
    np.testing.assert_array_equal(positions.mrope_positions(s.ids, s.grids, **options), expected[:, 0])


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_config_json_says_what_the_model_is(pairs):
    c = pairs["untied"].config
    assert (c.family, c.qkv_bias, c.qk_norm, c.mrope_interleaved) == ("qwen3_vl", False, True, True)
    assert (c.head_dim, c.num_heads, c.hidden_size, c.mrope_section) == (32, 4, 64, (6, 5, 5))
    assert (c.vision.deepstack_blocks, c.vision.num_positions, c.vision.patch_size) == ((1, 2, 4), 36, 16)
    assert (c.vision.window_side, c.vision.window_patches, c.vision.patch_dim) == (1, 4, 3 * 2 * 16 * 16)
    assert c.visual_ids == (tm.IMAGE, tm.VIDEO)


@pytest.mark.parametrize(
    "part, change, named",
    [
        ("vision_config", {"num_position_embeddings": 35}, ["num_position_embeddings 35", "square"]),
        ("vision_config", {"deepstack_visual_indexes": [0, 9]}, ["deepstack_visual_indexes", "(0, 9)"]),
        ("vision_config", {"deepstack_visual_indexes": [1, 1]}, ["deepstack_visual_indexes"]),
        ("text_config", {"attention_bias": True}, ["attention_bias=true", "choices: false"]),
    ],
)
def test_a_config_that_cannot_be_used(part, change, named):
    raw = tm.tiny_qwen3_config(tied=True).to_dict()
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(raw | {part: raw[part] | change})
    assert all(word in str(error.value) for word in named)


def test_adapter_parity(pairs, batch, tmp_path):
    """peft's adapter on every projection that suffix matching hits: none of this tower's."""
    pair = pairs["untied"]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP_PROJECTIONS]
    adapted = tm.with_adapter(pair.torch, r=4, lora_alpha=8, target_modules=targets)
    folder = pathlib.Path(tm.save(adapted, tmp_path / "adapter"))
    spec = adapters.adapter_spec(folder, dropout=0.0)
    assert not spec.vision
    model = VisionLanguageModel(pair.config, lora=spec)
    lora = adapters.load_adapter(folder, pair.config, spec, abstract_variables(model)["lora"])
    run = make_run(model)
    _, logits = run({"params": pair.base, "lora": lora}, batch.vision, batch.text)
    expected = [tm.torch_logits(adapted, [s])[0] for s in SAMPLES.values()]
    assert max(worst(logits, expected)) <= tm.TOLERANCE
    assert min(worst_logits(logits, "untied").values()) > NOTICEABLE  # it does something


def test_every_family_has_its_tower():
    assert set(PARSERS) == set(FAMILIES)
