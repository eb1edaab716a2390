"""Qwen2.5-VL against transformers (torch, float32), number by number; and the geometry it stands on.

The parity check has to see what public ports have got wrong, so the same check is run on broken inputs and must fail:
`test_parity_notices_*`.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
import torch_models as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import NOTICEABLE, Pair, make_pair, make_run

from vigos_jax.config_limits import CHOICES
from vigos_jax.method.batch import PromptBatch
from vigos_jax.models import positions as geometry
from vigos_jax.models.attention_masks import Branches, Causal
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.decoder import layer_of
from vigos_jax.models.kv_cache import Cache, key_values
from vigos_jax.models.variables import shares_vision, student_variables, teacher_params_of, teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables, init_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.weights import adapters

HEADS = ("tied", "untied")
# One batch holds every kind of prompt; the shorter ones are padded at their end by the packing.
SAMPLES = {
    "no image": tm.make_sample([12], seed=1),
    "one image": tm.make_sample([4, tm.WIDE, 7], seed=2),
    "two images": tm.make_sample([3, tm.TALL, tm.SMALL, 5], seed=3),
    "text between images": tm.make_sample([tm.SMALL, 6, tm.TALL, 2], seed=4),
}
LENGTH = 80  # tokens the batch is padded to


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {head: make_pair(tm.cached_model(tied=head == "tied"), tmp_path_factory.mktemp(head)) for head in HEADS}


def pack(samples, *, length: int = LENGTH) -> PromptBatch:
    return parity.pack(samples, ModelConfig.from_hf(tm.tiny_config(tied=True).to_dict()), length=length)


@pytest.fixture(scope="module")
def batch() -> PromptBatch:
    return pack(SAMPLES.values())


@pytest.fixture(scope="module")
def ours(pairs, batch):
    """(visual tokens [B, M, D], logits [B, T, V]) of the whole batch, by head."""
    return {h: jax.device_get(p.run({"params": p.base}, batch.vision, batch.text)) for h, p in pairs.items()}


@functools.cache
def theirs(head: str) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
    """(visual tokens, logits) by sample, each run alone and without padding."""
    model = tm.cached_model(tied=head == "tied")
    return {
        name: (tm.torch_images(model, s) if s.images else None, tm.torch_logits(model, [s])[0])
        for name, s in SAMPLES.items()
    }


def worst_logit(logits, head: str, *, names=SAMPLES) -> float:
    """The parity check: largest difference from torch at any position of the named samples."""
    rows = list(SAMPLES)
    return max(tm.max_difference(logits[rows.index(n), : len(SAMPLES[n].ids)], theirs(head)[n][1]) for n in names)


def worst_feature(images) -> float:
    """The same of the tied model's visual tokens."""
    rows = list(SAMPLES)
    features = {n: f for n, (f, _) in theirs("tied").items() if f is not None}
    return max(tm.max_difference(images[rows.index(n), : len(f)], f) for n, f in features.items())


# -- parity -----------------------------------------------------------------------------------------------------


def test_the_reference_is_sensitive():
    """Flat logits would agree with anything."""
    for head in HEADS:
        for features, logits in theirs(head).values():
            assert logits.std() >= 1
            assert features is None or features.std() >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", [n for n, s in SAMPLES.items() if s.images])
def test_vision_parity(ours, name, head):
    features = theirs(head)[name][0]
    row = list(SAMPLES).index(name)
    assert tm.max_difference(ours[head][0][row, : len(features)], features) <= tm.TOLERANCE


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SAMPLES)
def test_logits_parity(ours, name, head):
    """Padded in our batch, alone in torch: neither the padding nor the neighbours may matter."""
    assert worst_logit(ours[head][1], head, names=[name]) <= tm.TOLERANCE


@pytest.mark.parametrize("head", HEADS)
def test_logits_parity_with_torchs_own_left_padding(pairs, ours, head):
    expected = tm.torch_logits(pairs[head].torch, list(SAMPLES.values()))
    for i, sample in enumerate(SAMPLES.values()):
        n = len(sample.ids)
        assert tm.max_difference(ours[head][1][i, :n], expected[i, -n:]) <= tm.TOLERANCE


