"""The train step: accumulation, float32 adapters, what moves and what must not, and the optimizer's settings."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from cases import others_slow
from oracles import objective as oracle
from tiny import CONFIG, LORA, MIXES, MODEL, ROLES, gradient_step, pack

from vigos_jax.method import losses, scoring
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.models.variables import cast_floats
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.training.step import TrainState, make_optimizer, make_train_step

ADAMW = {
    "learning_rate": 5e-6,
    "steps": 100,
    "warmup_steps": 0,
    "schedule": "linear",
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 0.1,
}


def optimizer(**settings):
    options = ADAMW | settings
    return make_optimizer(types.SimpleNamespace(**options), steps=options["steps"])


def compiled_step(model, options=None, **settings):
    """(new state for trained leaves, compiled step); `options` are those of the step, `settings` the optimizer's."""
    tx, _ = optimizer(**settings)
    options = {"gradient_accumulation_steps": 1, "use_dropout": False} | (options or {})
    gradient_accumulation_steps = options.pop("gradient_accumulation_steps")
    step = make_train_step(model, tx, tiny.objective_of(options), **options)
    run = lambda state, base, batch, key: step(state, base, tiny.micro_batches(batch, gradient_accumulation_steps), key)  # noqa: E731

    def start(trained):
        average = jax.tree.map(jnp.copy, trained) if options.get("teacher_weights") == "ema" else {}
        return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), average)

    return start, jax.jit(run)


@functools.cache
def lora_step():
    return compiled_step(MODEL)


def norm(tree):
    return float(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)) ** 0.5)


def moved(before, after, letter):
    """Largest change over the leaves of A or of B."""
    change = jax.tree_util.tree_map_with_path(
        lambda path, x, y: float(jnp.abs(y - x).max()) if path[-1].key == letter else 0.0, before, after
    )
    return [x for path, x in jax.tree_util.tree_leaves_with_path(change) if path[-1].key == letter]


# One batch, one step.


def test_metrics_are_those_of_the_plain_objective():
    base, lora = tiny.weights()
    loss, parts, _ = oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], ROLES)
    gradient, metrics = gradient_step()(base, {"lora": lora}, pack(MIXES["mixed"]))
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm(gradient), rel=1e-5)
    assert metrics["sampler_logp_gap"] == 0.0  # of rollouts from elsewhere it is not known
    for name, part in parts.items():
        assert metrics[f"{name}/loss"] == pytest.approx(part["loss"], abs=1e-5)
        assert metrics[f"{name}/tokens"] == part["tokens"]
        assert metrics[f"{name}/clipped_fraction"] == pytest.approx(part["clipped"] / part["tokens"])
    of_role = ("loss", "tokens", "clipped_fraction", "loss_share", "grad_share")
    assert set(metrics) == {"loss", "grad_norm", "skipped", "sampler_logp_gap", "entropy"} | {
        f"{name}/{x}" for name in parts for x in of_role
    }


def test_sampler_gap_is_over_known_entries():
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    logps = np.array(tiny.scorer()(base, {"lora": lora}, batch).student_logp)
    logps[0] += 0.25
    logps[1] -= 0.75
    logps[2:] = np.nan
    known = [(batch.supervised.role[i] >= 0).sum() for i in range(2)]
    batch = batch.replace(supervised=batch.supervised.replace(sampled_logp=logps))
    gradient, metrics = gradient_step()(base, {"lora": lora}, batch)
    expected = (0.25 * known[0] + 0.75 * known[1]) / sum(known)
    assert metrics["sampler_logp_gap"] == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(norm(gradient))


def test_a_batch_of_bad_rows_moves_nothing():
    base, lora = tiny.weights()
    gradient, metrics = gradient_step()(base, {"lora": lora}, pack(MIXES["all bad"]))
    assert metrics["loss"] == 0 and norm(gradient) == 0


@pytest.mark.slow
def test_entropy_is_the_students_over_all_supervised_tokens():
    base, lora = tiny.weights()
    both = (*ROLES[:2], dataclasses.replace(ROLES[2], when="always"))  # some tokens count twice
    for roles in (ROLES, both):
        _, _, entries = oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], roles)
        want = np.mean(np.concatenate([x[-1] for x in entries.values()]))
        _, metrics = gradient_step(roles=roles)(base, {"lora": lora}, pack(MIXES["mixed"], roles=roles))
        assert metrics["entropy"] == pytest.approx(want, abs=1e-5)


