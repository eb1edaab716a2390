"""Rows and rollouts as arrays: every packed branch must read as its role alone would."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.objective import positions_of
from strategies import mixes
from tiny import BUCKETS, CONFIG, IMAGE, MIXES, ROLES, invalid, pack, row, valid

from vigos_jax.data.processor import Turn
from vigos_jax.errors import InputError
from vigos_jax.method.packing import (
    Buckets,
    length_groups,
    pack_prompts,
    pack_scores,
    scored_positions,
    slot_count,
    token_clip,
    too_long,
)
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.spans import Spans
from vigos_jax.models.attention_masks import Branches


def prompts(rows, buckets=BUCKETS):
    return pack_prompts(rows, config=CONFIG, buckets=buckets)


def real(text, i):
    """(ids, positions, segments, image_index) of row i without its padding."""
    at = text.segment_ids[i] > 0
    return text.ids[i][at], text.positions[i][:, at], text.segment_ids[i][at], text.image_index[i][at]


def check_contexts(mix, roles=ROLES):
    """What each entry's student and teacher state has read, token by token, against the turns themselves."""
    batch = pack(mix, roles=roles)
    e = batch.supervised
    for i, (r, rollout) in enumerate(mix):
        used = e.role[i] >= 0
        if rollout is None:
            assert not used.any() and not batch.student.segment_ids[i].any() and not batch.teacher.segment_ids[i].any()
            continue
        expected = [(k, j) for k, role in enumerate(roles) for j in scored_positions(role, rollout)]
        assert list(zip(e.role[i][used], e.position[i][used], strict=True)) == expected
        for k, j, token, student_at, teacher_at in zip(
            *(getattr(e, f)[i][used] for f in ("role", "position", "token", "student_at", "teacher_at")), strict=True
        ):
            assert token == rollout.ids[j]
            for text, turn, at in ((batch.student, r.student, student_at), (batch.teacher, r.teachers[k], teacher_at)):
                visible = np.flatnonzero(
                    np.asarray(Branches(text.segment_ids[i][None]).dense(text.ids.shape[1]))[0, at]
                )
                read = range(j)
                if text is batch.teacher and roles[k].reads == "scored":
                    read = [i for i in scored_positions(roles[k], rollout) if i < j]
                context = turn.prefix_ids + turn.rest_ids + tuple(rollout.ids[i] for i in read)
                assert tuple(text.ids[i][visible]) == context
                np.testing.assert_array_equal(text.positions[i][:, visible], positions_of(context, r.images, CONFIG))
                index = text.image_index[i][visible]
                pictures = np.array(turn.prefix_ids) == IMAGE
                assert (index[len(pictures) :] == -1).all() and (index[: len(pictures)][~pictures] == -1).all()
                assert list(index[: len(pictures)][pictures]) == list(range(pictures.sum()))
    return batch


# Roles that read only what they score, with gaps; roles that score an invalid rollout beside each other.
OTHERS = (
    dataclasses.replace(ROLES[0], scores=("answer", "description"), reads="scored", when="always"),
    dataclasses.replace(ROLES[1], reads="scored"),
    dataclasses.replace(ROLES[2], reads="scored", when="always"),
)


@pytest.mark.parametrize("roles", [ROLES, OTHERS], ids=["the method", "others"])
@pytest.mark.parametrize("name", MIXES)
def test_each_entry_reads_its_own_context(name, roles):
    check_contexts(MIXES[name], roles)


@settings(max_examples=25)
@given(mixes(min_rows=1, max_rows=4), st.sampled_from([ROLES, OTHERS]))
def test_each_entry_reads_its_own_context_on_random_batches(mix, roles):
    check_contexts(mix, roles)


def test_a_token_with_two_teachers_has_two_entries():
    both = (dataclasses.replace(ROLES[2], name="a"), dataclasses.replace(ROLES[2], name="b"), ROLES[0])
    batch = check_contexts(((row(0, (4, 4)), invalid(0, 16)), MIXES["mixed"][0]), both)
    assert batch.supervised.role.shape[1] == 2 * 16
    assert (np.sort(batch.supervised.position[0]) == np.repeat(np.arange(16), 2)).all()


