"""The divergences over the vocabulary, clips and means per role; and that whole logits never exist."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from oracles import objective as oracle
from tiny import CONFIG, ROLES, pack

from vigos_jax.config_limits import CHOICES
from vigos_jax.method import divergences, losses
from vigos_jax.method import roles as role_tables
from vigos_jax.method.batch import SupervisedStates, SupervisedTokens, TeacherStates
from vigos_jax.method.losses import RoleStats, TokenScores
from vigos_jax.method.packing import Buckets
from vigos_jax.models import vlm
from vigos_jax.training.step import TrainState, make_train_step

FORWARD, REVERSE = ROLES[0], ROLES[2]
JSD = dataclasses.replace(FORWARD, divergence="jsd", beta=0.3)


def replaced(role, **fields):
    return dataclasses.replace(role, **fields)


# The divergence itself.


def random_logits(shape, scale=4.0):
    rng = np.random.default_rng(0)
    return tuple((scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(2))


def plain(roles, student, teacher, role, temperature=1.0):
    """[N] divergences in float64, entry by entry."""
    p, q = oracle.log_softmax(student / temperature), oracle.log_softmax(teacher / temperature)
    return np.array([oracle.divergence(roles[r], a, b) for r, a, b in zip(role, p, q, strict=True)])


KINDS = (
    FORWARD,
    REVERSE,
    JSD,
    replaced(JSD, beta=0.9),
    replaced(FORWARD, clip=0.02, clip_per="entry"),
    replaced(REVERSE, clip=0.1, clip_per="entry"),
    replaced(JSD, clip=0.005, clip_per="entry"),
)
TABLES = [(k,) for k in KINDS] + [(KINDS[0], KINDS[1]), KINDS[:3], KINDS]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("roles", TABLES, ids=lambda t: " ".join(f"{r.divergence}{r.beta}{r.clip_per[0]}" for r in t))
def test_divergence(roles, temperature):
    student, teacher = random_logits((70, 50))
    role = np.arange(70) % len(roles)
    kl, _ = divergences.divergence(student, teacher, role, roles=roles, temperature=temperature)
    want = plain(roles, student, teacher, role, temperature)
    np.testing.assert_allclose(kl, want, rtol=1e-5, atol=1e-6)
    for other in KINDS:  # none can be taken for another
        if other not in roles:
            wrong = plain((other,), student, teacher, 0 * role, temperature)
            assert np.abs(wrong - want).max() > 1e-3


def test_a_new_divergence_is_one_row(monkeypatch):
    """Half the squared distance of the log-probabilities, weighed by the teacher: value, gradient, role."""

    def terms(log_p, log_q, p, q):
        return 0.5 * q * (log_p - log_q) ** 2, q * (log_p - log_q)

    table = divergences.DIVERGENCES | {"squared": divergences.Divergence(terms)}
    monkeypatch.setattr(divergences, "DIVERGENCES", table)
    monkeypatch.setattr(role_tables, "DIVERGENCES", table)
    entry = {"scores": ("completion",), "when": "always", "divergence": "squared", "weight": 1.0, "clip": 0.0}
    prompt = {"user": "", "assistant_prefill": ""}
    (own,) = role_tables.role_table({"own": entry}, {"own": prompt})
    student, teacher = random_logits((12, 30))
    role = np.arange(12) % 2

    def value(student):
        return jnp.sum(divergences.divergence(student, teacher, role, roles=(own, REVERSE), temperature=1.5)[0])

    def plainly(student):
        log_p, log_q = jax.nn.log_softmax(student / 1.5), jax.nn.log_softmax(teacher / 1.5)
        squared = 0.5 * jnp.sum(jnp.exp(log_q) * (log_p - log_q) ** 2, -1)
        return jnp.sum(jnp.where(role == 0, squared, jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)))

    _, gradient = divergences.divergence(student, teacher, role, roles=(own, REVERSE), temperature=1.5)
    np.testing.assert_allclose(value(student), plainly(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(plainly)(student), atol=1e-5)
    with pytest.raises(AssertionError):  # another row of the table is another divergence
        np.testing.assert_allclose(gradient, jax.grad(lambda s: 2 * plainly(s))(student), atol=1e-5)


def test_the_limits_of_the_mixture():
    """Divided by the smaller share, jsd goes to forward_kl with beta to 0, and to reverse_kl with beta to 1."""
    student, teacher = random_logits((20, 50), scale=1.0)
    role = np.zeros(20, int)
    of = lambda r: divergences.divergence(student, teacher, role, roles=(r,), temperature=1.0)[0]  # noqa: E731
    for beta, end in ((1e-3, FORWARD), (1 - 1e-3, REVERSE)):
        np.testing.assert_allclose(of(replaced(JSD, beta=beta)) / min(beta, 1 - beta), of(end), rtol=1e-2)
    swapped, _ = divergences.divergence(teacher, student, role, roles=(replaced(JSD, beta=0.7),), temperature=1.0)
    np.testing.assert_allclose(of(JSD), swapped, rtol=1e-5)


def test_divergence_is_float32_and_never_below_zero():
    student, teacher = random_logits((400, 50), scale=30.0)
    near = (teacher + 1e-3 * student).astype(np.float32)
    role = jnp.zeros(400, int)
    for kind in (FORWARD, REVERSE, JSD):
        of = lambda a, b, kind=kind: divergences.divergence(a, b, role, roles=(kind,), temperature=1.0)[0]  # noqa: E731
        for a in (near, teacher, student):
            kl = of(a, teacher)
            assert kl.dtype == jnp.float32 and np.isfinite(kl).all()
            assert (kl > -1e-5).all()  # rounding, where both agree
        np.testing.assert_allclose(of(teacher, teacher), 0, atol=0 if kind is not JSD else 1e-6)
        assert of(jnp.bfloat16(student), jnp.bfloat16(teacher)).dtype == jnp.float32


def test_a_clip_per_entry_of_a_sum_of_signed_terms_can_be_negative():
    role = replaced(FORWARD, clip=0.01, clip_per="entry")
    student, teacher = random_logits((70, 50))
    assert divergences.divergence(student, teacher, np.zeros(70, int), roles=(role,), temperature=1.0)[0].min() < 0


@pytest.mark.parametrize("roles", [KINDS[:3], KINDS[4:]], ids=["plain", "clipped per entry"])
def test_gradient_of_the_divergence(roles):
    """Central differences of the float64 divergence, logit by logit."""
    student, teacher = random_logits((6, 9), scale=2.0)
    role, h = np.arange(6) % 3, 1e-6
    _, gradient = divergences.divergence(student, teacher, role, roles=roles, temperature=2.0)
    for v in range(9):
        step = h * np.eye(9)[v]
        up, down = (plain(roles, student.astype(np.float64) + s, teacher, role, 2.0) for s in (step, -step))
        np.testing.assert_allclose(gradient[:, v], (up - down) / (2 * h), atol=2e-6)
    assert np.abs(gradient).max(1).min() > 1e-3


# Clips, shares and means.


def entries_of(role, clip=np.inf, token=None):
    role = np.array(role, np.int32)
    zeros = np.zeros_like(role)
    clip = np.broadcast_to(np.asarray(clip, np.float32), role.shape)
    token = zeros if token is None else token
    rest = dict.fromkeys(("student_at", "teacher_at", "position", "sampled_logp"), zeros)
    return SupervisedTokens(role=role, token=token, clip=clip, **rest)


def objective(roles=ROLES, *, chunk=4, **options):
    return losses.ObjectiveConfig(roles, chunk, **options)


def scores_of(kl, entropy=None):
    return TokenScores(kl, kl, kl, kl if entropy is None else entropy, jnp.ones_like(kl))


def random_entries(b=3, e=11, d=8, v=50):
    rng = np.random.default_rng(0)
    role = rng.integers(-1, 3, (b, e))
    token = rng.integers(0, v, (b, e)).astype(np.int32)
    entries = entries_of(role, clip=np.where(role == 1, 2.0, np.inf), token=token)
    student, teacher = (jnp.asarray(rng.standard_normal((b, e, d)), jnp.float32) for _ in range(2))
    heads = [jnp.asarray(rng.standard_normal((v, d)), jnp.float32) for _ in range(2)]
    return student, teacher, entries, heads


def weights_of(entries):
    normalizers = jnp.sum(losses.normalizer_terms(entries, objective()), (0, 1))
    return losses.loss_weights(entries, normalizers, objective())


def states_of(student, head, teacher, teacher_head):
    return SupervisedStates(student, head, {"": TeacherStates(teacher, teacher_head)})


@pytest.mark.parametrize("chunk", [1, 4, 500])
@pytest.mark.parametrize("trains_head", [True, False])
def test_fused_loss_and_gradient_are_those_of_plain_autodiff(chunk, trains_head):
    """Value, scores, and gradients at states and head, in the presence of clips, padding and another factor behind."""
    student, teacher, entries, heads = random_entries()

    def fused(student, head):
        states = states_of(student, head, teacher, heads[1])
        options = objective(chunk=chunk, temperature=1.7)
        out = losses.weighted_loss(states, entries, weights_of(entries), options, trains_head=trains_head)
        return 3.0 * out[0], out[1]

    def plain_loss(student, head):
        log_p = jax.nn.log_softmax(student @ head.T / 1.7)
        log_q = jax.nn.log_softmax(teacher @ heads[1].T / 1.7)
        forward, reverse = (jnp.sum(jnp.exp(a) * (a - b), -1) for a, b in ((log_q, log_p), (log_p, log_q)))
        kl = jnp.where(entries.role == 2, reverse, forward)
        return 3.0 * jnp.sum(weights_of(entries) * jnp.minimum(kl, entries.clip)), kl

    both = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(student, heads[0]) for f in (fused, plain_loss)]
    ((got, scores), gradients), ((want, kl), expected) = both
    assert got == pytest.approx(float(want), rel=1e-6) and 0 < (kl > entries.clip).sum() < (entries.role == 1).sum()
    np.testing.assert_allclose(scores.divergence, kl, atol=2e-5)
    np.testing.assert_allclose(gradients[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(gradients[1], expected[1] if trains_head else 0, atol=5e-6)
    assert np.abs(expected[0]).max() > 0.1 and np.abs(expected[1]).max() > 0.1

    stats = losses.role_stats(scores, entries, objective())
    assert got / 3 == pytest.approx(float(losses.total_loss(stats, stats.normalizer, objective())), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 500])
def test_scores_are_those_of_whole_logits(chunk):
    student, teacher, entries, heads = random_entries()
    scores = losses.score_tokens(states_of(student, heads[0], teacher, heads[1]), entries, objective(chunk=chunk))
    assert scores.divergence.shape == (3, 11)
    p, q = oracle.log_softmax(student @ heads[0].T), oracle.log_softmax(teacher @ heads[1].T)
    for logp, log_probs in ((scores.student_logp, p), (scores.teacher_logp, q)):
        np.testing.assert_allclose(logp, np.take_along_axis(log_probs, entries.token[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(scores.entropy, -np.sum(np.exp(p) * p, -1), atol=1e-5)
    alone = losses.token_logps({"": TeacherStates(teacher, heads[1])}, entries, objective(chunk=chunk))
    np.testing.assert_allclose(alone, scores.teacher_logp, atol=1e-6)


def test_the_temperature_is_of_the_divergence_alone():
    student, teacher, entries, heads = random_entries()
    states = states_of(student, heads[0], teacher, heads[1])
    run = lambda t: losses.score_tokens(states, entries, objective(temperature=t))  # noqa: E731
    one, three = run(1.0), run(3.0)
    assert (three.divergence < 0.5 * one.divergence).all()
    for field in ("student_logp", "teacher_logp", "entropy"):
        np.testing.assert_array_equal(getattr(one, field), getattr(three, field))


def test_clipped_entries_have_no_gradient_and_stay_in_the_denominator():
    roles = (FORWARD, replaced(ROLES[1], weight=3.0))
    entries = entries_of([[0, 0, 1, 1], [0, -1, -1, -1]], clip=[[0.05, 0.05, np.inf, np.inf], [0.05] * 4])
    kl = jnp.array([[0.01, 0.2, 0.3, 7.0], [0.04, 0.02, 9.0, 0.0]])

    def loss(kl):
        stats = losses.role_stats(scores_of(kl), entries, objective(roles))
        return losses.total_loss(stats, stats.normalizer, objective(roles)), stats

    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(kl)
    np.testing.assert_allclose(stats.loss, [0.01 + 0.05 + 0.04, 7.3], rtol=1e-6)
    assert list(stats.tokens) == list(stats.normalizer) == [3, 2] and list(stats.clipped_tokens) == [1, 0]
    np.testing.assert_allclose(stats.entropy, [0.01 + 0.2 + 0.04, 7.3], rtol=1e-6)
    assert value == pytest.approx(0.1 / 3 + 3 * 7.3 / 2, rel=1e-6)
    np.testing.assert_allclose(gradient, [[1 / 3, 0, 3 / 2, 3 / 2], [1 / 3, 0, 0, 0]], rtol=1e-6)


def test_a_mean_over_sequences_gives_every_rollout_one_share():
    entries = entries_of([[0, 0, 1, -1], [0, -1, -1, -1], [1, 1, 1, -1], [-1] * 4])
    shares = losses.normalizer_terms(entries, objective(ROLES[:2], reduction="sequences"))
    np.testing.assert_allclose(shares[..., 0], [[1 / 2, 1 / 2, 0, 0], [1, 0, 0, 0], [0] * 4, [0] * 4])
    np.testing.assert_allclose(shares[..., 1], [[0, 0, 1, 0], [0] * 4, [1 / 3, 1 / 3, 1 / 3, 0], [0] * 4])
    kl = jnp.array([[1.0, 3.0, 5.0, 9.0], [6.0, 9.0, 9.0, 9.0], [1.0, 2.0, 6.0, np.nan], [np.nan] * 4])
    by = {
        r: losses.role_stats(scores_of(kl), entries, objective(ROLES[:2], reduction=r))
        for r in CHOICES["loss.reduction"]
    }
    assert by.keys() == {"tokens", "sequences"}
    np.testing.assert_allclose(losses.role_losses(by["sequences"], by["sequences"].normalizer), [4.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(losses.role_losses(by["tokens"], by["tokens"].normalizer), [10 / 3, 14 / 4], rtol=1e-6)
    assert list(by["sequences"].normalizer) == [2, 2] and list(by["sequences"].tokens) == [3, 4]


def test_a_role_without_tokens_gives_zero():
    nothing = entries_of([[-1, -1]])
    for reduction, kl in itertools.product(CHOICES["loss.reduction"], (0.0, np.nan)):
        stats = losses.role_stats(scores_of(jnp.full((1, 2), kl)), nothing, objective(reduction=reduction))
        assert losses.total_loss(stats, stats.normalizer, objective()) == 0
    zeros = RoleStats(*(jnp.zeros(3) for _ in range(6)))
    assert losses.total_loss(zeros, zeros.normalizer, objective()) == 0


# [T, V] logits never exist.

V = 1009  # a prime: an array whose size is a multiple of it holds the vocabulary, however it is shaped
HLO_CONFIG = dataclasses.replace(CONFIG, vocab_size=V)
HLO_BUCKETS = Buckets(patches=(16,), prompt=(24,), completion=(96,), sequence=(160,))


def most_rows_beside_the_vocabulary(text):
    """The largest number of vocabulary rows that one array of a compiled program holds."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]+)\]", text)
    sizes = {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}
    return max(size // V for size in sizes if size % V == 0)


def compiled_step(kind, chunk, roles=ROLES):
    """HLO of the train step for two rows of 96 entries each."""
    model = vlm.VisionLanguageModel(HLO_CONFIG, lora=tiny.LORA)
    abstract = vlm.abstract_variables(model)
    trained = {"lora": abstract["lora"]} if kind == "lora" else {"params": abstract["params"]}
    tx = optax.adamw(1e-3)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trained, jax.eval_shape(tx.init, trained), {})
    r = tiny.row(2, (4, 4))
    batch = pack(
        [(r, tiny.valid(0, 90, (0, 40), (41, 80), (81, 90))), (r, tiny.invalid(1, 96))],
        buckets=HLO_BUCKETS,
        config=HLO_CONFIG,
    )
    step = make_train_step(model, tx, objective(roles, chunk=chunk), use_dropout=False)
    jitted = jax.jit(step, donate_argnums=0)
    return jitted.lower(state, abstract["params"], [batch], jax.random.key(0)).compile().as_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind, roles", [("lora", ROLES), ("params", ROLES), ("lora", (FORWARD, KINDS[6], KINDS[5]))])
def test_logits_exist_for_one_chunk_only(kind, roles):
    # 2 rows of 24 entries, student and teacher in one array if they have one head; the embedding itself has 32 rows
    wanted = 2 * 24 * (2 if kind == "lora" else 1)
    assert most_rows_beside_the_vocabulary(compiled_step(kind, chunk=24, roles=roles)) == wanted


def test_the_search_for_logits_can_fail():
    assert most_rows_beside_the_vocabulary(compiled_step("lora", chunk=96)) == 2 * 96 * 2
    assert most_rows_beside_the_vocabulary("f32[7]{0} bf16[96,2018]{1,0} s32[2,3,1009]{2,1,0} pred[]") == 192
