"""Turns examples and rollouts into the arrays of `method/batch.py`: prompts, packed branches, supervised tokens.

The image comes first in every role's user turn, so the system header and the image tokens are a prefix that all roles
of a sample share. The roles are branches after that prefix in ONE sequence: `segment_ids` keep the branches from
attending to each other, and each branch's positions continue from the prefix as if it were the only one:

    tokens    | header image | role A's prompt, completion | role B's prompt, completion | padding
    segment   | 1 1 1 1 1 1 1| 2 2 2 2 2 2 2 2 2 2 2 2 2 2 | 3 3 3 3 3 3 3 3 3 3 3 3 3 3 | 0 0 0
    position  | 0 1 2 ...  p | p+1 p+2 ...                 | p+1 p+2 ...                 | 0 0 0

A branch holds only what predicts its scored tokens: the role's prompt, then the student's completion up to but not
including the last scored token (with `reads="scored"`, only the scored tokens before it). Roles that see other images
than the student (`data.views`), or have other weights, are branches of a separate sequence, one for each
`roles.Prefix`. In families whose layers carry a state along the sequence, padding aligns each branch to a multiple of
`ModelConfig.chunk`, and `models/delta_rule.py` starts it from the prefix's state.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from vigos_jax.data.views import NONE, ORIGINAL, ImageView
from vigos_jax.errors import InputError
from vigos_jax.method.batch import PrefixBatch, PromptBatch, ScoreBatch, SupervisedTokens
from vigos_jax.method.roles import (
    OWN,
    Prefix,
    TeacherRole,
    branches_of,
    branches_per_rollout,
    prefixes_of,
    roles_per_token,
    views_of,
)
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.sequences import (
    EMPTY,
    TokenSequence,
    host,
    next_position,
    padded_text,
    padded_vision,
    padding,
    token_sequence,
)
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.inputs import VisionInputs
from vigos_jax.models.positions import vision_layout


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that arrays may be padded to, ascending per kind. Few sizes mean few shapes to compile programs for.

    Attributes:
      patches: slots for the patches of a row's images under one view, with the empty ones of partly filled windows.
      prompt: tokens of a student's prompt.
      completion: tokens of a completion.
      sequence: tokens of a student's prompt and completion, or of a prefix and all its branches.
      agree: maps the size that this process needs to the largest that any process needs; `int` for one process.
    """

    patches: tuple[int, ...]
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sequence: tuple[int, ...]
    agree: Callable[[int], int] = int

    def fit(self, kind: str, n: int) -> int:
        """The smallest declared size that holds the largest n of any process; InputError if none does.

        With several processes all must make the same calls in the same order.
        """
        n = self.agree(n)
        for size in getattr(self, kind):
            if n <= size:
                return size
        raise InputError(f"{n} does not fit config.buckets.{kind}; the largest is {max(getattr(self, kind))}")


def slot_count(row: Row, config: ModelConfig, view: ImageView = ORIGINAL) -> int:
    """Window slots of a row's images under a view, what `Buckets.patches` counts."""
    return len(vision_layout([i.grid for i in row.images_of(view)], config.vision).source)


def too_long(
    row: Row, *, roles: tuple[TeacherRole, ...], buckets: Buckets, max_completion: int, config: ModelConfig
) -> str | None:
    """The first kind of bucket that the row can overflow with a completion of `max_completion` tokens, or None.

    "completion" buckets are not checked: `max_completion` itself must fit them. ValueError for a bad row.
    """
    prompt = len(row.prompt.ids)
    longest = prompt + max_completion
    for prefix in prefixes_of(roles):
        for valid in (True, False):
            length = 0
            for r, is_control in branches_of(prefix, roles):
                turn = row.turn(r, is_control=is_control)
                if roles[r].applies(valid):
                    length = length or len(turn.prefix_ids)
                    length += _gap(length, config) + len(turn.rest_ids) + max_completion
            longest = max(longest, length)
    slots = max(slot_count(row, config, view) for view in (ORIGINAL, *views_of(roles)))
    for kind, n in (("patches", slots), ("prompt", prompt), ("sequence", longest)):
        if n > max(getattr(buckets, kind)):
            return kind
    return None


def _gap(length: int, config: ModelConfig) -> int:
    """Padding tokens needed after `length` tokens before a branch may start."""
    return -length % config.chunk


def _vision(
    rows: Sequence[Row], view: ImageView, config: ModelConfig, buckets: Buckets, *, least: Sequence[Row] = ()
) -> VisionInputs:
    """Packs the rows' images under a view, in at least the slots that the rows in `least` need for their own images."""
    own = max((slot_count(row, config) for row in least), default=0)
    slots = buckets.fit("patches", max(own, *(slot_count(row, config, view) for row in rows)))
    return padded_vision([row.images_of(view) for row in rows], slots, config.vision)


class _Token(NamedTuple):
    """One slot of `SupervisedTokens`."""

    role: int
    student_at: int
    teacher_at: int
    position: int
    token: int
    sampled_logp: float
    clip: float
    control_at: int = 0


