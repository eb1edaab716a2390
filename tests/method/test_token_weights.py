"""Rules that weigh a role's tokens, against a loop over tokens; and what a weight may not do."""

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
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.roles import TOKEN_WEIGHTS
from vigos_jax.method.scoring import supervised_states
from vigos_jax.method.token_weights import LEAST, RULES, token_weights

RULED = {
    "entropy": ({}, "entropy"),
    "image_dependence": ({}, "image_dependence"),
    "teacher_top_k": ({"token_top_k": 5}, "teacher_top_k"),
}


def roles_with(rule, *, only=None):
    fields, name = RULED[rule]
    new = {"token_weights": name} | fields
    return tuple(dataclasses.replace(r, **new) if only in (None, r.name) else r for r in tiny.ROLES)


def with_controls(mix, roles):
    """The turns without an image of each role that has a control."""

    def of(row):
        if row.student is None:
            return row
        bare = row.student.prefix_ids[:4]
        pairs = zip(roles, row.teachers, strict=True)
        return dataclasses.replace(
            row, controls=tuple(Turn(bare, turn.rest_ids) if role.has_control else None for role, turn in pairs)
        )

    return [(of(row), rollout) for row, rollout in mix]


def weights(mix, roles):
    """{(row, role, position): weight}, and the packed batch."""
    base, lora = tiny.weights()
    batch = tiny.pack(with_controls(mix, roles), roles=roles)

    @jax.jit
    def run(batch):
        states = supervised_states(tiny.MODEL, base, {"lora": lora}, batch)
        return token_weights(states, batch.supervised, ObjectiveConfig(roles, 5))

    got, s = np.asarray(run(batch)), batch.supervised
    places = zip(*np.nonzero(s.role >= 0), strict=True)
    return {(int(i), roles[s.role[i, e]].name, int(s.position[i, e])): float(got[i, e]) for i, e in places}, batch


def expected(mix, roles):
    """The same token by token, each role and its control run alone."""
    base, lora = tiny.weights()
    student, teacher, out = {"params": base, "lora": lora}, {"params": base}, {}

    def log_probs(variables, images, turn, before):
        return oracle.log_softmax(np.asarray(oracle.logits(tiny.MODEL, variables, images, (*turn.ids, *before)))[-1])

    def raw(role, turn, row, before, token):
        if role.token_weights == "entropy":
            log_p = log_probs(student, row.images, row.student, before)
            return -np.sum(np.exp(log_p) * log_p)
        log_q = log_probs(teacher, row.images, turn, before)
        if role.token_weights == "teacher_top_k":
            return float(np.sum(log_q > log_q[token]) < role.token_top_k)
        bare = Turn(row.student.prefix_ids[:4], turn.rest_ids)
        return max(log_q[token] - log_probs(teacher, (), bare, before)[token], 0.0) + LEAST

    for i, (row, rollout) in enumerate(mix):
        if row.student is None or rollout is None:
            continue
        for role, turn in zip(roles, row.teachers, strict=True):
            at = oracle.scored(role, rollout)
            is_ruled = role.token_weights != "uniform"
            values = [raw(role, turn, row, rollout.ids[:j], rollout.ids[j]) if is_ruled else 1.0 for j in at]
            mean = np.mean(values) if values else 0.0
            out |= {(i, role.name, j): (w / mean if mean else 1.0) for j, w in zip(at, values, strict=True)}
    return out


MIX = MIXES["mixed"]


@pytest.mark.parametrize("rule", others_slow(RULED))
@pytest.mark.parametrize("only", others_slow([None, "reasoning"]))
def test_each_rule_equals_a_loop_over_tokens(rule, only):
    roles = roles_with(rule, only=only)
    got, _ = weights(MIX, roles)
    want = expected(MIX, roles)
    assert set(got) == set(want)
    assert max(abs(got[key] - want[key]) for key in want) < 1e-4
    assert len({round(w, 4) for w in got.values()}) > 2, "a rule that weighs nothing proves nothing"


@pytest.mark.parametrize("rule", RULED)
def test_a_rollouts_mean_weight_is_one(rule):
    got, _ = weights(MIX, roles_with(rule))
    by_rollout = {}
    for (i, role, _), w in got.items():
        by_rollout.setdefault((i, role), []).append(w)
    assert min(got.values()) >= 0
    for values in by_rollout.values():
        assert np.mean(values) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_uniform_is_the_objective_as_it_was():
    base, lora = tiny.weights()
    batch = tiny.pack(MIX)
    assert batch.supervised.control_at is None and not batch.others
    gradient, metrics = tiny.gradient_step()(base, {"lora": lora}, batch)
    ruled = roles_with("teacher_top_k")
    everything = tuple(dataclasses.replace(role, token_top_k=tiny.CONFIG.vocab_size) for role in ruled)  # all count
    same, others = tiny.gradient_step(1, everything)(base, {"lora": lora}, batch)
    assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradient, same)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not [name for name in metrics if name.endswith("effective_tokens")]
    assert float(others["reasoning/effective_tokens"]) == pytest.approx(float(others["reasoning/tokens"]))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULED)
def test_loss_and_gradient_are_those_of_constant_weights(rule):
    """A weight has no gradient: the loss moves as a sum of divergences whose factors are numbers."""
    base, lora = tiny.weights()
    roles = roles_with(rule)
    got, batch = weights(MIX, roles)
    gradient, metrics = tiny.gradient_step(1, roles)(base, {"lora": lora}, batch)
    pairs = with_controls(MIX, roles)
    _, _, entries = oracle.objective(tiny.MODEL, base, {"lora": lora}, pairs, roles)
    loss = 0.0
    for role in roles:
        total, count = 0.0, 0
        for (i, name), (at, kl, *_) in entries.items():
            if name == role.name:
                w = np.array([got[i, name, int(j)] for j in at])
                total, count = total + np.sum(w * np.minimum(kl, oracle.limits(role, len(at)))), count + len(at)
        loss += role.weight * total / max(count, 1)
    assert float(metrics["loss"]) == pytest.approx(loss, abs=1e-5)
    plain, _ = tiny.gradient_step()(base, {"lora": lora}, tiny.pack(MIX))
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (gradient, plain)), strict=True)]
    assert max(moved) > 1e-3, "the rule changes nothing"
    # Halves of the batch: weights belong to rollouts, not to batches.
    halves, _ = tiny.gradient_step(2, roles)(base, {"lora": lora}, batch)
    for a, b in zip(*map(jax.tree.leaves, (gradient, halves)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_control_that_sees_the_image_is_seen_by_the_test(monkeypatch):
    roles = roles_with("image_dependence")
    want = expected(MIX, roles)
    monkeypatch.setitem(RULES, "image_dependence", lambda at, role: jnp.ones(at.token.shape))
    got, _ = weights(MIX, roles)
    assert max(abs(got[key] - want[key]) for key in want) > 0.1


def test_the_table_and_the_names_agree():
    assert tuple(RULES) == TOKEN_WEIGHTS