def test_a_drawn_batch():
    prefix = (9, IMAGE, 8)
    turns = [Turn(prefix, rest) for rest in ((1, 2), (3,), (4, 5, 6), (7,))]
    picture = tiny.image(np.random.default_rng(0), 2, 2)
    rollout = Rollout((10, 11, 12, 13, 14), Spans(True, (0, 2), (3, 4), (4, 4), None), (-1.0, -2.0, -3.0, -4.0, -5.0))
    batch = pack([(Row((picture,), turns[0], tuple(turns[1:])), rollout)])

    ids, positions, segments, index = real(batch.student, 0)
    assert list(ids) == [9, IMAGE, 8, 1, 2, 10, 11, 12, 13, 14]
    assert (positions == np.arange(10)).all() and (segments == 1).all()
    assert list(index) == [-1, 0] + 8 * [-1]

    # Each branch ends one token before the last that it scores; roles without entries have none.
    ids, positions, segments, index = real(batch.teacher, 0)
    assert list(ids) == [9, IMAGE, 8, 3, 10, 4, 5, 6, 10, 11, 12]
    assert list(segments) == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert (positions == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]).all()

    e = batch.supervised
    assert list(e.role[0]) == [0, 0, 1] + 13 * [-1]
    assert list(e.position[0][:3]) == [0, 1, 3] and list(e.token[0][:3]) == [10, 11, 13]
    assert list(e.student_at[0][:3]) == [4, 5, 7]
    assert list(e.teacher_at[0][:3]) == [3, 4, 10]
    assert list(e.sampled_logp[0][:3]) == [-1.0, -2.0, -4.0] and np.isnan(e.sampled_logp[0][3:]).all()


def test_a_drawn_batch_of_a_role_that_reads_what_it_scores():
    prefix = (9, 8)
    turns = [Turn(prefix, rest) for rest in ((1, 2), (3,), (4, 5))]
    rollout = Rollout((10, 11, 12, 13, 14, 15), Spans(True, (0, 2), (3, 4), (5, 6), None))
    apart = dataclasses.replace(ROLES[1], scores=("description", "answer"), reads="scored", last_clip=0.5)
    both = (apart, dataclasses.replace(apart, reads="completion", scores=("answer",), first_clip=0.1, clip=0.0))
    batch = pack([(Row((), turns[0], tuple(turns[1:])), rollout)], roles=both)
    ids, positions, segments, _ = real(batch.teacher, 0)
    assert list(ids) == [9, 8, 3, 10, 11, 4, 5, 10, 11, 12, 13, 14]
    assert list(segments) == [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]
    assert (positions == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]).all()
    e = batch.supervised
    assert list(e.position[0][:4]) == [0, 1, 5, 5] and list(e.token[0][:4]) == [10, 11, 15, 15]
    assert list(e.teacher_at[0][:4]) == [2, 3, 4, 11] and list(e.student_at[0][:4]) == [3, 4, 8, 8]
    np.testing.assert_allclose(e.clip[0][:4], [1.8, 1.8, 0.5, 0.1])
    assert np.isinf(e.clip[0][4:]).all()


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"clip": 0.0}, [np.inf, np.inf, np.inf]),
        ({"clip": 2.0}, [2.0, 2.0, 2.0]),
        ({"clip": 2.0, "clip_per": "entry"}, [np.inf, np.inf, np.inf]),  # the sum's terms are clipped, not the sum
        ({"clip": 2.0, "clip_per": "entry", "last_clip": 5.0}, [np.inf, np.inf, 5.0]),
        ({"clip": 2.0, "first_clip": 1.0}, [1.0, 2.0, 2.0]),
        ({"clip": 2.0, "first_clip": 3.0}, [2.0, 2.0, 2.0]),  # it clips further, never less
        ({"clip": 0.0, "last_clip": 3.0}, [np.inf, np.inf, 3.0]),
        ({"clip": 0.0, "first_clip": 1.0, "last_clip": 3.0}, [1.0, np.inf, 3.0]),
    ],
)
def test_entry_clip(fields, expected):
    role = dataclasses.replace(ROLES[0], **fields)
    scored = [2, 3, 7]
    assert [token_clip(role, j, scored) for j in scored] == expected


