"""The packed, chunked scores against the plain objective, feature by feature, and that wrong contexts show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import others_slow
from oracles import objective as oracle
from tiny import CONFIG, MIXES, MODEL, ROLES, pack

from vigos_jax.method import losses, scoring
from vigos_jax.models import decoder, layers
from vigos_jax.models.attention import attention
from vigos_jax.models.attention_masks import Branches, Causal, Images, Windows
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.vlm import VisionLanguageModel

REPEATED = (MIXES["mixed"] * 2)[3:11]  # a bad row first
CLOSE, FAR = 1e-5, 1e-3


def compare(
    mix,
    batch=None,
    *,
    model=MODEL,
    roles=ROLES,
    trained=None,
    temperature=1.0,
    reduction="tokens",
    teacher_params=None,
    want=None,
):
    """Largest difference between the packed path and the plain one over all numbers of entries, roles and loss.

    Infinity if they do not score the same tokens.

    Args:
      batch: instead of the packed `mix`.
      want: the plain path's result, if it is not that of the same arguments.
    """
    base, lora = tiny.weights()
    trained = trained or {"lora": lora}
    options = {"temperature": temperature, "reduction": reduction, "teacher_params": teacher_params}
    loss, parts, entries = want or oracle.objective(model, base, trained, mix, roles, **options)

    batch = pack(mix, roles=roles) if batch is None else batch
    scores = tiny.scorer(roles, model=model, temperature=temperature)(
        base, trained, batch, teacher_params=teacher_params
    )
    worst, compared = 0.0, 0
    for (i, name), (position, *numbers) in entries.items():
        used = batch.supervised.role[i] == [r.name for r in roles].index(name)
        if list(batch.supervised.position[i][used]) != list(position):
            return np.inf
        compared += len(position)
        got = (scores.divergence, scores.student_logp, scores.teacher_logp, scores.entropy)
        for x, y in zip(got, numbers, strict=True):
            worst = max(worst, np.abs(np.asarray(x)[i][used] - y).max())
    if compared != (batch.supervised.role >= 0).sum():
        return np.inf

    objective = losses.ObjectiveConfig(roles, chunk=5, reduction=reduction)
    stats = losses.role_stats(scores, batch.supervised, objective)
    assert list(stats.tokens) == [part["tokens"] for part in parts.values()]
    got = [*losses.role_losses(stats, stats.normalizer), losses.total_loss(stats, stats.normalizer, objective)]
    pairs = [*zip(got, [*(part["loss"] for part in parts.values()), loss], strict=True)]
    pairs += zip(stats.clipped_tokens, (part["clipped"] for part in parts.values()), strict=True)
    return max(worst, *(abs(float(x) - y) for x, y in pairs))


@pytest.mark.parametrize("mix", [*MIXES.values(), REPEATED], ids=[*MIXES, "repeated"])
def test_equals_the_plain_objective(mix):
    assert compare(mix) < CLOSE


def test_the_comparison_has_clipped_and_unclipped_entries_of_every_role():
    base, lora = tiny.weights()
    for part in oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], ROLES)[1].values():
        assert 0 < part["clipped"] < part["tokens"] and part["loss"] > 0.1


def test_equals_it_with_two_teachers_of_one_token():
    roles = (dataclasses.replace(ROLES[2], name="a", weight=0.5), ROLES[1], dataclasses.replace(ROLES[2], clip=0.0))
    assert compare(MIXES["mixed"], roles=roles) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["params", "vision adapter"])
def test_equals_it_for_a_student_with_a_vision_tower_of_its_own(kind):
    model, base = MODEL, tiny.weights()[0]
    if kind == "params":
        noise = tiny.random_variables(MODEL, seed=1)["params"]
        trained = {"params": jax.tree.map(lambda a, b: a + 0.1 * b, base, noise)}
        other_tower = {"params": trained["params"] | {"visual": base["visual"]}}
        average = {"params": jax.tree.map(lambda a, b: a - 0.1 * b, base, noise)}
    else:
        lora = LoraSpec(rank=8, scale=2.0, vision=frozenset(("gate_proj", "down_proj")))
        model = VisionLanguageModel(CONFIG, lora=lora)
        trained = {"lora": tiny.random_variables(model)["lora"]}
        other_tower = jax.tree.map(jnp.zeros_like, trained)
        average = jax.tree.map(lambda x: -0.7 * x, trained)
    assert compare(MIXES["mixed"], model=model, trained=trained) < CLOSE
    assert compare(MIXES["mixed"], model=model, trained=trained, teacher_params=average) < CLOSE
    want = oracle.objective(model, base, other_tower, MIXES["mixed"], ROLES)
    assert compare(MIXES["mixed"], model=model, trained=trained, want=want) > 0.1


# What a role table and a config can ask for beyond the method.


def table(*changes):
    """`ROLES` with fields changed, role by role."""
    return tuple(dataclasses.replace(role, **fields) for role, fields in zip(ROLES, changes, strict=True))


OVERLAY = {"lora": tiny.random_variables(MODEL, seed=7)["lora"]}  # an average that has gone elsewhere
ENTRY = {"clip_per": "entry", "clip": 0.05}
FEATURES = {
    # name: (role table, options, what to drop, each on its own)
    "jsd": (
        table({"divergence": "jsd", "beta": 0.3}, {"divergence": "jsd", "beta": 0.8}, {"divergence": "jsd"}),
        {},
        [{"divergence": "forward_kl"}, {"beta": 0.5}],
    ),
    "a divergence for each role": (
        table({"divergence": "jsd", "beta": 0.2, "clip": 0.0}, {"clip": 0.0}, ENTRY | {"clip": 0.2}),
        {"temperature": 2.5},
        [{"temperature": 1.0}, {"clip_per": "token"}],
    ),
    "one divergence, clipped per entry": (
        table(ENTRY, ENTRY | {"clip": 0.2, "first_clip": 0.3}, {"divergence": "forward_kl", "last_clip": 0.4}),
        {"reduction": "sequences"},
        [{"clip_per": "token"}, {"clip": 0.0}, {"first_clip": 0.0}, {"last_clip": 0.0}, {"reduction": "tokens"}],
    ),
    "jsd, clipped per entry": (
        table(*({"divergence": "jsd", "beta": b, "clip": 0.02, "clip_per": "entry"} for b in (0.1, 0.5, 0.9))),
        {"temperature": 0.7, "reduction": "sequences"},
        [{"clip_per": "token"}, {"temperature": 1.0}],
    ),
    "first and last token": (
        table({"first_clip": 0.2, "last_clip": 0.6}, {"last_clip": 0.1, "clip": 0.0}, {"first_clip": 3.0}),
        {},
        [{"first_clip": 0.0}, {"last_clip": 0.0}],
    ),
    "reads what it scores": (
        table({"reads": "scored", "scores": ("answer", "description")}, {"reads": "scored"}, {"reads": "scored"}),
        {"teacher_params": OVERLAY},
        [{"reads": "completion"}, {"teacher_params": {}}],
    ),
    "no reference role": (
        table({"when": "always"}, {"when": "always", "reads": "scored"}, {"when": "valid", "scores": ("answer",)}),
        {"reduction": "sequences", "teacher_params": OVERLAY},
        [{"reduction": "tokens"}, {"teacher_params": {}}, {"when": "valid"}],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_equals_the_plain_objective(name, mix):
    roles, options, _ = FEATURES[name]
    assert compare(mix, roles=roles, **options) < CLOSE


DROPS = [(name, drop) for name, (_, _, drops) in FEATURES.items() for drop in drops]


@pytest.mark.slow
@pytest.mark.parametrize("name, drop", DROPS, ids=[f"{name}, {'_'.join(drop)}" for name, drop in DROPS])
def test_a_feature_that_is_dropped_shows(name, drop):
    base, lora = tiny.weights()
    mix, (roles, options, _) = MIXES["mixed"], FEATURES[name]
    want = oracle.objective(MODEL, base, {"lora": lora}, mix, roles, **options)
    fields = {k: v for k, v in drop.items() if k not in ("temperature", "reduction", "teacher_params")}
    poorer = tuple(dataclasses.replace(role, **fields) for role in roles)
    assert compare(mix, roles=poorer, want=want, **options | {k: v for k, v in drop.items() if k not in fields}) > FAR


def test_a_role_that_applies_to_an_invalid_rollout_scores_all_of_it():
    roles = FEATURES["no reference role"][0]
    batch = pack(MIXES["mixed"], roles=roles)
    for i, (_, rollout) in enumerate(MIXES["mixed"]):
        if rollout is not None and not rollout.spans.is_valid:
            for k, count in enumerate((1, 1, 0)):
                used = batch.supervised.role[i] == k
                assert list(batch.supervised.position[i][used]) == list(range(len(rollout.ids))) * count
    assert pack(MIXES["mixed"]).supervised.role.shape[1] * 2 == batch.supervised.role.shape[1]


@pytest.mark.slow
def test_teachers_alone_have_the_same_log_probabilities():
    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    used = batch.supervised.role >= 0
    run = jax.jit(
        lambda teacher_params: scoring.teacher_logps(
            MODEL, base, batch, losses.ObjectiveConfig(ROLES, chunk=5), teacher_params=teacher_params
        )
    )
    alone = {
        name: np.asarray(run(teacher_params))[used]
        for name, teacher_params in (("base", {}), ("teacher_params", OVERLAY))
    }
    for name, teacher_params in (("base", {}), ("teacher_params", OVERLAY)):
        both = tiny.scorer()(base, {"lora": lora}, batch, teacher_params=teacher_params)
        np.testing.assert_allclose(alone[name], np.asarray(both.teacher_logp)[used], atol=CLOSE)
    assert np.abs(alone["base"] - alone["teacher_params"]).max() > 0.1


# Gradients: one that leaks into a teacher, or is cut, shows here.

SMOOTH = {
    "the method": (table(*3 * ({"clip": 0.0},)), {}),
    "all features": (
        table(
            {"divergence": "jsd", "beta": 0.3, "clip": 0.0},
            {"clip": 0.0, "reads": "scored", "when": "always"},
            {"clip": 0.0, "when": "always"},
        ),
        {"temperature": 1.5, "reduction": "sequences"},
    ),
}


@pytest.fixture(scope="module")
def slopes():
    """(gradient of the train step, the plain objective as a function of the adapter); teachers are as they are."""
    base, lora = tiny.weights()

    def of(name, weights):
        roles, options = SMOOTH[name]
        step = tiny.gradient_step(roles=roles, teacher_weights=weights, **options)
        teacher_params = {"lora": lora} if weights == "live" else {}
        gradient, _ = step(base, {"lora": lora}, pack(MIXES["mixed"], roles=roles))
        options = options | {"teacher_params": teacher_params}
        return gradient["lora"], lambda x: oracle.objective(MODEL, base, {"lora": x}, MIXES["mixed"], roles, **options)

    return of


CASES = [("the method", "frozen"), ("all features", "live")]


@pytest.mark.parametrize("name, weights", others_slow(CASES))
def test_gradient_is_the_slope_of_the_plain_objective(slopes, name, weights):
    """Central differences along three directions."""
    gradient, objective = slopes(name, weights)
    lora = tiny.weights()[1]
    for direction in (gradient, *(tiny.random_variables(MODEL, seed=s)["lora"] for s in (2, 3))):
        norm = sum(jnp.sum(x**2) for x in jax.tree.leaves(direction)) ** 0.5
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, direction))) / norm
        up, down = (
            objective(jax.tree.map(lambda a, b: a + h / norm * b, lora, direction))[0]  # noqa: B023
            for h in (0.005, -0.005)
        )
        assert abs(slope) > 0.02
        assert slope == pytest.approx((up - down) / 0.01, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name, weights", CASES)
def test_gradient_of_single_parameters(slopes, name, weights):
    """Central differences at the steepest parameter of A and of B in five projections."""
    gradient, objective = slopes(name, weights)
    lora = tiny.weights()[1]
    checked = []
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        if path[-2].key not in ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
            continue
        at = np.unravel_index(np.argmax(np.abs(g)), g.shape)
        up, down = (
            objective(jax.tree_util.tree_map_with_path(lambda p, x: x.at[at].add(h) if p == path else x, lora))[0]  # noqa: B023
            for h in (0.005, -0.005)
        )
        assert abs(up - down) > 2e-4 and g[at] == pytest.approx((up - down) / 0.01, rel=1e-2), path
        checked.append(g[at])
    assert len(checked) == 10


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
    want = oracle.objective(MODEL, base, {"lora": lora}, MIXES["mixed"], ROLES)
    assert compare(MIXES["mixed"], trained=nothing, want=want) > 0.1


def test_fails_with_the_pictures_of_another_row():
    batch = pack(MIXES["all valid"])
    moved = batch.vision.replace(patches=np.roll(batch.vision.patches, 1, 0))
    assert compare(MIXES["all valid"], batch.replace(vision=moved)) > 0.1


def test_fails_with_two_pictures_exchanged():
    mix = tuple((row, rollout) for row, rollout in MIXES["mixed"] if len(row.images) == 2) * 8
    (a, b), row = mix[0][0].images, mix[0][0]
    first = dataclasses.replace(a, patches=np.concatenate([b.patches, a.patches])[: len(a.patches)])
    changed = tuple((dataclasses.replace(row, images=(first, b)), rollout) for _, rollout in mix)
    assert compare(mix) < CLOSE
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


def test_attention_is_told_what_the_rows_are(monkeypatch):
    """What lets a device's fast attention serve them: lengths, the most branches of a row, images and windows."""
    asked = []

    def spy(q, k, v, mask, *, implementation, mesh):
        asked.append((type(mask), getattr(mask, "most", None), q.shape[1], implementation))
        return attention(q, k, v, mask)

    base, lora = tiny.weights()
    batch = pack(MIXES["mixed"])
    monkeypatch.setattr(decoder, "attention", spy)
    monkeypatch.setattr(layers, "attention", spy)
    model = MODEL.clone(attention="cudnn")
    jax.eval_shape(
        lambda b: scoring.score_batch(model, base, {"lora": lora}, b, losses.ObjectiveConfig(ROLES, chunk=5)), batch
    )
    student, teacher = batch.student.ids.shape[1], batch.teacher.ids.shape[1]
    slots = batch.vision.image_ids.shape[1]
    tower = {(Images, slots, slots, "cudnn"), (Windows, slots, slots, "cudnn")}
    assert set(asked) == {(Causal, None, student, "cudnn"), (Branches, 2, teacher, "cudnn")} | tower
