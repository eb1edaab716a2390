"""Roles whose teachers have weights of another size: each equals that model alone on the role's own sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import others_slow
from oracles import objective as oracle
from tiny import MIXES

from vigos_jax.data.processor import Turn
from vigos_jax.data.views import ImageView
from vigos_jax.method import losses, scoring
from vigos_jax.method.scoring import TeacherModel, supervised_states
from vigos_jax.method.token_weights import LEAST, token_weights

NONE = ImageView("none")


def larger(vocab_size, seed):
    """A model of another width, depth and number of heads, with a tower of its own."""
    vision = dataclasses.replace(tiny.CONFIG.vision, hidden_size=16, out_hidden_size=48)
    sizes = {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "intermediate_size": 64}
    config = dataclasses.replace(tiny.CONFIG, **sizes, vocab_size=vocab_size, vision=vision)
    model = tiny.MODEL.clone(config=config, lora=None)
    return TeacherModel(model, tiny.random_variables(model, seed=seed)["params"])


# Heads are padded: one has more rows than the student's 128, one fewer; all ids are below 125.
OTHERS = {"large": larger(136, 5), "larger": larger(125, 6)}
MIX = MIXES["mixed"]


def table(**fields):
    """The method's roles with further fields: {role name: {field: value}}."""
    return tuple(dataclasses.replace(role, **fields.get(role.name, {})) for role in tiny.ROLES)


TABLES = {
    "one of three": table(perception={"model": "large"}),
    "all": table(**{role.name: {"model": "large", "clip": 6.0} for role in tiny.ROLES}),  # else all is clipped
    "two models and the base": table(perception={"model": "large"}, reasoning={"model": "larger"}),
    "fewer rows": table(perception={"model": "larger"}),
    "another view too": table(
        perception={"model": "large"}, reasoning={"model": "large", "image": "none"}, reference={"image": "none"}
    ),
}


def mix_for(roles):
    """The turns that the roles' views ask for."""

    def of(row):
        if row.student is None:
            return row
        bare = row.student.prefix_ids[:4]
        pairs = zip(roles, row.teachers, strict=True)
        turns = [Turn(bare, turn.rest_ids) if role.view == NONE else turn for role, turn in pairs]
        controls = [
            Turn(bare, turn.rest_ids) if role.has_control else None for role, turn in zip(roles, turns, strict=True)
        ]
        return dataclasses.replace(row, teachers=tuple(turns), controls=tuple(controls) if any(controls) else ())

    return [(of(row), rollout) for row, rollout in MIX]


def others_of(roles):
    return {role.model: OTHERS[role.model] for role in roles if role.model}


def plain(roles, others=None):
    """What the oracle says: (loss, entries)."""
    base, lora = tiny.weights()
    pairs = {name: (t.model, t.params) for name, t in (others or others_of(roles)).items()}
    loss, _, entries = oracle.objective(tiny.MODEL, base, {"lora": lora}, mix_for(roles), roles, others=pairs)
    return loss, {
        (i, name, int(j)): values
        for (i, name), (at, kl, student, teacher, _) in entries.items()
        for j, *values in zip(at, kl, student, teacher, strict=True)
    }


def packed(roles, others=None):
    """The same of packed branches, and the batch."""
    base, lora = tiny.weights()
    batch = tiny.pack(mix_for(roles), roles=roles)
    out = tiny.scorer(roles)(base, {"lora": lora}, batch, others=others or others_of(roles))
    s, found = batch.supervised, {}
    for i, e in zip(*np.nonzero(s.role >= 0), strict=True):
        values = [float(x[i, e]) for x in (out.divergence, out.student_logp, out.teacher_logp)]
        found[int(i), roles[s.role[i, e]].name, int(s.position[i, e])] = values
    return found, batch


def largest_difference(got, want):
    assert set(got) == set(want)
    return max(np.abs(np.subtract(got[key], want[key])).max() for key in want)


@pytest.mark.parametrize("name", others_slow(TABLES))
def test_each_role_equals_its_model_alone(name):
    roles = TABLES[name]
    got, batch = packed(roles)
    assert largest_difference(got, plain(roles)[1]) < 2e-5
    assert (batch.teacher is None) == all(role.prefix != ("", ImageView()) for role in roles)
    assert {other.model for other in batch.others} >= set(others_of(roles))


def test_comparison_can_fail():
    """Weights of one role in another's place, and of the base."""
    roles = TABLES["two models and the base"]
    want = plain(roles)[1]
    mixed_up = {"large": larger(136, 7), "larger": OTHERS["larger"]}
    got, _ = packed(roles, mixed_up)
    apart = {key: np.abs(np.subtract(got[key], want[key])).max() for key in want}
    far = {role.name: max(x for (_, name, _), x in apart.items() if name == role.name) for role in roles}
    assert far["perception"] > 0.1 and far["reasoning"] < 2e-5
    assert largest_difference(packed(tiny.ROLES)[0], want) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one of three", "all", "fewer rows"])