def test_padding_gives_finite_numbers(ours):
    """A NaN in a padded slot would come back through a mask of zeros."""
    for images, logits in ours.values():
        assert np.isfinite(images).all() and np.isfinite(logits).all()


STEPS = 2


def decoded(pair: Pair, batch: PromptBatch, *, forget: int = 0) -> np.ndarray:
    """Logits [B, STEPS, V] of each row's last tokens, one at a time into the cache behind one prefill of the others.

    Args:
      forget: slots at the cache's start that the tokens may not attend to.
    """
    model, params, text = pair.model, pair.base, batch.text
    lengths = np.sum(text.segment_ids > 0, -1) - STEPS
    first = text.replace(segment_ids=text.segment_ids * (np.arange(LENGTH) < lengths[:, None]))
    images = model.apply({"params": params}, batch.vision, method="encode_images")
    _, kept = model.apply({"params": params}, first, images, mask=Causal(jnp.asarray(lengths)), keep=True)
    kept = [layer_of(kept, i, pair.config) for i in range(pair.config.num_layers)]
    entries = tuple(key_values(x.k, x.v, axis=2).padded(STEPS) for x in kept)
    cache = Cache(entries, jnp.int32(LENGTH))
    layers = [{"params": layer_of(params["layers"], i, pair.config)} for i in range(pair.config.num_layers)]

    @jax.jit
    def step(cache, part):
        slots = jnp.arange(LENGTH + STEPS)
        visible = (slots < lengths[:, None]) | ((slots >= LENGTH) & (slots <= cache.write_at))
        visible &= slots >= forget
        hidden, cache = model.apply({"params": params}, part, layers, cache, visible=visible, method="decode")
        return model.apply({"params": params}, hidden[:, 0], method="logits"), cache

    out = []
    for i in range(STEPS):
        at = (lengths + i)[:, None]
        pick = lambda x, at=at: np.take_along_axis(x, at if x.ndim == 2 else at[:, None].repeat(3, 1), -1)  # noqa: E731
        assert int(cache.write_at) == LENGTH + i
        logits, cache = step(cache, jax.tree.map(pick, text))
        out.append(logits)
    return np.stack(out, 1)


