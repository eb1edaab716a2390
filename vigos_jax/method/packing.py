"""Turns examples and rollouts into the arrays of `method/batch.py`: prompts, packed branches, supervised tokens.

The image comes first in every role's user turn, so the system header and the image tokens are a prefix that all roles
of a sample share. The roles are branches after that prefix in ONE sequence: `segment_ids` keep the branches from
attending to each other, and each branch's positions continue from the prefix as if it were the only one:

    tokens    | header image | role A's prompt, completion | role B's prompt, completion | padding
    segment   | 1 1 1 1 1 1 1| 2 2 2 2 2 2 2 2 2 2 2 2 2 2 | 3 3 3 3 3 3 3 3 3 3 3 3 3 3 | 0 0 0
    position  | 0 1 2 ...  p | p+1 p+2 ...                 | p+1 p+2 ...                 | 0 0 0

A branch holds only what predicts its scored tokens: the role's prompt, then the student's completion up to but not
including the last scored token (with `reads="scored"`, only the scored tokens before it). Roles that see other images
than the student (`data.views`) are branches of a separate sequence, one per view. In families whose layers carry a
state along the sequence, padding aligns each branch to a multiple of `ModelConfig.chunk`, and `models/delta_rule.py`
starts it from the prefix's state.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vigos_jax.data.processor import EncodedImage, Processor, Turn
from vigos_jax.data.views import ORIGINAL, ImageView
from vigos_jax.errors import InputError
from vigos_jax.method.batch import PromptBatch, ScoreBatch, SupervisedTokens, ViewBatch
from vigos_jax.method.prompts import fill
from vigos_jax.method.roles import TeacherRole, roles_per_rollout, roles_per_token, views_of
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
from vigos_jax.method.spans import Spans
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.inputs import VisionInputs
from vigos_jax.models.positions import vision_layout


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that arrays may be padded to, ascending per kind. Few sizes mean few shapes to compile programs for.

    Attributes:
      patches: window slots of a row's images under one view.
      prompt: tokens of a student's prompt.
      completion: tokens of a completion.
      sequence: tokens of a student's prompt and completion, or of a view's prefix and all its branches.
      agree: maps the size that this process needs to the largest that any process needs.
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample as the model reads it: its images, the student's turn and one turn per role of the table.

    A row without turns (`student` is None) is a bad row that keeps its slot in the batch.

    Attributes:
      images: the row's own, which the student sees.
      views: per view other than the original, the images that its roles see instead.
    """

    images: tuple[EncodedImage, ...] = ()
    student: Turn | None = None
    teachers: tuple[Turn, ...] = ()
    views: Mapping[ImageView, tuple[EncodedImage, ...]] = dataclasses.field(default_factory=dict)

    def images_of(self, view: ImageView) -> tuple[EncodedImage, ...]:
        """What a role with this view sees; a bad row has nothing to see."""
        if view == ORIGINAL:
            return self.images
        return self.views[view] if view.is_read and self.student is not None else ()

    @property
    def prompt(self) -> Turn:
        """The student's turn of a row that is not bad."""
        if self.student is None:
            raise ValueError("a bad row has no prompt")
        return self.student


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One completion of a row.

    Attributes:
      ids: sampled token ids, with the end-of-sequence token if it was sampled.
      spans: where its parts are.
      logps: log-probability of each token as the engine computed it, from the model's own distribution: no
        temperature, no penalties, no truncation. None for rollouts read from a file.
    """

    ids: tuple[int, ...]
    spans: Spans
    logps: tuple[float, ...] | None = None


def make_row(  # noqa: PLR0913  (what a sample and its prompts are made of)
    images: tuple[EncodedImage, ...],
    *,
    problem: str,
    student: Mapping[str, str],
    processor: Processor,
    roles: tuple[TeacherRole, ...] = (),
    reference: str = "",
    fields: Mapping[str, str] | None = None,
    views: Mapping[ImageView, tuple[EncodedImage, ...]] | None = None,
) -> Row:
    """Builds a row: tokenises the student's prompt and the prompt of every role.

    Args:
      images: the row's own, which the student sees.
      student: `user` and `assistant_prefill`, as in `config.prompts.student`.
      roles: the teachers; () for a row that is answered but not scored.
      reference: the answer, which only the roles' templates may show.
      fields: texts of further columns by name, which only the roles' templates may show.
      views: the images of every view of `roles` whose `is_read` is true.

    Raises:
      InputError: the student's template asks for the reference.
    """

    def turn(seen: tuple[EncodedImage, ...], text: str, prefill: str) -> Turn:
        return processor.encode_turn(
            user_text=text,
            assistant_prefill=prefill,
            grids=[image.grid for image in seen],
            labels=[image.label for image in seen],
            continues=[image.continues for image in seen],
        )

    shown = {"problem": problem, "reference": reference} | dict(fields or {})
    question = turn(images, fill(student["user"], problem=problem), student["assistant_prefill"])
    row = Row(images=images, student=question, views=views or {})
    turns = [turn(row.images_of(r.view), fill(r.user, **shown), r.assistant_prefill) for r in roles]
    return dataclasses.replace(row, teachers=tuple(turns))


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
    for view in views_of(roles):
        for valid in (True, False):
            length = 0
            for role, turn in zip(roles, row.teachers, strict=True):
                if role.view == view and role.applies(valid):
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
    """The rows' images under a view, in no fewer slots than the original images of the rows in `least` take."""
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


