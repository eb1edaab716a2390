"""Packed branches over layers with a state: each equals its role alone, for all role tables that ship."""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_hybrid
from cases import others_slow
from oracles import objective as oracle
from tiny import MIXES, invalid, row, valid

import configs
from vigos_jax.method.packing import pack_scores, scored_positions, too_long
from vigos_jax.method.roles import OWN, role_table
from vigos_jax.method.scoring import supervised_states
from vigos_jax.models import hybrid
from vigos_jax.models.attention_masks import Branches

CLOSE, FAR = 1e-4, 1e-2
CONFIG, MODEL, BUCKETS = tiny_hybrid.CONFIG, tiny_hybrid.MODEL, tiny_hybrid.BUCKETS
CONFIGS = (
    *("paper", "released_code", "no_perception", "no_reasoning", "no_reference", "reference_forward_kl"),
    *("opsd", "opsd_same_prompt", "sdft_like", "base"),
)
SAMPLES = (
    (row(0, (4, 6), teachers=5), valid(0, 16, (0, 5), (6, 12), (13, 15))),
    (row(1, (4, 4), teachers=5), invalid(1, 9)),
    (row(4, (4, 4), (2, 6), teachers=5), valid(4, 14, (0, 6), (7, 9), (11, 13))),
    tiny.BAD,
)


@functools.cache
def roles_of(name: str) -> tuple:
    config = importlib.import_module(f"configs.{name}").get_config()
    return role_table(config.roles, config.prompts, data_fields=tuple(config.data.fields))


def samples_of(roles: tuple) -> list:
    return [(dataclasses.replace(r, teachers=r.teachers[: len(roles)]), rollout) for r, rollout in SAMPLES]


def pack(samples, roles, config=CONFIG):
    rows, rollouts = zip(*samples, strict=True)
    return pack_scores(rows, rollouts, roles=roles, config=config, buckets=BUCKETS)


@jax.jit
def _states(base, trained, batch):
    states = supervised_states(MODEL, base, trained, batch)
    return states.student @ states.student_head.T, states.teachers[""].hidden @ states.student_head.T


@functools.cache
def alone(kind: str, sample: int, turn: int, ids: tuple[int, ...]) -> np.ndarray:
    """Logits behind a prompt and these tokens, run by themselves. turn: -1 for the student's."""
    base, lora = tiny_hybrid.weights()
    r = SAMPLES[sample][0]
    prompt = (r.teachers[turn] if turn >= 0 else r.student).ids
    variables = {"params": base} | ({"lora": lora} if kind == "student" else {})
    return np.asarray(oracle.logits(MODEL, variables, r.images, prompt + ids))[len(prompt) - 1 :]


def compare(roles, batch, student, teacher) -> tuple[float, int]:
    """(largest difference of any entry's logits from its role alone, number of entries)."""
    e, worst, compared = batch.supervised, 0.0, 0
    for i, (_, rollout) in enumerate(SAMPLES):
        for slot in np.flatnonzero(e.role[i] >= 0):
            k, j = e.role[i, slot], e.position[i, slot]
            read = range(len(rollout.ids))
            if roles[k].reads == "scored":
                read = scored_positions(roles[k], rollout)
            of_teacher = alone("teacher", i, int(k), tuple(rollout.ids[m] for m in read))[list(read).index(j)]
            of_student = alone("student", i, -1, rollout.ids)[j]
            for got, want in ((student[i, slot], of_student), (teacher[i, slot], of_teacher)):
                worst = max(worst, float(np.abs(got - want).max()))
            compared += 1
    return worst, compared


def test_the_list_of_configs_is_whole():
    """The other configs that ship have one of these role tables, or further images or models: test_view_packing.py."""
    tables = {roles_of(name) for name in CONFIGS}
    names = [
        p.stem
        for p in pathlib.Path(configs.__file__).parent.glob("*.py")
        if p.stem != "__init__" and not p.stem.endswith("_base")
    ]
    others = [name for name in names if roles_of(name) not in tables]
    assert len(names) > 20 and len(others) == 5
    assert all({role.prefix for role in roles_of(name)} != {OWN} for name in others)