def test_loss_and_gradient_are_those_of_plain_autodiff(name):
    """The fused gradient against autodiff of whole logits, and the same in halves of the batch."""
    base, lora = tiny.weights()
    roles = TABLES[name]
    batch, others = tiny.pack(mix_for(roles), roles=roles), others_of(roles)
    gradient, metrics = tiny.gradient_step(1, roles)(base, {"lora": lora}, batch, others=others)
    assert float(metrics["loss"]) == pytest.approx(plain(roles)[0], abs=1e-5)

    objective = losses.ObjectiveConfig(roles, 5)
    normalizers = jnp.sum(losses.normalizer_terms(batch.supervised, objective), (0, 1))
    weights = losses.loss_weights(batch.supervised, normalizers, objective)

    @jax.jit
    @jax.grad
    def autodiff(trained):
        states = supervised_states(tiny.MODEL, base, trained, batch, others=others)
        log_p = jax.nn.log_softmax(states.student @ states.student_head.T)
        out = 0.0
        for r, role in enumerate(roles):
            teacher = states.teachers[role.model]
            head = states.student_head if teacher.head is None else teacher.head
            log_q = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.hidden @ head.T))
            a, b = (log_q, log_p) if role.divergence == "forward_kl" else (log_p, log_q)
            kl = jnp.minimum(jnp.sum(jnp.exp(a) * (a - b), -1), batch.supervised.clip)
            out += jnp.sum(jnp.where(batch.supervised.role == r, weights * kl, 0.0))
        return out

    want = autodiff({"lora": lora})
    halves, _ = tiny.gradient_step(2, roles)(base, {"lora": lora}, batch, others=others)
    for a, b, c in zip(*map(jax.tree.leaves, (gradient, want, halves)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(a, c, atol=2e-5, rtol=1e-4)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-2


@pytest.mark.slow
def test_the_student_in_full_trains_its_head_beside_a_larger_ones():
    base, _ = tiny.weights()
    roles = TABLES["fewer rows"]
    model = tiny.MODEL.clone(lora=None)
    batch = tiny.pack(mix_for(roles), roles=roles)
    gradient, _ = tiny.gradient_step(1, roles, model)(base, {"params": base}, batch, others=others_of(roles))
    head = np.asarray(gradient["params"]["lm_head"])  # [D, V]
    assert head.shape[1] == 128 and np.abs(head[:, :125]).max() > 1e-3
    assert not head[:, 125:].any(), "rows that the teacher lacks are no tokens"


def test_teachers_alone_have_the_same_log_probabilities():
    base, lora = tiny.weights()
    roles = TABLES["two models and the base"]
    batch, others = tiny.pack(mix_for(roles), roles=roles), others_of(roles)
    both = tiny.scorer(roles)(base, {"lora": lora}, batch, others=others)
    run = jax.jit(scoring.teacher_logps, static_argnums=(0, 3))
    objective = losses.ObjectiveConfig(roles, 5)
    alone = run(tiny.MODEL, base, batch, objective, teacher_params={}, others=others)
    used = batch.supervised.role >= 0
    np.testing.assert_allclose(np.asarray(alone)[used], np.asarray(both.teacher_logp)[used], atol=2e-5)


def test_a_control_is_run_by_its_roles_model():
    base, lora = tiny.weights()
    roles = table(reasoning={"model": "large", "token_weights": "image_dependence"})
    mix, others = mix_for(roles), others_of(roles)
    batch = tiny.pack(mix, roles=roles)

    @jax.jit
    def run(batch):
        states = supervised_states(tiny.MODEL, base, {"lora": lora}, batch, others=others)
        return token_weights(states, batch.supervised, losses.ObjectiveConfig(roles, 5))

    got = np.asarray(run(batch))
    row, rollout = mix[0]
    large = OTHERS["large"].model, {"params": OTHERS["large"].params}
    turns = (row.images, row.teachers[1]), ((), row.controls[1])
    raw = []
    for j in oracle.scored(roles[1], rollout):
        sees, blind = (
            oracle.log_softmax(np.asarray(oracle.logits(*large, images, turn.ids + rollout.ids[:j]))[-1, :128])
            for images, turn in turns
        )
        raw.append(max(sees[rollout.ids[j]] - blind[rollout.ids[j]], 0.0) + LEAST)
    want = np.array(raw) / np.mean(raw)
    np.testing.assert_allclose(got[0][batch.supervised.role[0] == 1], want, atol=1e-4)
    assert want.std() > 0.1