def last_logits(head: str) -> list[np.ndarray]:
    return [theirs(head)[name][1][-STEPS:] for name in SAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_cached_decode_parity(pairs, batch, head):
    """All but the last two tokens in one prefill, then one at a time into the cache."""
    assert max(parity.worst(decoded(pairs[head], batch), last_logits(head))) <= tm.TOLERANCE


@pytest.mark.slow
def test_parity_notices_a_forgotten_slot(pairs, batch):
    assert min(parity.worst(decoded(pairs["tied"], batch, forget=1), last_logits("tied"))) > NOTICEABLE


@functools.cache
def greedy(head: str, name: str, new_tokens: int, eos: int) -> tuple[int, ...]:
    inputs = SAMPLES[name].torch_inputs()
    out = tm.cached_model(tied=head == "tied").generate(
        **inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=0
    )
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("head", HEADS)
def test_greedy_tokens_are_those_of_transformers(pairs, batch, head):
    """One batch with and without images; one row ends early, at a token chosen to come up there."""
    pair, new_tokens, unused = pairs[head], 16, tm.VOCAB - 1
    eos = greedy(head, "one image", new_tokens, unused)[7]
    expected = tuple(greedy(head, name, new_tokens, eos) for name in SAMPLES)
    assert len({len(ids) for ids in expected}) > 1 and new_tokens in map(len, expected)
    sampler = Sampler(pair.model, Sampling(max_tokens=new_tokens, temperature=0.0), eos_ids=[eos])
    out = sampler({"params": pair.base}, batch, row_keys(0, 0, len(SAMPLES)))
    assert out.ids == expected


# -- the check can fail -----------------------------------------------------------------------------------------


def test_parity_notices_flattened_positions(pairs, batch):
    """Positions that count up by one along all three axes: right for text, wrong behind an image."""
    pair = pairs["tied"]
    running = np.maximum(np.cumsum(batch.text.segment_ids > 0, -1, dtype=np.int32) - 1, 0)
    flat = batch.text.replace(positions=np.repeat(running[:, None], 3, 1))
    _, logits = pair.run({"params": pair.base}, batch.vision, flat)
    assert worst_logit(logits, "tied", names=["no image"]) <= tm.TOLERANCE
    for name in theirs("tied").keys() - {"no image"}:
        assert worst_logit(logits, "tied", names=[name]) > NOTICEABLE


def test_parity_notices_swapped_position_axes(pairs, batch):
    """Height and width exchanged, which a square image of one visual token would hide."""
    pair = pairs["tied"]
    swapped = batch.text.replace(positions=batch.text.positions[:, [0, 2, 1]])
    _, logits = pair.run({"params": pair.base}, batch.vision, swapped)
    assert worst_logit(logits, "tied", names=["one image"]) > NOTICEABLE


@pytest.mark.parametrize("full", [(0, 1, 2, 3), ()])
def test_parity_notices_wrong_windows(pairs, batch, full):
    """All blocks full: the windows are dropped. None full: the full-attention blocks are."""
    pair = pairs["tied"]
    vision = dataclasses.replace(pair.config.vision, full_attention_blocks=full)
    model = VisionLanguageModel(dataclasses.replace(pair.config, vision=vision))
    images = jax.jit(functools.partial(model.apply, method="encode_images"))({"params": pair.base}, batch.vision)
    assert worst_feature(images) > NOTICEABLE


def test_parity_notices_mixed_up_patch_positions(pairs, batch):
    pair = pairs["tied"]
    images, logits = pair.run({"params": pair.base}, batch.vision.replace(hw=batch.vision.hw * 0), batch.text)
    assert worst_feature(images) > NOTICEABLE and worst_logit(logits, "tied") > NOTICEABLE


def test_parity_notices_images_that_attend_to_each_other(pairs, batch):
    pair = pairs["tied"]
    one_frame = batch.vision.replace(image_ids=np.minimum(batch.vision.image_ids, 1))
    images, _ = pair.run({"params": pair.base}, one_frame, batch.text)
    assert worst_feature(images) > NOTICEABLE


def test_parity_notices_features_that_are_not_inserted(pairs, batch):
    pair = pairs["tied"]
    text = batch.text.replace(image_index=np.full_like(batch.text.image_index, -1))
    _, logits = pair.run({"params": pair.base}, batch.vision, text)
    for name in theirs("tied").keys() - {"no image"}:
        assert worst_logit(logits, "tied", names=[name]) > NOTICEABLE


def test_parity_notices_swapped_images(pairs, batch):
    """Every feature inserted, but in another order."""
    pair = pairs["tied"]
    index = batch.text.image_index
    reverse = np.where(index >= 0, index.max(-1, keepdims=True) - index, -1)
    _, logits = pair.run({"params": pair.base}, batch.vision, batch.text.replace(image_index=reverse))
    assert worst_logit(logits, "tied", names=["two images"]) > NOTICEABLE


# -- the adapter ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    torch: torch.nn.Module
    model: VisionLanguageModel
    lora: dict
    logits: dict[str, np.ndarray]  # torch's, by sample
    run: object


@pytest.fixture(scope="module")
def adapted(pairs, tmp_path_factory) -> Adapted:
    """The untied model with an adapter on every decoder projection and on the vision MLPs."""
    pair = pairs["untied"]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    reference = tm.with_adapter(pair.torch, r=4, lora_alpha=8, target_modules=targets)
    folder = tm.save(reference, tmp_path_factory.mktemp("adapter"))
    spec = adapters.adapter_spec(pathlib.Path(folder), dropout=0.5)
    model = VisionLanguageModel(pair.config, lora=spec)
    lora = adapters.load_adapter(folder, pair.config, spec, abstract_variables(model)["lora"])
    logits = {name: tm.torch_logits(reference, [s])[0] for name, s in SAMPLES.items()}
    return Adapted(reference, model, lora, logits, make_run(model))


def worst_adapted(logits, adapted: Adapted) -> float:
    return max(
        tm.max_difference(row[: len(expected)], expected)
        for row, expected in zip(logits, adapted.logits.values(), strict=True)
    )


@pytest.fixture(scope="module")
def teacher(pairs, batch, adapted):
    """(visual tokens, logits) of the adapted model when it is applied as a teacher."""
    return jax.device_get(adapted.run(teacher_variables(pairs["untied"].base, {}), batch.vision, batch.text))


def without_b(lora, part: str):
    """The adapter with B set to zero under `part`, which switches it off there."""
    switch = lambda path, x: np.asarray(x) * np.float32(path[-1].key != "b")  # noqa: E731
    return {**lora, part: jax.tree_util.tree_map_with_path(switch, lora[part])}


def test_student_and_teacher_are_told_apart(pairs, batch, adapted, teacher):
    """One model, two sets of variables: with the adapter it is peft's model, without it the base, and no other."""
    variables = student_variables(pairs["untied"].base, {"lora": adapted.lora})
    _, student = adapted.run(variables, batch.vision, batch.text)
    assert worst_adapted(student, adapted) <= tm.TOLERANCE
    assert worst_logit(teacher[1], "untied") <= tm.TOLERANCE
    # The checks above cannot both be met by one output: forgetting the adapter, or keeping it, is noticed.
    assert worst_adapted(teacher[1], adapted) > NOTICEABLE
    assert worst_logit(student, "untied") > NOTICEABLE


@pytest.mark.parametrize("part", ["visual", "layers"])
def test_parity_notices_half_an_adapter(pairs, batch, adapted, teacher, part):
    variables = student_variables(pairs["untied"].base, {"lora": without_b(adapted.lora, part)})
    images, logits = adapted.run(variables, batch.vision, batch.text)
    assert worst_adapted(logits, adapted) > NOTICEABLE
    # The decoder's adapter does not reach the tower.
    assert (tm.max_difference(images, teacher[0]) == 0) == (part == "visual")


def test_a_fresh_adapter_changes_nothing(pairs, batch, adapted, teacher):
    fresh = jax.jit(lambda key: init_variables(adapted.model, key)["lora"])(jax.random.key(0))
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}
    assert leaves and all((not np.any(leaf)) == path.endswith("['b']") for path, leaf in leaves.items())
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapted.lora)
    start = adapted.run(student_variables(pairs["untied"].base, {"lora": fresh}), batch.vision, batch.text)
    assert tm.max_difference(start[1], teacher[1]) <= 1e-6  # B is 0; the two programs may round in another order


