"""The fused head and divergence against whole logits, and the two-stage selection against `lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Result, compiled, flops, race, temporary_bytes
from vigos_jax.method.batch import SupervisedStates, SupervisedTokens, TeacherStates
from vigos_jax.method.losses import ObjectiveConfig, weighted_loss
from vigos_jax.method.roles import TeacherRole
from vigos_jax.rollouts.sampling import top_k

V, D, ROWS, ENTRIES, CHUNK = 151_936, 256, 8, 64, 16
ROLES = (
    TeacherRole("a", "", "", ("description",), "valid", "forward_kl", 1.0, 0.05),
    TeacherRole("b", "", "", ("completion",), "invalid", "reverse_kl", 2.0, 0.05),
)


def _fused(student, teacher, head, entries, weights):
    def loss(student):
        states = SupervisedStates(student, head, {"": TeacherStates(teacher, None)})
        return weighted_loss(states, entries, weights, ObjectiveConfig(ROLES, CHUNK), trains_head=False)[0]

    return jax.value_and_grad(loss)(student)


def _naive(student, teacher, head, entries, weights):
    """All logits, both directions, the gradient left to autodiff."""

    def loss(student):
        log_p, log_q = jax.nn.log_softmax(student @ head.T), jax.nn.log_softmax(teacher @ head.T)
        forward = jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1)
        reverse = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return jnp.sum(weights * jnp.minimum(jnp.where(entries.role == 1, reverse, forward), entries.clip))

    return jax.value_and_grad(loss)(student)


def _arguments():
    rng = np.random.default_rng(0)
    student = rng.standard_normal((ROWS, ENTRIES, D), np.float32)
    teacher = student + 0.05 * rng.standard_normal(student.shape, np.float32)
    head = rng.standard_normal((V, D), np.float32) * D**-0.5
    shape = (ROWS, ENTRIES)
    role = np.broadcast_to(np.arange(ROWS)[:, None] % 2, shape).astype(np.int32)
    rest = {k: np.zeros(shape, np.int32) for k in ("student_at", "teacher_at", "position", "token", "sampled_logp")}
    entries = SupervisedTokens(role=role, clip=np.full(shape, 0.05, np.float32), **rest)
    weights = np.full(shape, 1 / np.prod(shape), np.float32)
    return jax.tree.map(jnp.asarray, (student, teacher, head, entries, weights))


def kl() -> Result:
    arguments = _arguments()
    fused, naive = compiled(_fused, *arguments), compiled(_naive, *arguments)
    (a, da), (b, db) = naive(*arguments), fused(*arguments)
    assert abs(a - b) < 1e-5 and jnp.abs(da - db).max() < 1e-3 * jnp.abs(da).max()
    r = race(lambda: naive(*arguments), lambda: fused(*arguments))
    floor = 3 * 2 * ROWS * ENTRIES * D * V
    detail = (
        ("naive", f"{r.baseline:.2f} s"),
        ("fused", f"{r.ours:.2f} s, {floor / r.ours / 1e9:.0f} GFLOP/s of the three products it cannot do without"),
        ("entries", f"{ROWS * ENTRIES} of width {D}, float32, both directions"),
    )
    return Result("kl", f"head and divergence, forward and backward, V = {V:,}", r.ratio, 1.5, r.spread, detail)


def kl_memory() -> Result:
    arguments = _arguments()
    fused, naive = (temporary_bytes(compiled(f, *arguments)) for f in (_fused, _naive))
    logits = 4 * ROWS * ENTRIES * V
    detail = (
        ("naive", f"{naive / 2**20:.0f} MiB"),
        ("fused", f"{fused / 2**20:.0f} MiB"),
        ("one array of all logits", f"{logits / 2**20:.0f} MiB"),
    )
    return Result("kl_memory", "temporary memory of the same", naive / fused, 3.3, None, detail)


def topk() -> Result:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((32, V), np.float32))
    ties = jnp.round(logits, 1)
    two_stage, whole = (jax.jit(f, static_argnums=1) for f in (top_k, jax.lax.top_k))
    for x in (logits, ties):
        for got, want in zip(two_stage(x, 20), whole(x, 20), strict=True):
            np.testing.assert_array_equal(got, want)
    r = race(lambda: whole(logits, 20), lambda: two_stage(logits, 20), rounds=15, warm_up=3)
    detail = (
        ("lax.top_k", f"{1e3 * r.baseline:.1f} ms"),
        ("two stages", f"{1e3 * r.ours:.1f} ms, values and indices equal, ties included"),
        ("reading the logits once", f"{logits.nbytes / 2**20:.0f} MiB"),
    )
    return Result("topk", "B = 32, k = 20", r.ratio, 2.0, r.spread, detail)


def counts() -> dict[str, float]:
    """What the compiler says of the fused pass, for a test that runs no clock."""
    arguments = jax.eval_shape(_arguments)
    return {"fused": flops(compiled(_fused, *arguments)), "naive": flops(compiled(_naive, *arguments))}