_UNUSED = _Token(-1, 0, 0, 0, 0, np.nan, np.inf)


class _Packed(NamedTuple):
    """A row's branches after one prefix.

    Attributes:
      tokens: the supervised tokens of its roles; `teacher_at` is a place in `sequence`.
      controls: (role, position) -> place in `sequence` of the state that predicts the token in the role's control,
        which is the role run without an image (`TeacherRole.has_control`).
    """

    sequence: TokenSequence = EMPTY
    tokens: Sequence[_Token] = ()
    controls: Mapping[tuple[int, int], int] = MappingProxyType({})


def _supervised(rows: Sequence[Sequence[_Token]], length: int, *, with_controls: bool) -> SupervisedTokens:
    """Pads each row's tokens to `length`."""
    columns = {}
    for name in _Token._fields if with_controls else _Token._fields[:-1]:
        unused = getattr(_UNUSED, name)
        columns[name] = np.full((len(rows), length), unused, np.float32 if isinstance(unused, float) else np.int32)
        for i, tokens in enumerate(rows):
            columns[name][i, : len(tokens)] = [getattr(token, name) for token in tokens]
    return host(SupervisedTokens, **columns)


def pack_prompts(rows: Sequence[Row], *, config: ModelConfig, buckets: Buckets) -> PromptBatch:
    """Student prompts: plain causal rows, padded at the end as all others are."""
    sequences = [EMPTY if r.student is None else token_sequence(r.images, r.student.ids, config) for r in rows]
    length = buckets.fit("prompt", max(len(s.ids) for s in sequences))
    return host(
        PromptBatch,
        vision=_vision(rows, ORIGINAL, config, buckets),
        text=padded_text(sequences, length),
        is_active=np.array([r.student is not None for r in rows]),
    )


def scored_positions(role: TeacherRole, rollout: Rollout) -> list[int]:
    """Completion positions this role scores: its spans if the role applies to the rollout, else none.

    An invalid rollout has no spans but the whole completion.
    """
    if not role.applies(rollout.spans.is_valid):
        return []
    if "completion" in role.scores or not rollout.spans.is_valid:
        return list(range(len(rollout.ids)))
    return sorted({j for span in role.scores for j in range(*getattr(rollout.spans, span))})


def length_groups(rows: Sequence[Row], rollouts: Sequence[Rollout | None], count: int) -> list[list[int]]:
    """Splits row numbers into `count` equal groups by length, so that micro-batches need little padding.

    The length is that of the student's prompt and completion. `count` must divide the number of rows, or the longest
    rows would be dropped (`check_batch` ensures it). A single group keeps the rows' order.
    """
    if count == 1:
        return [list(range(len(rows)))]

    def length(i: int) -> int:
        rollout = rollouts[i]
        return len(rows[i].prompt.ids) + len(rollout.ids) if rollout is not None else 0

    order, size = sorted(range(len(rows)), key=length), len(rows) // count
    return [order[k * size : (k + 1) * size] for k in range(count)]


def token_clip(role: TeacherRole, position: int, scored: Sequence[int]) -> float:
    """The smallest clip, in nats, of a token's divergence summed over the vocabulary; infinity if it has none.

    Args:
      position: of the token in the completion, one of `scored`.
      scored: all positions that the role scores in the rollout, ascending.
    """
    clips = [
        role.clip if role.clip_per == "token" else 0.0,
        role.first_clip if position == scored[0] else 0.0,
        role.last_clip if position == scored[-1] else 0.0,
    ]
    return min((c for c in clips if c), default=np.inf)


