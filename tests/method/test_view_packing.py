"""Roles that see other images than the student: each equals its role alone; what it may not see never reaches it."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import tiny_hybrid
from oracles import objective as oracle
from tiny import BAD, IMAGE, TURN, VISION_END, VISION_START, invalid, valid

from vigos_jax.data.processor import Turn
from vigos_jax.data.views import ORIGINAL, ImageView
from vigos_jax.method.packing import pack_scores, scored_positions, too_long
from vigos_jax.method.roles import TeacherRole
from vigos_jax.method.rows import Row

NONE, BLANK, CROP = ImageView("none"), ImageView("blank"), ImageView("crop", "box", 0.5)
_CROP = {"image": "crop", "image_column": "box", "image_margin": 0.5}
ROLES = (
    TeacherRole("perception", "", "", ("description",), "valid", "forward_kl", 1.0, 1.3, **_CROP),
    TeacherRole("reasoning", "", "", ("reasoning", "answer"), "valid", "forward_kl", 1.0, 1.8),
    TeacherRole("blind", "", "", ("completion",), "always", "reverse_kl", 0.5, 1.5, image="none"),
    TeacherRole("reference", "", "", ("completion",), "invalid", "reverse_kl", 2.0, 1.5, **_CROP),
    TeacherRole("grey", "", "", ("answer",), "valid", "forward_kl", 0.5, 0.0, image="blank"),
)
SIZES = {CROP: ((4, 2), (2, 6)), BLANK: ((4, 4), (4, 4))}
MIX_SIZES = (((4, 6),), ((4, 4),), ((2, 2), (4, 2)), ((6, 4),))


def with_views(row: Row, seed: int) -> Row:
    """The row with images and turns for every view; one row in two has two images in its crop."""
    rng = np.random.default_rng([seed, 9])
    views = {view: tuple(tiny.image(rng, *s) for s in sizes[: 1 + seed % 2]) for view, sizes in SIZES.items()}
    row = dataclasses.replace(row, views=views)
    start, turns = row.prompt.prefix_ids[:4], []
    for role in ROLES:
        prefix = start
        for image in row.images_of(role.view):
            _, h, w = image.grid
            prefix += (VISION_START, *[IMAGE] * (h * w // 4), VISION_END)
        turns.append(Turn(prefix, (*tiny.words(rng, 3 + len(turns)), TURN, *tiny.words(rng, 2))))
    return dataclasses.replace(row, teachers=tuple(turns))


def mix():
    rows = [with_views(tiny.row(40 + i, *sizes), i) for i, sizes in enumerate(MIX_SIZES)]
    rollouts = [
        valid(0, 16, (0, 5), (6, 12), (13, 15)),
        invalid(1, 9),
        valid(2, 7, (0, 1), (2, 3), (5, 6)),
        valid(3, 8, (0, 0), (2, 5), (6, 7)),
    ]
    return [*zip(rows, rollouts, strict=True), BAD, (rows[0], invalid(5, 0)), BAD, (rows[3], invalid(7, 1))]


BUCKETS = dataclasses.replace(tiny.BUCKETS, completion=(16, 48), sequence=(56, 144, 208))


def pack(pairs, roles=ROLES, config=tiny.CONFIG, buckets=BUCKETS):
    return tiny.pack(pairs, roles=roles, buckets=buckets, config=config)


def scores(batch, roles=ROLES):
    """{(row, role, position): (divergence, student_logp, teacher_logp)}."""
    base, lora = tiny.weights()
    out = tiny.scorer(roles)(base, {"lora": lora}, batch)
    s, found = jax.device_get(batch.supervised), {}
    for i, e in zip(*np.nonzero(s.role >= 0), strict=True):
        key = int(i), roles[s.role[i, e]].name, int(s.position[i, e])
        found[key] = tuple(float(x[i, e]) for x in (out.divergence, out.student_logp, out.teacher_logp))
    return found


def expected(pairs, roles=ROLES):
    base, lora = tiny.weights()
    _, _, entries = oracle.objective(tiny.MODEL, base, {"lora": lora}, pairs, roles)
    return {
        (i, name, int(j)): values
        for (i, name), (at, kl, student, teacher, _) in entries.items()
        for j, *values in zip(at, kl, student, teacher, strict=True)
    }


def largest_difference(got, want):
    assert set(got) == set(want)
    return max(np.abs(np.subtract(got[key], want[key])).max() for key in want)


def test_each_role_equals_itself_alone():
    assert largest_difference(scores(pack(mix())), expected(mix())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("only", [("blind",), ("perception", "reference"), ("blind", "grey")])
def test_tables_without_the_rows_own_images(only):
    roles = tuple(role for role in ROLES if role.name in only)

    def of(row):
        turns = [t for role, t in zip(ROLES, row.teachers, strict=bool(row.student)) if role in roles]
        return dataclasses.replace(row, teachers=tuple(turns))

    pairs = [(of(row), rollout) for row, rollout in mix()]
    batch = pack(pairs, roles)
    assert batch.teacher is None and len(batch.others) == len({role.view for role in roles})
    assert largest_difference(scores(batch, roles), expected(pairs, roles)) < 1e-5


def test_comparison_can_fail():
    """Images of other rows, and a view's branches that do not go on behind its own images."""
    pairs = mix()
    batch = pack(pairs)
    first, *rest = batch.others
    vision = first.vision.replace(patches=first.vision.patches[::-1])
    moved = batch.replace(others=(first.replace(vision=vision), *rest))
    assert largest_difference(scores(moved), expected(pairs)) > 0.1
    late = first.text.positions + 5 * (first.text.segment_ids[:, None] > 1)
    shifted = batch.replace(others=(first.replace(text=first.text.replace(positions=late)), *rest))
    assert largest_difference(scores(shifted), expected(pairs)) > 1e-3