_UNUSED = _Token(-1, 0, 0, 0, 0, np.nan, np.inf)


def _supervised(rows: Sequence[Sequence[_Token]], length: int) -> SupervisedTokens:
    """Pads each row's tokens to `length`."""
    columns = {}
    for name in _Token._fields:
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
    """The smallest of the clips that apply to a scored token as a whole; infinity if none does.

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
      ValueError: a role's prompt does not share the header and images of its view.
    """
    views = views_of(roles)
    students: list[TokenSequence] = []
    teachers: list[list[TokenSequence]] = [[] for _ in views]
    supervised: list[list[list[_Token]]] = []  # by row and view
    for row, rollout in zip(rows, rollouts, strict=True):
        is_bad = row.student is None or rollout is None
        students.append(EMPTY if is_bad else token_sequence(row.images, row.prompt.ids, config, rollout.ids))
        packed = [(EMPTY, [])] * len(views) if is_bad else [_pack_row(row, rollout, roles, v, config) for v in views]
        for branches, (sequence, _) in zip(teachers, packed, strict=True):
            branches.append(sequence)
        supervised.append([tokens for _, tokens in packed])

    # A token takes one slot per role that scores it, `times` at most. Rounding the number of tokens, not of slots, to
    # a bucket makes sure that every completion that fits its bucket also fits here.
    times = roles_per_token(roles)
    most = max(1, *(sum(map(len, tokens)) for tokens in supervised))
    entries = buckets.fit("completion", -(-most // times)) * times
    vision = _vision(rows, ORIGINAL, config, buckets) if with_images else None
    student = padded_text(students, buckets.fit("sequence", max(len(s.ids) for s in students)), branches=0)
    # One length for all views, or the number of programs would be the product of their lengths' numbers.
    length = buckets.fit("sequence", max((len(t.ids) for sequences in teachers for t in sequences), default=0))
    texts = []
    for view, sequences in zip(views, teachers, strict=True):
        branches = roles_per_rollout(tuple(role for role in roles if role.view == view))
        texts.append(padded_text(sequences, length, branches=branches))
    starts = [i * length for i in range(len(views))]  # of each view in `teacher_at`
    return ScoreBatch(
        supervised=_supervised([_joined(tokens, starts) for tokens in supervised], entries),
        vision=vision,
        student=student,
        teacher=texts[0] if ORIGINAL in views else None,  # it is the first
        views=tuple(
            host(ViewBatch, vision=_vision(_used(rows, sequences), view, config, buckets, least=rows), text=text)
            if view.is_read
            else host(ViewBatch, vision=None, text=text)
            for view, text, sequences in zip(views, texts, teachers, strict=True)
            if view != ORIGINAL
        ),
    )


def _used(rows: Sequence[Row], sequences: Sequence[TokenSequence]) -> list[Row]:
    """The rows, with `Row()` in place of those whose view no role reads: their images need no encoding."""
    return [row if len(sequence.ids) else Row() for row, sequence in zip(rows, sequences, strict=True)]


def _joined(tokens: Sequence[Sequence[_Token]], starts: Sequence[int]) -> list[_Token]:
    """A row's tokens of all views by role; `teacher_at` counts along the views' sequences, one after the other."""
    placed = [
        t._replace(teacher_at=t.teacher_at + start) for part, start in zip(tokens, starts, strict=True) for t in part
    ]
    return sorted(placed, key=lambda t: t.role)


def _pack_row(
    row: Row, rollout: Rollout, roles: tuple[TeacherRole, ...], view: ImageView, config: ModelConfig
) -> tuple[TokenSequence, list[_Token]]:
    """The branches of a row's roles with this view, behind their prefix, and the tokens that they score."""
    in_view = [(r, *x) for r, x in enumerate(zip(roles, row.teachers, strict=True)) if x[0].view == view]
    prefix = row.prompt.prefix_ids if view == ORIGINAL else in_view[0][2].prefix_ids
    parts = [token_sequence(row.images_of(view), prefix, config)]
    after_prefix = next_position(parts[0].positions)
    length, segment, tokens = len(prefix), 1, []
    for r, role, turn in in_view:
        if turn.prefix_ids != prefix:
            raise ValueError(f"role {role.name} does not share its view's header and images")
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
            clip = token_clip(role, j, scored)
            tokens.append(_Token(r, student_at, teacher_at, j, rollout.ids[j], logp, clip))
        length += n
    if not tokens and view != ORIGINAL:
        return EMPTY, []  # images that nobody reads are not encoded
    return TokenSequence(*(np.concatenate(x, -1) for x in zip(*parts, strict=True))), tokens
