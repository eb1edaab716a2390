"""What must not matter, on random batches: order, padding, micro-batches, roles of weight 0, the reference elsewhere.

Each property is a check of a batch. That it can fail is shown with a deliberately broken variant.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mixes
from tiny import BUCKETS, MIXES, ROLES, pack

from vigos_jax.data.processor import Turn
from vigos_jax.method import losses
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.packing import Buckets
from vigos_jax.method.roles import DIVERGENCES, ENTRY_FIELDS, SPANS, role_table

few = settings(max_examples=15)
batches = mixes(min_rows=8, max_rows=8)  # of one size, so that nothing is compiled again
ONE_SIZE = dataclasses.replace(BUCKETS, sequence=(144,))  # one program, whatever the lengths
LARGER = Buckets(patches=(96,), prompt=(48,), completion=(24,), sequence=(72, 176))
OTHERS = (
    dataclasses.replace(ROLES[0], divergence="jsd", beta=0.3, when="always", last_clip=0.4),
    dataclasses.replace(ROLES[1], reads="scored", clip=0.2, clip_per="entry"),
    dataclasses.replace(ROLES[2], when="always", first_clip=0.1),
)
METHODS = {
    "the method": (ROLES, {}),
    "another": (OTHERS, {"temperature": 1.5, "reduction": "sequences", "teacher_weights": "live"}),
}
both = pytest.mark.parametrize("method", METHODS)


def step(mix, method="the method", *, buckets=BUCKETS, gradient_accumulation_steps=1):
    """(loss, flat gradient) of the train step on (row, rollout) pairs or on a packed batch."""
    (base, lora), (roles, options) = tiny.weights(), METHODS[method]
    batch = mix if isinstance(mix, ScoreBatch) else pack(mix, roles=roles, buckets=buckets)
    gradient, metrics = tiny.gradient_step(gradient_accumulation_steps, roles, **options)(base, {"lora": lora}, batch)
    return float(metrics["loss"]), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def check_same_step(got, want):
    assert abs(got[0] - want[0]) < 1e-5
    np.testing.assert_allclose(got[1], want[1], atol=1e-5, rtol=1e-5)


def scores(batch, roles=ROLES):
    """(kl, student_logp, teacher_logp), numpy [B, E] each."""
    base, lora = tiny.weights()
    out = tiny.scorer(roles)(base, {"lora": lora}, batch)
    return [np.asarray(x) for x in (out.divergence, out.student_logp, out.teacher_logp)]


# Order, padding, micro-batches.


@pytest.mark.slow
@both
@few
@given(batches, st.permutations(range(8)))
def test_order_of_rows(method, mix, order):
    check_same_step(step([mix[i] for i in order], method), step(mix, method))


def test_order_of_rows_can_fail():
    mix = MIXES["mixed"]
    moved = pack(mix[::-1]).replace(vision=pack(mix).vision)  # the pictures stay behind
    with pytest.raises(AssertionError):
        check_same_step(step(moved), step(mix))


@pytest.mark.slow
@both
@few
@given(batches)
def test_padding(method, mix):
    check_same_step(step(mix, method, buckets=LARGER), step(mix, method))


def test_padding_can_fail():
    def counted(buckets):  # as if the mean were over slots
        batch = pack(MIXES["mixed"], buckets=buckets)
        return batch.replace(supervised=batch.supervised.replace(role=np.maximum(batch.supervised.role, 0)))

    with pytest.raises(AssertionError):
        check_same_step(step(counted(LARGER)), step(counted(BUCKETS)))


@pytest.mark.slow
@both
@few
@given(batches)
def test_micro_batches(method, mix):
    want = step(mix, method)
    for gradient_accumulation_steps in (2, 4) if method == "the method" else (2,):
        check_same_step(step(mix, method, gradient_accumulation_steps=gradient_accumulation_steps), want)


@pytest.mark.slow
@both
def test_micro_batches_can_fail(method):
    """The mean of the micro-batches' own losses and gradients is another number."""
    mix = MIXES["mixed"]
    parts = [step(mix[a::2] * 2, method) for a in range(2)]  # the same rows twice have the mean that they have once
    mean = tuple((a + b) / 2 for a, b in zip(*parts, strict=True))
    with pytest.raises(AssertionError):
        check_same_step(mean, step(mix, method))


# A role of weight 0.

PROMPT = {"user": "{problem}", "assistant_prefill": ""}
extras = st.fixed_dictionaries(
    {
        "scores": st.lists(st.sampled_from(SPANS), min_size=1, max_size=3, unique=True),
        "when": st.sampled_from(["valid", "invalid", "always"]),
        "divergence": st.sampled_from(tuple(DIVERGENCES)),
        "clip": st.sampled_from([0.0, 0.5]),
    }
)