def test_one_token_is_the_first_and_the_last():
    role = dataclasses.replace(ROLES[0], first_clip=0.4, last_clip=0.3)
    assert token_clip(role, 5, [5]) == 0.3


def test_logps_from_elsewhere_are_unknown():
    assert np.isnan(pack(MIXES["mixed"]).supervised.sampled_logp).all()


def test_prompts_are_padded_at_their_end():
    rows = [row(0, (4, 6)), Row(), row(2, (4, 4), (2, 6)), row(3)]
    batch = prompts(rows)
    assert list(batch.is_active) == [True, False, True, True]
    for i, r in enumerate(rows):
        if r.student is None:
            assert not batch.text.segment_ids[i].any()
            continue
        n = len(r.student.ids)
        assert not batch.text.segment_ids[i][n:].any() and batch.text.segment_ids[i][:n].all()
        ids, positions, _, index = real(batch.text, i)
        assert tuple(ids) == r.student.ids
        np.testing.assert_array_equal(positions, positions_of(ids, r.images, CONFIG))
        assert list(index[ids == IMAGE]) == list(range(sum(len(x.patches) for x in r.images) // 4))


def test_a_row_of_two_pictures_holds_both():
    r = row(4, (4, 4), (2, 6))
    v = prompts([Row(), r]).vision
    assert not v.image_ids[0].any() and not v.patches[0].any()
    for k, picture in enumerate(r.images, start=1):
        slots = v.image_ids[1] == k
        assert slots.sum() == len(picture.patches)
        rows_of = {p.tobytes() for p in v.patches[1][slots]}
        assert rows_of == {p.tobytes() for p in picture.patches}
    # visual token m is the m-th group of four patches, in reading order over both pictures
    patches = np.concatenate([x.patches for x in r.images]).reshape(-1, 4, CONFIG.vision.patch_dim)
    groups = v.patches[1].reshape(-1, 4, CONFIG.vision.patch_dim)
    np.testing.assert_array_equal(groups[v.token_unit[1][: len(patches)]], patches)


def test_a_sampled_image_token_is_text():
    """The student may sample any id; only the prompt's image tokens stand for pictures."""
    mix = []
    for rollout in (valid(0, 10, (0, 4), (5, 7), (8, 9)), invalid(1, 10)):
        ids = list(rollout.ids)
        ids[2] = ids[6] = IMAGE
        mix.append((row(0, (4, 4)), dataclasses.replace(rollout, ids=tuple(ids))))
    check_contexts(mix)
    check_contexts([(row(0), mix[0][1])])  # no picture at all


def test_shapes_are_the_declared_ones():
    buckets = Buckets(patches=(16, 64), prompt=(24, 40), completion=(4, 8, 16), sequence=(32, 48, 64, 144))
    small = pack([(row(2, (2, 2)), valid(2, 7, (0, 1), (2, 3), (5, 6)))], buckets=buckets)
    assert small.vision.patches.shape[1] == 16 and small.student.ids.shape[1] == 32
    assert small.teacher.ids.shape[1] == 32 and small.supervised.role.shape[1] == 4  # of 7 tokens, 3 are scored
    large = pack(MIXES["mixed"], buckets=buckets)
    assert large.vision.patches.shape[1] == 64 and large.student.ids.shape[1] == 48
    assert large.teacher.ids.shape[1] == 64 and large.supervised.role.shape[1] == 16
    assert pack(MIXES["all bad"], buckets=buckets).teacher.ids.shape == (8, 32)


def test_images_are_packed_when_asked():
    rows, rollouts = zip(*MIXES["mixed"], strict=True)
    options = {"roles": ROLES, "config": CONFIG, "buckets": BUCKETS}
    without, whole = pack_scores(rows, rollouts, with_images=False, **options), pack(MIXES["mixed"])
    assert without.vision is None
    jax.tree.map(np.testing.assert_array_equal, without.replace(vision=whole.vision), whole)


def test_groups_of_equal_lengths():
    rows, rollouts = zip(*MIXES["mixed"], strict=True)
    assert length_groups(rows, rollouts, 1) == [list(range(8))]
    for count in (2, 4, 8):
        groups = length_groups(rows, rollouts, count)
        assert [len(g) for g in groups] == [8 // count] * count and sorted(sum(groups, [])) == list(range(8))
        lengths = [len(rows[i].student.ids) + len(rollouts[i].ids) if rollouts[i] else 0 for i in sum(groups, [])]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize("kind", ["patches", "completion", "sequence"])
def test_too_large_for_the_largest_bucket(kind):
    small = dataclasses.replace(BUCKETS, **{kind: (2, 3)})
    with pytest.raises(InputError, match=rf"does not fit config.buckets.{kind}; the largest is 3"):
        pack(MIXES["mixed"], buckets=small)


def test_too_long():
    r = row(0, (4, 6))
    need = {
        "patches": slot_count(r, CONFIG),
        "prompt": len(r.student.ids),
        # the two roles of a valid rollout need more than the one of an invalid rollout
        "sequence": len(r.student.prefix_ids) + sum(len(t.rest_ids) + 10 for t in r.teachers[:2]),
    }
    fits = Buckets(completion=(16,), **{k: (1, n) for k, n in need.items()})
    check = lambda b: too_long(r, roles=ROLES, buckets=b, max_completion=10, config=CONFIG)  # noqa: E731
    assert check(fits) is None
    for kind, n in need.items():
        assert check(dataclasses.replace(fits, **{kind: (1, n - 1)})) == kind


def test_too_long_counts_all_roles_that_may_score_an_invalid_rollout():
    r = row(0, (4, 6))
    need = len(r.student.prefix_ids) + sum(len(t.rest_ids) + 10 for t in r.teachers)
    roles = tuple(dataclasses.replace(role, when="invalid") for role in ROLES)
    for size, expected in ((need, None), (need - 1, "sequence")):
        buckets = dataclasses.replace(BUCKETS, sequence=(size,))
        assert too_long(r, roles=roles, buckets=buckets, max_completion=10, config=CONFIG) == expected


def test_what_too_long_lets_through_can_be_packed():
    r = row(0, (4, 6))
    packed = len(r.student.prefix_ids) + sum(len(t.rest_ids) + 16 for t in r.teachers[:2])
    buckets = dataclasses.replace(BUCKETS, sequence=(packed,))
    assert too_long(r, roles=ROLES, buckets=buckets, max_completion=16, config=CONFIG) is None
    pack([(r, valid(0, 16, (0, 5), (6, 12), (13, 16))), (r, invalid(0, 16))], buckets=buckets)


def test_teachers_must_share_the_prefix():
    r = row(0, (4, 4))
    other = Turn((1, *r.student.prefix_ids), r.teachers[0].rest_ids)
    with pytest.raises(ValueError, match="perception does not share"):
        pack([(dataclasses.replace(r, teachers=(other, *r.teachers[1:])), valid(0, 9, (0, 2), (3, 5), (6, 7)))])


def test_one_turn_per_role():
    with pytest.raises(ValueError):
        pack([(row(0, (4, 4), teachers=2), valid(0, 9, (0, 2), (3, 5), (6, 7)))])
    with pytest.raises(ValueError):
        pack_scores([row(0)], [], roles=ROLES, config=CONFIG, buckets=BUCKETS)


@pytest.mark.parametrize(
    "scores, when, rollout, expected",
    [
        (("description",), "valid", valid(0, 9, (0, 2), (3, 5), (6, 7)), [0, 1]),
        (("answer", "description"), "valid", valid(0, 9, (0, 2), (3, 5), (6, 7)), [0, 1, 6]),
        (("completion",), "always", valid(0, 3, (0, 1), (1, 2), (2, 3)), [0, 1, 2]),
        (("completion", "answer"), "always", valid(0, 3, (0, 1), (1, 2), (2, 3)), [0, 1, 2]),
        (("completion",), "valid", invalid(0, 3), []),
        (("completion",), "invalid", invalid(0, 3), [0, 1, 2]),
        (("description", "answer"), "always", invalid(0, 3), [0, 1, 2]),  # it has no parts
        (("description",), "invalid", invalid(0, 2), [0, 1]),
        (("description",), "valid", invalid(0, 2), []),
        (("completion",), "invalid", invalid(0, 0), []),
    ],
)
def test_scored_positions(scores, when, rollout, expected):
    assert scored_positions(dataclasses.replace(ROLES[0], scores=scores, when=when), rollout) == expected