@pytest.mark.parametrize("name", others_slow(CONFIGS))
def test_each_entry_equals_its_role_alone(name):
    roles, (base, lora) = roles_of(name), tiny_hybrid.weights()
    batch = pack(samples_of(roles), roles)
    worst, compared = compare(roles, batch, *map(np.asarray, _states(base, {"lora": lora}, batch)))
    assert worst <= CLOSE
    assert compared == (batch.supervised.role >= 0).sum() > 10


# -- gradients, and what must fail ------------------------------------------------------------------------------

ROLES = tuple(dataclasses.replace(role, when="always") for role in tiny.ROLES)


@pytest.fixture(scope="module")
def batch():
    return pack(samples_of(ROLES), ROLES)


def values(batch, lora, text=None, **options):
    """The packed rows' teacher logits under an adapter, a fixed number for each summed up, and the logits."""
    base, rng = tiny_hybrid.weights()[0], np.random.default_rng(0)
    variables, model = {"params": base, "lora": lora}, MODEL.clone()
    images = model.apply(variables, batch.vision, method="encode_images")
    hidden, _ = model.apply(variables, batch.teacher if text is None else text, images, **options)
    at = jnp.asarray(batch.supervised.teacher_at)
    logits = model.apply(variables, jnp.take_along_axis(hidden, at[:, :, None], 1), method="logits")
    weights = rng.normal(size=(*at.shape, CONFIG.vocab_size)) * (batch.supervised.role >= 0)[:, :, None]
    return jnp.sum(logits * weights), logits


def separate(batch):
    """Each branch as a row of its own, prefix in front, right-padded, with the entries that it holds."""
    text, length = batch.teacher, 64
    rows = [(i, s) for i in range(len(SAMPLES)) for s in np.unique(text.segment_ids[i]) if s > 1]
    kept = [np.flatnonzero(np.isin(text.segment_ids[i], (1, s))) for i, s in rows]
    places = np.zeros((len(rows), *text.ids.shape[1:]), int)
    for n, at in enumerate(kept):
        places[n, at] = np.arange(len(at))

    def of_rows(x, fill=0):
        out = np.full((len(rows), *x.shape[1:-1], length), fill, x.dtype)
        for n, ((i, _), at) in enumerate(zip(rows, kept, strict=True)):
            out[n, ..., : len(at)] = x[i][..., at]
        return out

    return (
        rows,
        places,
        text.replace(
            ids=of_rows(text.ids),
            positions=of_rows(text.positions),
            segment_ids=np.minimum(of_rows(text.segment_ids), 1),
            image_index=of_rows(text.image_index, -1),
        ),
    )


@pytest.mark.slow
def test_gradients_are_those_of_separate_rows(batch):
    """The adapter's, of a sum over all entries, and so through the prefix's state."""
    lora = tiny_hybrid.weights()[1]
    rows, places, text = separate(batch)
    e = batch.supervised
    of_row = {pair: n for n, pair in enumerate(rows)}
    entry_row = np.zeros(e.role.shape, int)
    for i in range(len(SAMPLES)):
        for slot in np.flatnonzero(e.role[i] >= 0):
            entry_row[i, slot] = of_row[i, batch.teacher.segment_ids[i, e.teacher_at[i, slot]]]
    at = places[entry_row, e.teacher_at]

    def alone(lora):
        base, rng = tiny_hybrid.weights()[0], np.random.default_rng(0)
        variables = {"params": base, "lora": lora}
        images = MODEL.apply(variables, batch.vision, method="encode_images")[np.array([i for i, _ in rows])]
        hidden, _ = MODEL.apply(variables, text, images)
        logits = MODEL.apply(variables, hidden[entry_row, at], method="logits")
        weights = rng.normal(size=(*at.shape, CONFIG.vocab_size)) * (e.role >= 0)[:, :, None]
        return jnp.sum(logits * weights), logits

    grads, logits = jax.jit(jax.grad(functools.partial(values, batch), has_aux=True))(lora)
    expected, expected_logits = jax.jit(jax.grad(alone, has_aux=True))(lora)
    used = e.role >= 0
    assert np.abs(np.asarray(logits - expected_logits)[used]).max() <= CLOSE
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads), strict=True):
        size = np.abs(want).max()
        assert size > 0 and np.abs(got - want).max() <= CLOSE * size, jax.tree_util.keystr(path)