def test_shares_of_loss_and_gradient():
    """The gradient at the states by hand: through the head, entry by entry, from both distributions."""
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    _, metrics = gradient_step()(base, {"lora": lora}, batch)
    _, parts, _ = oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], ROLES)

    @functools.partial(jax.jit, static_argnames="is_student")
    def log_probs(text, at, is_student):
        variables = {"params": base} | ({"lora": lora} if is_student else {})
        images = MODEL.apply(variables, batch.vision, method="encode_images")
        hidden = jnp.take_along_axis(MODEL.apply(variables, text, images)[0], at[..., None], 1)
        return jax.nn.log_softmax(hidden @ base["lm_head"])

    e = batch.supervised
    log_p = np.asarray(log_probs(batch.student, e.student_at, is_student=True), np.float64)
    log_q = np.asarray(log_probs(batch.teacher, e.teacher_at, is_student=False), np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    norms = []
    for r, role in enumerate(ROLES):
        if role.divergence == "forward_kl":
            kl, slope = np.sum(q * (log_q - log_p), -1), p - q
        else:
            kl = np.sum(p * (log_p - log_q), -1)
            slope = p * (log_p - log_q - kl[..., None])
        used = e.role == r
        at_states = (slope @ np.asarray(base["lm_head"], np.float64).T)[used & (kl <= role.clip)]
        norms.append(role.weight * np.sqrt(np.sum(at_states**2)) / used.sum())
    whole = sum(role.weight * parts[role.name]["loss"] for role in ROLES)
    for role, n in zip(ROLES, norms, strict=True):
        assert metrics[f"{role.name}/grad_share"] == pytest.approx(n / sum(norms), rel=1e-4)
        share = role.weight * parts[role.name]["loss"] / whole
        assert metrics[f"{role.name}/loss_share"] == pytest.approx(share, rel=1e-4)
        assert abs(share - n / sum(norms)) > 0.002  # one cannot be taken for the other
    for kind in ("loss_share", "grad_share"):
        assert sum(float(metrics[f"{role.name}/{kind}"]) for role in ROLES) == pytest.approx(1, abs=1e-6)


def test_shares_of_nothing_are_zero():
    base, lora = tiny.weights()
    _, metrics = gradient_step()(base, {"lora": lora}, pack(MIXES["all invalid"]))
    for kind in ("loss_share", "grad_share"):
        shares = [float(metrics[f"{role.name}/{kind}"]) for role in ROLES]
        assert shares[:2] == [0, 0] and shares[2] == pytest.approx(1)
    _, metrics = gradient_step()(base, {"lora": lora}, pack(MIXES["all bad"]))
    assert all(x == 0 for x in metrics.values())


# Teachers that follow the student.


AVERAGE = {"lora": tiny.random_variables(MODEL, seed=7)["lora"]}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["frozen", "ema", "live"])
def test_teachers_have_the_weights_asked_for(weights):
    base, lora = tiny.weights()
    trained = {"lora": lora}
    overlays = {"frozen": {}, "ema": AVERAGE, "live": trained}
    batch = pack(MIXES["mixed"])
    _, metrics = gradient_step(teacher_weights=weights)(base, trained, batch, AVERAGE if weights == "ema" else {})
    for name, teacher_params in overlays.items():
        loss, parts, _ = oracle.objective(MODEL, base, trained, MIXES["mixed"], ROLES, teacher_params=teacher_params)
        gap = max(abs(float(metrics[f"{role}/loss"]) - part["loss"]) for role, part in parts.items())
        gap = max(gap, abs(float(metrics["loss"]) - loss))
        assert gap < 1e-5 if name == weights else gap > 0.01


