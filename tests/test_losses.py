"""The packed, chunked objective against the plain one, and what must not hold: wrong contexts, whole logits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from oracles import objective as oracle
from tiny import CONFIG, MIXES, MODEL, ROLES, pack

from vigos_jax import losses, score
from vigos_jax.inputs import Entries
from vigos_jax.losses import EntryScores, RoleStats
from vigos_jax.models import qwen2_5_vl
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.qwen2_5_vl import Qwen2_5VL
from vigos_jax.packing import Buckets
from vigos_jax.step import TrainState, make_train_step

REPEATED = (MIXES["mixed"] * 2)[3:11]  # a bad row first


def total(scores, batch, roles=ROLES):
    stats = losses.role_stats(scores, batch.entries, roles=roles)
    return losses.total_loss(stats, stats.tokens, roles=roles), stats


def compare(mix, batch=None, *, model=MODEL, roles=ROLES, trained=None, oracle_trained=None):
    """Largest difference between the packed path and the plain one over all numbers of all entries.

    The sums, means and counts that follow are compared too, where the entries agree.
    """
    base, lora = tiny.weights()
    trained = {"lora": lora} if trained is None else trained
    batch = pack(mix, roles=roles) if batch is None else batch
    scores = tiny.scorer(roles, model=model)(base, trained, batch)
    expected, parts, entries = oracle.objective(model, base, oracle_trained or trained, mix, roles)
    worst, compared = 0.0, 0
    for (i, name), (position, *numbers) in entries.items():
        used = batch.entries.role[i] == [r.name for r in roles].index(name)
        assert list(batch.entries.position[i][used]) == list(position)
        compared += len(position)
        for got, want in zip((scores.kl, scores.student_logp, scores.teacher_logp), numbers, strict=True):
            worst = max(worst, np.abs(np.asarray(got)[i][used] - want).max())
    assert compared == (batch.entries.role >= 0).sum()

    loss, stats = total(scores, batch, roles)
    means = losses.role_losses(stats, stats.tokens)
    if worst < 1e-4:
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for r, part in enumerate(parts.values()):
            assert (stats.tokens[r], stats.clipped_tokens[r]) == (part["tokens"], part["clipped"])
            assert means[r] == pytest.approx(part["loss"], abs=1e-5)
    return worst


@pytest.mark.parametrize("mix", [*MIXES.values(), REPEATED], ids=[*MIXES, "repeated"])
def test_equals_the_plain_objective(mix):
    assert compare(mix) < 2e-5


def test_the_comparison_has_clipped_and_unclipped_entries_of_every_role():
    base, lora = tiny.weights()
    for part in oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], ROLES)[1].values():
        assert 0 < part["clipped"] < part["tokens"] and part["loss"] > 0.1


def test_equals_it_with_two_teachers_of_one_token():
    roles = (dataclasses.replace(ROLES[2], name="a", weight=0.5), ROLES[1], dataclasses.replace(ROLES[2], clip=0.0))
    assert compare(MIXES["mixed"], roles=roles) < 2e-5


@pytest.mark.parametrize("kind", ["params", "vision adapter"])
def test_equals_it_for_a_student_with_a_vision_tower_of_its_own(kind):
    model, base = MODEL, tiny.weights()[0]
    if kind == "params":
        noise = tiny.random_variables(MODEL, seed=1)["params"]
        trained = {"params": jax.tree.map(lambda a, b: a + 0.1 * b, base, noise)}
        other_tower = {"params": trained["params"] | {"visual": base["visual"]}}
    else:
        model = Qwen2_5VL(CONFIG, lora=LoraSpec(rank=8, scale=2.0, vision=frozenset(("gate_proj", "down_proj"))))
        trained = {"lora": tiny.random_variables(model)["lora"]}
        other_tower = jax.tree.map(jnp.zeros_like, trained)
    assert compare(MIXES["mixed"], model=model, trained=trained) < 2e-5
    assert compare(MIXES["mixed"], model=model, trained=trained, oracle_trained=other_tower) > 0.1


def test_gradient_is_the_slope_of_the_plain_objective():
    """Central differences along two directions: a gradient that leaks into a teacher, or is cut, shows here."""
    roles = tuple(dataclasses.replace(r, clip=0.0) for r in ROLES)  # smooth
    base, lora = tiny.weights()
    mix = MIXES["mixed"]
    batch = pack(mix)
    run = functools.partial(score.score_batch, MODEL, base, roles=roles, chunk=5)
    gradient = tiny.jit(jax.grad(lambda lora: total(run({"lora": lora}, batch), batch, roles)[0]))(lora)
    noise = tiny.random_variables(MODEL, seed=1)["lora"]
    for direction in (gradient, noise):
        norm = sum(jnp.sum(x**2) for x in jax.tree.leaves(direction)) ** 0.5
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, direction))) / norm
        along = [
            jax.tree.map(lambda a, b: a + h / norm * b, lora, direction)  # noqa: B023
            for h in (0.005, -0.005)
        ]
        up, down = (oracle.objective(MODEL, base, {"lora": x}, mix, roles)[0] for x in along)
        assert abs(slope) > 0.02
        assert slope == pytest.approx((up - down) / 0.01, rel=5e-3)


# The comparison must be able to fail.


def swapped(mix, a, b):
    """The same rows with the turns of two roles exchanged."""

    def swap(row):
        turns = list(row.teachers)
        if turns:
            turns[a], turns[b] = turns[b], turns[a]
        return dataclasses.replace(row, teachers=tuple(turns))

    return tuple((swap(row), rollout) for row, rollout in mix)


@pytest.mark.parametrize("roles", [(0, 1), (1, 2)])
def test_fails_with_the_context_of_another_role(roles):
    assert compare(MIXES["mixed"], pack(swapped(MIXES["mixed"], *roles))) > 0.1


def test_fails_without_the_adapter():
    base, lora = tiny.weights()
    nothing = {"lora": jax.tree.map(jnp.zeros_like, lora)}
    assert compare(MIXES["mixed"], trained=nothing, oracle_trained={"lora": lora}) > 0.1


def test_fails_with_the_pictures_of_another_row():
    batch = pack(MIXES["all valid"])
    moved = batch.vision.replace(patches=np.roll(batch.vision.patches, 1, 0))
    assert compare(MIXES["all valid"], batch.replace(vision=moved)) > 0.1


def test_fails_with_two_pictures_exchanged():
    mix = tuple((row, rollout) for row, rollout in MIXES["mixed"] if len(row.images) == 2) * 8
    (a, b), row = mix[0][0].images, mix[0][0]
    first = dataclasses.replace(a, patches=np.concatenate([b.patches, a.patches])[: len(a.patches)])
    changed = tuple((dataclasses.replace(row, images=(first, b)), rollout) for _, rollout in mix)
    assert compare(mix) < 2e-5
    assert compare(mix, pack(changed)) > 0.1


def test_fails_when_branches_see_each_other():
    batch = pack(MIXES["mixed"])
    one_segment = batch.teacher.replace(segment_ids=np.minimum(batch.teacher.segment_ids, 1))
    assert compare(MIXES["mixed"], batch.replace(teacher=one_segment)) > 0.1


def test_fails_when_positions_run_on_from_branch_to_branch():
    batch = pack(MIXES["mixed"])
    t = batch.teacher
    in_branch = t.segment_ids[:, None] > 1  # [B, 1, T]
    after_prefix = np.max(np.where(in_branch, 0, t.positions), (1, 2), keepdims=True)
    moved = np.where(in_branch, after_prefix + np.cumsum(in_branch, -1), t.positions).astype(np.int32)
    assert compare(MIXES["mixed"], batch.replace(teacher=t.replace(positions=moved))) > 0.1


# The divergence itself.


def random_logits(shape, scale=4.0):
    rng = np.random.default_rng(0)
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("is_reverse", [False, True])
def test_divergence(is_reverse):
    student, teacher = random_logits((5, 7, 50))
    kl, log_p, log_q = losses.divergence(student, teacher, jnp.full((5, 7), is_reverse))
    p, q = oracle.log_softmax(student), oracle.log_softmax(teacher)
    np.testing.assert_allclose(log_p, p, atol=1e-5)
    np.testing.assert_allclose(log_q, q, atol=1e-5)
    a, b = (p, q) if is_reverse else (q, p)
    np.testing.assert_allclose(kl, np.sum(np.exp(a) * (a - b), -1), rtol=1e-5)
    assert (kl > 0).all()


def test_divergence_is_float32_and_never_below_zero():
    student, teacher = random_logits((400, 50), scale=30.0)
    near = (teacher + 1e-3 * student).astype(np.float32)
    for a in (near, teacher, student):
        for is_reverse in (False, True):
            kl, log_p, _ = losses.divergence(a, teacher, jnp.full(400, is_reverse))
            assert kl.dtype == log_p.dtype == jnp.float32
            assert (kl > -1e-5).all()  # rounding, where both agree
    np.testing.assert_array_equal(losses.divergence(teacher, teacher, jnp.zeros(400, bool))[0], 0)
    assert losses.divergence(jnp.bfloat16(student), jnp.bfloat16(teacher), jnp.zeros(400, bool))[0].dtype == jnp.float32


def random_entries(b=3, e=11, d=8, v=50):
    rng = np.random.default_rng(0)
    role = rng.integers(-1, 3, (b, e)).astype(np.int32)
    token = rng.integers(0, v, (b, e)).astype(np.int32)
    zeros = np.zeros((b, e), np.int32)
    entries = Entries(role=role, student_at=zeros, teacher_at=zeros, position=zeros, token=token, sampled_logp=zeros)
    student, teacher = (jnp.asarray(rng.standard_normal((b, e, d)), jnp.float32) for _ in range(2))
    heads = [jnp.asarray(rng.standard_normal((d, v)), jnp.float32) for _ in range(2)]
    return student, teacher, entries, heads


@pytest.mark.parametrize("chunk", [1, 4, 500])
def test_chunk_size_changes_nothing(chunk):
    student, teacher, entries, heads = random_entries()

    def run(student, head, chunk):
        out = losses.score_entries(
            student,
            teacher,
            entries,
            roles=ROLES,
            student_head=lambda h: h @ head,
            teacher_head=lambda h: h @ heads[1],
            chunk=chunk,
        )
        return total(out, dataclasses.replace(pack(MIXES["mixed"]), entries=entries))[0], out

    both = tiny.jit(jax.value_and_grad(run, (0, 1), has_aux=True), static_argnums=2)
    got, want = (both(student, heads[0], c) for c in (chunk, 11))
    assert got[0][1].kl.shape == (3, 11)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    _, log_p, log_q = losses.divergence(student @ heads[0], teacher @ heads[1], jnp.zeros((3, 11), bool))
    scores = got[0][1]
    for logp, log_probs in ((scores.student_logp, log_p), (scores.teacher_logp, log_q)):
        np.testing.assert_allclose(logp, np.take_along_axis(log_probs, entries.token[..., None], -1)[..., 0], atol=1e-5)


def entries_of(role):
    role = np.array(role, np.int32)
    zeros = np.zeros_like(role)
    return Entries(role=role, student_at=zeros, teacher_at=zeros, position=zeros, token=zeros, sampled_logp=zeros)


def test_clipped_entries_have_no_gradient_and_stay_in_the_denominator():
    roles = (dataclasses.replace(ROLES[0], clip=0.05), dataclasses.replace(ROLES[1], clip=0.0, weight=3.0))
    entries = entries_of([[0, 0, 1, 1], [0, -1, -1, -1]])
    kl = jnp.array([[0.01, 0.2, 0.3, 7.0], [0.04, 0.02, 9.0, 0.0]])

    def loss(kl):
        stats = losses.role_stats(EntryScores(kl, kl, kl), entries, roles=roles)
        return losses.total_loss(stats, stats.tokens, roles=roles), stats

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(kl)
    np.testing.assert_allclose(stats.clipped_kl_sum, [0.01 + 0.05 + 0.04, 7.3], rtol=1e-6)
    assert list(stats.tokens) == [3, 2] and list(stats.clipped_tokens) == [1, 0]
    assert value == pytest.approx(0.1 / 3 + 3 * 7.3 / 2, rel=1e-6)
    np.testing.assert_allclose(gradient, [[1 / 3, 0, 3 / 2, 3 / 2], [1 / 3, 0, 0, 0]], rtol=1e-6)


def test_a_role_without_tokens_gives_zero():
    stats = RoleStats(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
    assert losses.total_loss(stats, stats.tokens, roles=ROLES) == 0


# [T, V] logits never exist.

V = 1009  # a prime: an array whose size is a multiple of it holds the vocabulary, however it is shaped
HLO_CONFIG = dataclasses.replace(CONFIG, vocab_size=V)
HLO_BUCKETS = Buckets(patches=(16,), prompt=(24,), completion=(96,), packed=(160,))


def most_rows_beside_the_vocabulary(text):
    """The largest number of vocabulary rows that one array of a compiled program holds."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]+)\]", text)
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}
    return max(size // V for size in sizes if size % V == 0)


def compiled_step(kind, chunk, accumulation=1):
    """HLO of the train step for two rows of 96 entries each."""
    model = Qwen2_5VL(HLO_CONFIG, lora=tiny.LORA)
    abstract = qwen2_5_vl.abstract_variables(model)
    trained = {"lora": abstract["lora"]} if kind == "lora" else {"params": abstract["params"]}
    tx = optax.adamw(1e-3)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(tx.init, trained))
    r = tiny.row(2, (4, 4))
    batch = pack(
        [(r, tiny.valid(0, 90, (0, 40), (41, 80), (81, 90))), (r, tiny.invalid(1, 96))],
        buckets=HLO_BUCKETS,
        config=HLO_CONFIG,
    )
    step = make_train_step(model, tx, roles=ROLES, chunk=chunk, accumulation=accumulation, use_dropout=False)
    jitted = tiny.jit(step, donate_argnums=0)
    return jitted.lower(state, abstract["params"], batch, jax.random.key(0)).compile().as_text()


@pytest.mark.parametrize("kind", ["lora", "params"])
def test_logits_exist_for_one_chunk_only(kind):
    # 2 rows of 24 entries; the embedding itself has 32 rows of the vocabulary's length
    assert most_rows_beside_the_vocabulary(compiled_step(kind, chunk=24)) == 2 * 24


def test_the_search_for_logits_can_fail():
    assert most_rows_beside_the_vocabulary(compiled_step("lora", chunk=96)) == 2 * 96
    assert most_rows_beside_the_vocabulary("f32[7]{0} bf16[96,2018]{1,0} s32[2,3,1009]{2,1,0} pred[]") == 192