def off_by(batch, *, text=None, change=None, monkeypatch=None, **options) -> float:
    lora = tiny_hybrid.weights()[1]
    right = jax.jit(functools.partial(values, batch))(lora)[1]
    if change:
        change(monkeypatch)
    wrong = jax.jit(functools.partial(values, batch, text=text, **options))(lora)[1]
    return float(np.abs(np.asarray(right - wrong)[batch.supervised.role >= 0]).max())


@pytest.mark.slow
def test_fails_without_a_restart(batch):
    """The state and the convolution run on from branch to branch; attention still keeps them apart."""
    one = batch.teacher.replace(segment_ids=np.minimum(batch.teacher.segment_ids, 1))
    assert off_by(batch, text=one, mask=Branches(batch.teacher.segment_ids)) > FAR


@pytest.mark.slow
def test_fails_with_the_convolutions_neighbours_in_the_array(batch, monkeypatch):
    conv = hybrid.causal_conv
    change = lambda m: m.setattr(hybrid, "causal_conv", lambda u, w, segment_ids: conv(u, w, None))  # noqa: E731
    assert off_by(batch, change=change, monkeypatch=monkeypatch) > FAR


@pytest.mark.slow
def test_fails_where_branches_are_not_aligned(batch):
    config = dataclasses.replace(CONFIG, delta=dataclasses.replace(CONFIG.delta, chunk=1))
    tight = pack(samples_of(ROLES), ROLES, config)
    lora = tiny_hybrid.weights()[1]
    right, wrong = (jax.jit(functools.partial(values, b))(lora)[1] for b in (batch, tight))
    assert float(np.abs(np.asarray(right - wrong)[batch.supervised.role >= 0]).max()) > FAR


# -- the arrays -------------------------------------------------------------------------------------------------


def test_branches_start_at_multiples_of_the_chunk(batch):
    segments = batch.teacher.segment_ids
    for i in range(3):
        starts = [int(np.argmax(segments[i] == s)) for s in (2, 3, 4)]
        assert starts == [64, 128, 192]
    gaps = segments == 0
    assert (batch.teacher.ids[gaps] == 0).all() and (batch.teacher.image_index[gaps] == -1).all()
    assert (batch.teacher.positions.transpose(0, 2, 1)[gaps] == 0).all()


def test_the_tokens_are_those_of_rows_without_gaps(batch):
    """Alignment moves tokens and changes nothing else; a family of attention layers has no gaps."""
    tight = pack(samples_of(ROLES), ROLES, tiny.CONFIG)
    for i in range(len(SAMPLES)):
        a, b = (text.segment_ids[i] > 0 for text in (batch.teacher, tight.teacher))
        assert b[: b.sum()].all()
        for name in ("ids", "segment_ids", "image_index"):
            np.testing.assert_array_equal(getattr(batch.teacher, name)[i][a], getattr(tight.teacher, name)[i][b])
        np.testing.assert_array_equal(batch.teacher.positions[i][:, a], tight.teacher.positions[i][:, b])
    for x, y in zip(jax.tree.leaves(batch.student), jax.tree.leaves(tight.student), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("largest, fits", [(64 * 3 + 40, True), (64 * 3 + 8, False)])
def test_too_long_counts_the_gaps(largest, fits):
    buckets = dataclasses.replace(BUCKETS, sequence=(largest,))
    options = {"roles": ROLES, "buckets": buckets, "max_completion": 16}
    r = samples_of(ROLES)[0][0]
    assert (too_long(r, config=CONFIG, **options) is None) == fits
    assert too_long(r, config=tiny.CONFIG, **options) is None  # without gaps there is room
    if fits:
        rollout = tiny.valid(9, 16, (0, 5), (6, 12), (13, 16))
        pack_scores([r], [rollout], roles=ROLES, config=CONFIG, buckets=buckets)


def test_mixes_of_the_other_tests_fit():
    for mix in MIXES.values():
        pack(mix, tiny.ROLES)