@pytest.mark.slow
def test_the_average_moves_by_its_rate_and_is_the_next_teacher():
    base, lora = tiny.weights()
    rate = 0.6
    start, step = compiled_step(MODEL, {"teacher_weights": "ema", "ema_rate": rate}, learning_rate=0.05)
    batch, key = pack(MIXES["mixed"]), jax.random.key(0)
    state = start({"lora": lora}).replace(average=AVERAGE)
    first, _ = step(state, base, batch, key)
    want = jax.tree.map(lambda a, b: (1 - rate) * a + rate * b, AVERAGE, first.trained)
    for a, b in zip(jax.tree.leaves(first.average), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert min(moved(state.average, first.average, "a")) > 0.01
    _, metrics = step(first, base, batch, key)
    args = (MODEL, base, first.trained, MIXES["mixed"], ROLES)
    assert metrics["loss"] == pytest.approx(oracle.objective(*args, teacher_params=first.average)[0], abs=1e-5)
    assert abs(metrics["loss"] - oracle.objective(*args, teacher_params=AVERAGE)[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["frozen", "live"])
def test_there_is_no_average_that_nobody_follows(weights):
    base, lora = tiny.weights()
    start, step = lora_step() if weights == "frozen" else compiled_step(MODEL, {"teacher_weights": weights})
    state, _ = step(start({"lora": lora}), base, pack(MIXES["mixed"]), jax.random.key(0))
    assert state.average == {}


# Accumulation.


@pytest.mark.slow
@pytest.mark.parametrize("gradient_accumulation_steps, reduction", [(4, "tokens"), (2, "sequences")])
def test_accumulation_changes_nothing(gradient_accumulation_steps, reduction):
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    want, want_metrics = gradient_step(reduction=reduction)(base, {"lora": lora}, batch)
    got, metrics = gradient_step(gradient_accumulation_steps, reduction=reduction)(base, {"lora": lora}, batch)
    for name in want_metrics:
        assert metrics[name] == pytest.approx(float(want_metrics[name]), rel=1e-5, abs=1e-5), name
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert norm(want) > 0.1


@pytest.mark.parametrize("gradient_accumulation_steps", [2, 4])
def test_a_mean_of_micro_batch_means_would_show(gradient_accumulation_steps):
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    scores = tiny.scorer()(base, {"lora": lora}, batch)
    micro = [
        losses.role_stats(
            *jax.tree.map(lambda x: x[a::gradient_accumulation_steps], (scores, batch.supervised)),  # noqa: B023
            ObjectiveConfig(ROLES, chunk=5),
        )
        for a in range(gradient_accumulation_steps)
    ]
    tokens = np.array([m.tokens for m in micro])
    assert tokens.max(0).min() > 2 * tokens.min(0).max()  # very uneven
    wrong = np.mean([losses.total_loss(m, m.normalizer, ObjectiveConfig(ROLES, chunk=5)) for m in micro])
    assert abs(wrong - gradient_step()(base, {"lora": lora}, batch)[1]["loss"]) > 0.01


# What a step moves.


def test_the_first_steps_from_a_fresh_adapter():
    """B starts at zero, so A has no gradient in the first step and moves from the second on."""
    base, lora = tiny.weights(adapter=0.0)
    start, step = lora_step()
    batch, key = pack(MIXES["mixed"]), jax.random.key(0)
    first, _ = step(start({"lora": lora}), base, batch, key)
    assert max(moved({"lora": lora}, first.trained, "a")) == 0
    assert min(moved({"lora": lora}, first.trained, "b")) > 4e-6
    second, _ = step(first, base, batch, key)
    assert min(moved(first.trained, second.trained, "a")) > 1e-6
    assert min(moved(first.trained, second.trained, "b")) > 1e-6
    assert second.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_step_moves_a_and_b_by_the_learning_rate(dtype):
    """In float32 whatever the base's type: bfloat16 would round 5e-6 away."""
    base, lora = tiny.weights()
    model = VisionLanguageModel(CONFIG, lora=LORA, dtype=dtype)
    start, step = lora_step() if dtype == jnp.float32 else compiled_step(model)
    before = {"lora": lora}
    state, metrics = step(start(before), cast_floats(base, dtype), pack(MIXES["mixed"]), jax.random.key(0))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    for letter in "ab":
        # Adam's first step is the learning rate's size in every entry
        changes = moved(before, state.trained, letter)
        assert len(changes) == 7
        assert all(x == pytest.approx(5e-6, rel=0.1) for x in changes), changes
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    numbers = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in numbers} == {jnp.dtype("float32")}
    rounded = jax.tree.map(lambda a, b: a.astype(jnp.bfloat16) == b.astype(jnp.bfloat16), before, state.trained)
    assert np.mean([x.mean() for x in jax.tree.leaves(rounded)]) > 0.9


def test_optimizer_state_is_for_trained_leaves_only():
    _, lora = tiny.weights()
    start, _ = lora_step()
    leaves = [x for x in jax.tree.leaves(start({"lora": lora}).opt_state) if x.ndim]
    trained = jax.tree.leaves(lora)
    assert sorted(x.shape for x in leaves) == sorted(2 * [x.shape for x in trained])  # two moments


@pytest.mark.parametrize("kind", others_slow(["lora", "params"]))
def test_the_loss_falls_and_the_base_stays(kind):
    base, lora = tiny.weights()
    before = jax.tree.map(np.array, base)
    batch, key = pack(MIXES["mixed"]), jax.random.key(0)
    if kind == "lora":
        start, step = lora_step()
        trained = {"lora": lora}
    else:
        start, step = compiled_step(MODEL, learning_rate=1e-3, schedule="constant")
        trained = {"params": jax.tree.map(jnp.copy, base)}
    state, history = start(trained), []
    for _ in range(20):
        state, metrics = step(state, base, batch, key)
        history.append(float(metrics["loss"]))
    assert history[0] > 0.1 if kind == "lora" else history[0] > 0
    assert all(b < a for a, b in zip(history, history[1:], strict=False)), history
    assert history[-1] < history[0] * (0.999 if kind == "lora" else 0.8)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert norm(jax.tree.map(jnp.subtract, state.trained, trained)) > 0


# Dropout.


def dropping():
    return VisionLanguageModel(CONFIG, lora=dataclasses.replace(LORA, dropout=0.5))


@pytest.mark.slow
def test_dropout_with_accumulation():
    base, lora = tiny.weights()
    start, step = compiled_step(dropping(), {"gradient_accumulation_steps": 2, "use_dropout": True})
    run = lambda seed: step(start({"lora": lora}), base, pack(MIXES["mixed"]), jax.random.key(seed))  # noqa: E731
    (a, first), (b, again), (_, other) = run(0), run(0), run(1)
    assert first["loss"] == again["loss"]
    jax.tree.map(np.testing.assert_array_equal, a.trained, b.trained)
    assert abs(first["loss"] - other["loss"]) > 1e-3 and np.isfinite(other["loss"])
    assert first["reference/tokens"] == 10


@pytest.mark.slow
def test_dropout_touches_the_student_only():
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])

    @jax.jit
    def run(base, trained, batch, key):
        states = scoring.supervised_states(dropping(), base, trained, batch, dropout_key=key)
        return losses.score_tokens(states, batch.supervised, ObjectiveConfig(ROLES, chunk=5))

    dropped = run(base, {"lora": lora}, batch, jax.random.key(0))
    plain = tiny.scorer()(base, {"lora": lora}, batch)
    used = batch.supervised.role >= 0
    np.testing.assert_allclose(dropped.teacher_logp[used], plain.teacher_logp[used], atol=1e-5)
    assert (np.abs(dropped.student_logp - plain.student_logp)[used] > 1e-3).mean() > 0.9