def test_dropout_acts_on_the_adapter_and_only_while_training(pairs, adapted):
    base, small = pairs["untied"].base, pack([SAMPLES["no image"]], length=12)
    no_images = jnp.zeros((1, 0, adapted.model.config.hidden_size))

    @functools.partial(jax.jit, static_argnames="deterministic")
    def logits(variables, key, deterministic):
        rngs = {"dropout": key}
        out, _ = adapted.model.apply(variables, small.text, no_images, deterministic=deterministic, rngs=rngs)
        return adapted.model.apply(variables, out[0], method="logits")

    one, two = jax.random.key(1), jax.random.key(2)
    student, teacher = student_variables(base, {"lora": adapted.lora}), teacher_variables(base, {})
    exact, dropped = adapted.logits["no image"], logits(student, one, False)
    assert tm.max_difference(logits(student, one, True), exact) <= tm.TOLERANCE
    assert tm.max_difference(dropped, exact) > NOTICEABLE
    assert tm.max_difference(dropped, logits(student, two, False)) > NOTICEABLE
    np.testing.assert_array_equal(dropped, logits(student, one, False))
    assert tm.max_difference(logits(teacher, one, False), theirs("untied")["no image"][1]) <= tm.TOLERANCE


def test_the_tower_is_shared_only_without_an_adapter_of_its_own(pairs, adapted):
    assert shares_vision({"lora": {"layers": adapted.lora["layers"]}})
    assert not shares_vision({"lora": adapted.lora})
    assert not shares_vision({"params": pairs["untied"].base})