@pytest.mark.parametrize("hidden", [ORIGINAL, CROP, BLANK])
def test_what_a_role_may_not_see_never_reaches_it(hidden):
    """Bitwise: other pixels in one view change the roles of that view, and no others."""
    rng = np.random.default_rng(3)

    def noise(images):
        new = [rng.standard_normal(image.patches.shape).astype(np.float32) for image in images]
        return tuple(dataclasses.replace(image, patches=p) for image, p in zip(images, new, strict=True))

    def changed(row):
        if row.student is None:
            return row
        if hidden == ORIGINAL:
            return dataclasses.replace(row, images=noise(row.images))
        return dataclasses.replace(row, views=row.views | {hidden: noise(row.views[hidden])})

    pairs = mix()
    before, after = scores(pack(pairs)), scores(pack([(changed(row), rollout) for row, rollout in pairs]))
    views = {role.name: role.view for role in ROLES}
    assert {key for key in before if views[key[1]] == hidden}
    for key, (_, student, teacher) in before.items():
        assert (after[key][2] != teacher) == (views[key[1]] == hidden), key
        assert (after[key][1] != student) == (hidden == ORIGINAL), "the student sees the row's own images"


def test_each_view_is_one_sequence_with_each_image_once():
    batch = pack(mix())
    assert len(batch.others) == 3, "crop (two roles), none, blank"
    slots = [None if view.vision is None else int((view.vision.image_ids > 0).sum()) for view in batch.others]

    def of(view):
        """Of rows of which a role with this view scores something."""
        read = [row for row, rollout in mix() if row.student and scores_any(view, rollout)]
        return sum(len(image.patches) for row in read for image in row.images_of(view))

    def scores_any(view, rollout):
        return any(scored_positions(role, rollout) for role in ROLES if role.view == view)

    assert slots == [of(CROP), None, of(BLANK)] and not scores_any(BLANK, mix()[1][1])
    assert batch.teacher.ids.shape == batch.others[0].text.ids.shape, "one length for all"
    crop = batch.others[0].text
    assert crop.branches == 1, "perception for valid rollouts, reference for invalid ones"
    assert batch.others[1].text.branches == 1 and batch.teacher.branches == 1


@pytest.mark.slow
def test_micro_batches_and_gradients():
    base, lora = tiny.weights()
    batch = pack(mix())
    want, metrics = tiny.gradient_step(1, ROLES)(base, {"lora": lora}, batch)
    got, other = tiny.gradient_step(2, ROLES)(base, {"lora": lora}, batch)
    assert abs(float(metrics["loss"]) - float(other["loss"])) < 1e-5 and float(metrics["loss"]) > 0
    for a, b in zip(*map(jax.tree.leaves, (want, got)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    loss, _, _ = oracle.objective(tiny.MODEL, base, {"lora": lora}, mix(), ROLES)
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=1e-5)


def test_layers_with_a_state_pack_views_alike():
    """Hybrid layers: a view's branches start at whole chunks behind its own prefix."""
    config = tiny_hybrid.CONFIG
    batch = pack(mix(), config=config, buckets=dataclasses.replace(BUCKETS, sequence=(56, 1024)))
    for text in (batch.teacher, *(view.text for view in batch.others)):
        for segments in text.segment_ids:
            starts = [int(np.argmax(segments == i)) for i in range(2, segments.max() + 1)]
            assert all(start % config.chunk == 0 for start in starts)


def test_too_long_counts_each_view():
    row = mix()[0][0]
    options = {"roles": ROLES, "max_completion": 10, "config": tiny.CONFIG}
    pairs = [*zip(ROLES, row.teachers, strict=True)]

    def packed(view, is_valid):
        own = [(role, turn) for role, turn in pairs if role.view == view]
        return len(own[0][1].prefix_ids) + sum(len(turn.rest_ids) + 10 for role, turn in own if role.applies(is_valid))

    branches = {(role.view, v): packed(role.view, v) for role in ROLES for v in (True, False)}
    longest = max(len(row.prompt.ids) + 10, *branches.values())
    for length, kind in ((longest, None), (longest - 1, "sequence")):
        assert too_long(row, buckets=dataclasses.replace(BUCKETS, sequence=(length,)), **options) == kind
    large = dataclasses.replace(row, views=row.views | {BLANK: (tiny.image(np.random.default_rng(0), 12, 12),)})
    assert (
        too_long(row, buckets=BUCKETS, **options) is None and too_long(large, buckets=BUCKETS, **options) == "patches"
    )


def test_a_table_without_roles_is_the_student_alone():
    pairs = [(dataclasses.replace(row, teachers=()), rollout) for row, rollout in mix()]
    batch = pack(pairs, roles=())
    assert batch.teacher is None and not batch.others and (batch.supervised.role < 0).all()
    np.testing.assert_array_equal(batch.student.ids, pack(mix()).student.ids)


def test_a_turn_with_other_images_than_its_views_is_a_mistake():
    row, _ = mix()[0]
    first, *rest = row.teachers
    other = Turn((*first.prefix_ids[:-1], TURN), first.rest_ids)
    with pytest.raises(ValueError, match="role reference does not share its prefix's header and images"):
        wrong = dataclasses.replace(row, teachers=(other, *rest))
        pack_scores([wrong], [invalid(0, 3)], roles=ROLES, config=tiny.CONFIG, buckets=BUCKETS)