def with_extra(extra, place, weight):
    """(role table, row -> row with a turn for each of its roles), of `ROLES` and one more."""
    entries = [(r.name, {f: getattr(r, f) for f in ENTRY_FIELDS}) for r in ROLES]
    entries.insert(place, ("extra", extra | {"weight": weight}))
    table = role_table(dict(entries), {name: PROMPT for name, _ in entries})

    def turns(row):
        if row.student is None:
            return row
        own = dict(zip([r.name for r in ROLES], row.teachers, strict=True))
        own["extra"] = Turn(row.student.prefix_ids, (5, 6, 7))
        return dataclasses.replace(row, teachers=tuple(own[role.name] for role in table))

    return table, turns


def check_costs_nothing(mix, extra, place, weight):
    table, turns = with_extra(extra, place, weight)
    batch = pack([(turns(row), rollout) for row, rollout in mix], roles=table)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(pack(mix)), strict=True):
        np.testing.assert_array_equal(a, b)
    program = [dataclasses.replace(role, user="") for role in table]  # prompts are not the program's business
    assert program == list(ROLES)


@few
@given(batches, extras, st.integers(0, 3))
def test_weight_zero_costs_nothing(mix, extra, place):
    check_costs_nothing(mix, extra, place, 0)


def test_weight_zero_can_fail():
    extra = {"scores": ["completion"], "when": "always", "divergence": "jsd", "clip": 0.0}
    with pytest.raises(AssertionError):
        check_costs_nothing(MIXES["mixed"], extra, 0, 1e-6)


def check_left_out(mix, kept):
    """The weighted means of the other roles are the same without the first; `kept` are the turns that are kept."""

    def parts(mix, roles):
        batch = pack(mix, roles=roles)
        shape = batch.supervised.role.shape
        out = losses.TokenScores(*scores(batch, roles), np.zeros(shape), np.ones(shape))
        stats = losses.role_stats(out, batch.supervised, losses.ObjectiveConfig(roles, chunk=5))
        means = losses.role_losses(stats, stats.normalizer)
        return {role.name: role.weight * float(x) for role, x in zip(roles, means, strict=True)}

    without = [
        (dataclasses.replace(row, teachers=tuple(row.teachers[k] for k in kept)) if row.student else row, rollout)
        for row, rollout in mix
    ]
    whole, fewer = parts(mix, ROLES), parts(without, ROLES[1:])
    assert whole.keys() - fewer.keys() == {"perception"}
    assert all(abs(fewer[name] - whole[name]) < 1e-5 for name in fewer)


@pytest.mark.slow
@few
@given(batches)
def test_a_role_left_out_changes_nothing_for_the_others(mix):
    check_left_out(mix, kept=(1, 2))


def test_a_role_left_out_can_fail():
    with pytest.raises(AssertionError):
        check_left_out(MIXES["mixed"], kept=(0, 2))


# The reference text reaches the teachers that are shown it, and nobody else.


def with_reference(mix, seed, *, longer, leaks_to=()):
    """Other random tokens in the turns of the reasoning and reference roles, and of those that they leak to.

    Args:
      longer: tokens by which those turns grow; 0 keeps every length.
    """
    rng = np.random.default_rng(seed)

    def changed(turn):
        return Turn(turn.prefix_ids, tiny.words(rng, len(turn.rest_ids) + longer))

    def row_of(row):
        turns = [changed(t) if k in (1, 2, *leaks_to) else t for k, t in enumerate(row.teachers)]
        return dataclasses.replace(row, teachers=tuple(turns))

    return [(row_of(row), rollout) for row, rollout in mix]


def check_reference(mix, changed, *, tolerance):
    """The largest change of a number that may change, where all that must not are the same."""
    before, after = (pack(x, buckets=ONE_SIZE) for x in (mix, changed))
    used = before.supervised.role >= 0
    np.testing.assert_array_equal(before.supervised.role, after.supervised.role)
    blind = before.supervised.role == 0
    free = 0.0
    for name, a, b in zip(("kl", "student", "teacher"), scores(before), scores(after), strict=True):
        kept = used if name == "student" else blind
        np.testing.assert_allclose(b[kept], a[kept], rtol=tolerance, atol=tolerance, err_msg=name)
        free = max(free, np.abs(b - a)[used & ~kept].max(initial=0.0))
    return free


@pytest.mark.slow
@few
@given(batches, st.integers(0, 99))
def test_reference_text_stays_where_it_is_shown(mix, seed):
    for longer, tolerance in ((0, 0.0), (3, 1e-6)):
        moved = check_reference(mix, with_reference(mix, seed, longer=longer), tolerance=tolerance)
        assert moved > 1e-3 or not (pack(mix).supervised.role > 0).any()


@pytest.mark.parametrize("longer", [0, 3])
def test_reference_text_can_leak(longer):
    mix = MIXES["mixed"]
    assert check_reference(mix, with_reference(mix, 0, longer=longer), tolerance=1e-6) > 1e-3
    with pytest.raises(AssertionError, match="teacher|kl"):
        check_reference(mix, with_reference(mix, 0, longer=longer, leaks_to=(0,)), tolerance=1e-6)