def test_full_fine_tuning_overlays_the_base(pairs):
    base = pairs["tied"].base
    trained = {"params": jax.tree.map(np.zeros_like, base)}
    assert student_variables(base, trained)["params"] is trained["params"]
    assert teacher_variables(base, {}) == {"params": base}
    assert not any(np.any(x) for x in jax.tree.leaves(teacher_variables(base, trained)["params"]))


def test_what_lies_over_the_base_for_teachers():
    trained, average = {"lora": 1.0}, {"lora": 2.0}
    got = {w: teacher_params_of(w, trained=trained, average=average) for w in CHOICES["teacher.weights"]}
    assert got == {"frozen": {}, "ema": average, "live": trained}
    assert teacher_variables(0.0, got["ema"]) == {"params": 0.0, "lora": 2.0}


def test_no_gradient_flows_to_a_teacher():
    gradient = jax.grad(lambda base, lora: sum(jax.tree.leaves(teacher_variables(base, {"lora": lora}))), (0, 1))
    assert gradient(1.0, 2.0) == (0, 0)


def test_layers_are_recomputed_when_asked(pairs, batch, adapted):
    """The backward pass of tower and decoder with `remat`, traced but not compiled."""
    base = pairs["untied"].base

    def gradient(remat):
        model = adapted.model.clone(remat=remat)

        def loss(lora):
            variables = student_variables(base, {"lora": lora})
            images = model.apply(variables, batch.vision, method="encode_images")
            return model.apply(variables, batch.text, images)[0].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(adapted.lora))

    none, dots, full = (gradient(remat) for remat in ("none", "dots", "full"))
    assert full.count("prevent_cse=False") >= 2 and "prevent_cse" not in none
    assert "policy=None" in full and "policy=None" not in dots and dots.count("prevent_cse=False") >= 2


# -- packing ----------------------------------------------------------------------------------------------------


def test_the_mask_of_branches_is_as_drawn():
    drawing = """
        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1
    """
    expected = np.array([[c == "1" for c in line.split()] for line in drawing.split("\n") if line.strip()])
    mask = np.asarray(Branches(jnp.array([[1, 1, 2, 2, 3]])).dense(5))
    np.testing.assert_array_equal(mask[0], expected)
    padded = np.asarray(Branches(jnp.array([[0, 0, 1, 1, 2, 2, 3, 0]])).dense(8))[0]
    np.testing.assert_array_equal(padded[2:7, 2:7], expected)
    assert not padded[:, [0, 1, 7]].any()  # nobody sees padding
    assert not padded[:2].any()


def test_a_packed_row_equals_its_branches_alone(pairs):
    """A prefix with an image and two branches in one sequence give the logits of prefix + branch, each by itself."""
    parity.check_packed_row(pairs["tied"])


# -- geometry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [5],
        [tm.WIDE],
        [3, tm.WIDE, 4],
        [3, tm.TALL, tm.WIDE, 2],
        [tm.SMALL, 1, tm.SMALL, 1, tm.TALL],
        [2, (1, 2, 2), 3],
        [2, (3, 4, 8), 3, (2, 8, 4)],  # frames
    ],
)
def test_mrope_positions_are_those_of_transformers(parts):
    sample = tm.make_sample(parts, seed=0)
    ids = torch.tensor([sample.ids])
    expected, delta = tm.cached_model(tied=True).model.get_rope_index(
        ids, mm_token_type_ids=(ids == tm.IMAGE).int(), image_grid_thw=torch.tensor(sample.grids)
    )
    positions = geometry.mrope_positions(sample.ids, sample.grids, visual_ids=(tm.IMAGE, tm.VIDEO), merge_size=2)
    np.testing.assert_array_equal(positions, expected[:, 0])
    assert positions.dtype == np.int32
    assert positions.max() + 1 == len(sample.ids) + int(delta[0, 0])  # where decoding goes on