def pack_scores(
    rows: Sequence[Row],
    rollouts: Sequence[Rollout | None],
    *,
    roles: tuple[TeacherRole, ...],
    config: ModelConfig,
    buckets: Buckets,
    with_images: bool = True,
) -> ScoreBatch:
    """Packs the student's sequences, the teachers' branches and the supervised tokens of a batch of rollouts.

    Args:
      rollouts: one per row; None for a bad row, or one that could not be sampled.
      with_images: whether to pack the rows' own images; if not, `vision` is None. The same in all processes.

    Returns:
      Numpy arrays padded to bucket sizes; E is a completion bucket times `roles_per_token`.

    Raises:
      InputError: a row does not fit the largest bucket.
      ValueError: a row does not have exactly one turn per role, or a turn's header and image tokens differ from those
        of its prefix.
    """
    prefixes = prefixes_of(roles)
    students: list[TokenSequence] = []
    rows_packed: list[list[_Packed]] = []  # by row and prefix
    for row, rollout in zip(rows, rollouts, strict=True):
        is_bad = row.student is None or rollout is None
        students.append(EMPTY if is_bad else token_sequence(row.images, row.prompt.ids, config, rollout.ids))
        rows_packed.append([_Packed() if is_bad else _pack_row(row, rollout, roles, p, config) for p in prefixes])

    # A token takes one slot per role that scores it, `times` at most. Rounding the number of tokens, not of slots, to
    # a bucket makes sure that every completion that fits its bucket also fits here.
    times = roles_per_token(roles)
    most = max(1, *(sum(len(packed.tokens) for packed in row) for row in rows_packed))
    entries = buckets.fit("completion", -(-most // times)) * times
    vision = _vision(rows, ORIGINAL, config, buckets) if with_images else None
    student = padded_text(students, buckets.fit("sequence", max(len(s.ids) for s in students)), branches=0)
    # One length for all prefixes: with one each, every combination of lengths would be another program to compile.
    length = buckets.fit("sequence", max((len(p.sequence.ids) for row in rows_packed for p in row), default=0))
    texts = []
    for i, prefix in enumerate(prefixes):
        sequences = [row[i].sequence for row in rows_packed]
        texts.append(padded_text(sequences, length, branches=branches_per_rollout(prefix, roles)))
    starts = _starts(prefixes, length)
    tokens, with_controls = [_joined(row, starts) for row in rows_packed], any(role.has_control for role in roles)
    others = []
    for i, (model, view) in enumerate(prefixes):
        if prefixes[i] != OWN:
            seen = _used(rows, [packed[i] for packed in rows_packed])
            images = None if view == NONE else _vision(seen, view, config, buckets, least=rows)
            others.append(host(PrefixBatch, vision=images, text=texts[i], model=model))
    return ScoreBatch(
        supervised=_supervised(tokens, entries, with_controls=with_controls),
        vision=vision,
        student=student,
        teacher=texts[0] if OWN in prefixes else None,  # it is the first
        others=tuple(others),
    )


def _starts(prefixes: Sequence[Prefix], length: int) -> list[int]:
    """Each prefix's offset, in tokens, in the concatenated sequences of its model; `teacher_at` counts in these."""
    return [length * sum(p.model == prefix.model for p in prefixes[:i]) for i, prefix in enumerate(prefixes)]


def _used(rows: Sequence[Row], packed: Sequence[_Packed]) -> list[Row]:
    """The rows, with `Row()` in place of those without a branch after this prefix: their images are not encoded."""
    return [row if len(p.sequence.ids) else Row() for row, p in zip(rows, packed, strict=True)]


def _joined(packed: Sequence[_Packed], starts: Sequence[int]) -> list[_Token]:
    """A row's supervised tokens after all prefixes, sorted by role and moved by `starts` (see `_starts`)."""
    parts = [*zip(packed, starts, strict=True)]
    controls = {key: start + at for part, start in parts for key, at in part.controls.items()}
    placed = [
        t._replace(teacher_at=start + t.teacher_at, control_at=controls.get((t.role, t.position), start + t.teacher_at))
        for part, start in parts
        for t in part.tokens
    ]
    return sorted(placed, key=lambda t: t.role)


def _pack_row(
    row: Row, rollout: Rollout, roles: tuple[TeacherRole, ...], prefix: Prefix, config: ModelConfig
) -> _Packed:
    """The branches of a row's roles after a prefix, and the tokens that they score; ValueError as for `pack_scores`."""
    if len(row.teachers) != len(roles):
        raise ValueError(f"a row has {len(row.teachers)} turns for {len(roles)} roles")
    branches = [(r, is_control, row.turn(r, is_control=is_control)) for r, is_control in branches_of(prefix, roles)]
    ids = row.prompt.prefix_ids if prefix == OWN else branches[0][2].prefix_ids
    parts = [token_sequence(row.images_of(prefix.view), ids, config)]
    after_prefix = next_position(parts[0].positions)
    length, segment, tokens, controls = len(ids), 1, [], {}
    for r, is_control, turn in branches:
        role = roles[r]
        if turn.prefix_ids != ids:
            raise ValueError(f"role {role.name} does not share its prefix's header and images")
        scored = scored_positions(role, rollout)
        if not scored:
            continue
        read = scored if role.reads == "scored" else range(len(rollout.ids))
        at = {j: i for i, j in enumerate(read)}  # completion position -> place in the branch's completion
        # The state before the last scored token is the last one needed.
        branch = np.asarray(turn.rest_ids + tuple(rollout.ids[j] for j in read[: at[scored[-1]]]), np.int32)
        n = len(branch)
        positions = np.broadcast_to(after_prefix + np.arange(n), (3, n))
        gap, segment = _gap(length, config), segment + 1
        parts += [padding(gap), TokenSequence(branch, positions, np.full(n, segment, np.int32), np.full(n, -1))]
        length += gap
        for j in scored:
            logp = rollout.logps[j] if rollout.logps is not None else np.nan
            student_at, teacher_at = len(row.prompt.ids) + j - 1, length + len(turn.rest_ids) + at[j] - 1
            if is_control:
                controls[r, j] = teacher_at
            else:
                clip = token_clip(role, j, scored)
                tokens.append(_Token(r, student_at, teacher_at, j, rollout.ids[j], logp, clip))
        length += n
    if not tokens and not controls and prefix != OWN:
        return _Packed()  # unused images are not encoded
    return _Packed(TokenSequence(*(np.concatenate(x, -1) for x in zip(*parts, strict=True))), tokens, controls)