# The optimizer.


def small(settings, gradients, x=(1.0, -2.0, 3.0)):
    """Parameters after each of the gradients, and the last state."""
    tx, _ = optimizer(**settings)
    x = {"x": jnp.array(x)}
    state, path = tx.init(x), []
    for g in gradients:
        updates, state = tx.update({"x": jnp.array(g)}, state, x)
        x = optax.apply_updates(x, updates)
        path.append(np.array(x["x"]))
    return path, state


def adamw(x, gradients, rates, weight_decay, max_norm):
    """The rule itself, in float64."""
    x, mu, nu, path = np.array(x), 0.0, 0.0, []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = np.array(g) * min(1.0, max_norm / np.linalg.norm(g))
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g**2
        x = x - rate * (mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8) + weight_decay * x)
        path.append(x)
    return path


GRADIENTS = ((3.0, -4.0, 0.5), (0.01, 0.02, -0.03), (0.0, -1.0, 0.0))  # the first and last are longer than 0.1


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.1, 2.0])
def test_adamw_with_its_clip_and_decay(weight_decay, max_grad_norm):
    settings = {"learning_rate": 0.1, "steps": 4, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
    path, _ = small(settings, GRADIENTS)
    want = adamw((1.0, -2.0, 3.0), GRADIENTS, (0.1, 0.075, 0.05), weight_decay, max_grad_norm)
    np.testing.assert_allclose(path, want, rtol=1e-5)


def test_no_weight_decay_when_it_is_zero():
    """optax's own default is not zero."""
    path, _ = small({"learning_rate": 1.0}, [(0.0, 0.0, 0.0)])
    np.testing.assert_array_equal(path[0], [1.0, -2.0, 3.0])


def test_nothing_moves_after_the_last_step():
    path, _ = small({"learning_rate": 0.1, "steps": 2}, 3 * [(1.0, 1.0, 1.0)])
    assert (np.abs(path[1] - path[0]) > 0.04).all()
    np.testing.assert_array_equal(path[2], path[1])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"schedule": "linear", "steps": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"schedule": "constant", "steps": 4}, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "steps": 6, "warmup_steps": 2}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ({"schedule": "linear", "steps": 3, "warmup_steps": 1}, [1.0, 1.0, 0.5, 0.0]),
        ({"schedule": "constant", "steps": 6, "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "steps": 1}, [1.0, 0.0]),
    ],
)
def test_schedule(settings, expected):
    _, schedule = optimizer(**{"learning_rate": 2.0} | settings)
    np.testing.assert_allclose([schedule(i) for i in range(len(expected))], 2 * np.array(expected), atol=1e-6)