def test_mrope_positions_of_nothing():
    assert geometry.mrope_positions([], [], visual_ids=(tm.IMAGE, tm.VIDEO), merge_size=2).shape == (3, 0)


side = st.integers(1, 11).map(lambda n: 2 * n)
grids_strategy = st.lists(st.tuples(st.integers(1, 2), side, side), max_size=3)


@given(grids_strategy)
@settings(max_examples=30)
def test_vision_layout(grids):
    """Every patch has one slot, every window holds patches of one window of one frame, tokens are in reading order."""
    vision = ModelConfig.from_hf(tm.tiny_config(tied=True).to_dict()).vision
    layout = geometry.vision_layout(grids, vision)
    # Frame, row and column of every patch, from the order in which the image processor writes them.
    frame, where = [], []
    for image, (t, h, w) in enumerate(grids):
        order = np.arange(h * w).reshape(h // 2, 2, w // 2, 2).transpose(0, 2, 1, 3).reshape(-1)
        for i in range(t):
            frame += [(image, i)] * (h * w)
            where += [divmod(int(n), w) for n in order]
    used = layout.source >= 0
    assert all(a.dtype == np.int32 for a in dataclasses.astuple(layout))
    assert sorted(layout.source[used]) == list(range(len(frame)))
    assert len(layout.source) % vision.window_patches == 0
    assert ((layout.image_ids > 0) == used).all()
    np.testing.assert_array_equal(layout.hw[used], np.array(where).reshape(-1, 2)[layout.source[used]])
    numbers = {f: n + 1 for n, f in enumerate(dict.fromkeys(frame))}
    assert [numbers[frame[s]] for s in layout.source[used]] == layout.image_ids[used].tolist()

    squares = {}  # which 8 x 8 square of which frame each window holds
    for n, window in enumerate(layout.source.reshape(-1, vision.window_patches)):
        held = {(frame[s], where[s][0] // 8, where[s][1] // 8) for s in window[window >= 0]}
        assert len(held) == 1
        squares[n] = held.pop()
    assert len(set(squares.values())) == len(squares)

    tokens = sum(geometry.visual_token_count(g, 2) for g in grids)
    assert layout.token_unit.shape == (tokens,)
    units = layout.source.reshape(-1, 4)[layout.token_unit] if tokens else np.zeros((0, 4))
    np.testing.assert_array_equal(units, np.arange(4 * tokens).reshape(-1, 4))


# -- parameters -------------------------------------------------------------------------------------------------


def test_abstract_variables_are_those_that_exist(pairs, adapted):
    for pair in pairs.values():
        abstract = abstract_variables(pair.model)
        assert set(abstract) == {"params"}
        assert jax.tree.map(jnp.shape, pair.base) == jax.tree.map(lambda x: x.shape, abstract["params"])
        assert ("lm_head" in abstract["params"]) != pair.config.tie_embeddings
    assert set(abstract_variables(adapted.model)) == {"params", "lora"}


def test_bfloat16_stays_near_float32(pairs):
    """The computation dtype reaches tower and decoder, and logits come back in float32."""
    pair, sample = pairs["tied"], pack([SAMPLES["text between images"]])
    variables = {"params": jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), pair.base)}
    images, logits = make_run(pair.model.clone(dtype=jnp.bfloat16))(variables, sample.vision, sample.text)
    assert images.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    expected = theirs("tied")["text between images"][1]
    difference = np.abs(np.asarray(logits)[0, : len(expected)] - expected)
    assert tm.TOLERANCE < difference.mean() < 0.1
