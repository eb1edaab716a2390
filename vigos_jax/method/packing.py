"""From examples and rollouts to the arrays of `batch`: prompts, packed role branches, supervised tokens.

The image comes first in every role's user turn, so system header and image tokens are one shared prefix. A sample's
frozen roles are branches behind it in ONE sequence; `segment_ids` keep branches apart, and a branch's positions go on
from the prefix as if it were alone:

    tokens    | header image | prompt+completion of role A | prompt+completion of role B | padding
    segment   | 1 1 1 1 1 1 1| 2 2 2 2 2 2 2 2 2 2 2 2 2 2 | 3 3 3 3 3 3 3 3 3 3 3 3 3 3 | 0 0 0
    position  | 0 1 2 ...  p | p+1 p+2 ...                 | p+1 p+2 ...                 | 0 0 0

Each branch holds only what its scored tokens need: its prompt and the student's completion up to the last of them.
Where a family's layers carry a state along the sequence, branches start at multiples of `ModelConfig.chunk`, behind
padding, and `models/delta_rule.py` hands each of them the prefix's state.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vigos_jax.data.processor import EncodedImage, Processor, Turn
from vigos_jax.errors import InputError
from vigos_jax.method.batch import PromptBatch, ScoreBatch, SupervisedTokens
from vigos_jax.method.prompts import fill
from vigos_jax.method.roles import TeacherRole, roles_per_rollout, roles_per_token
from vigos_jax.method.spans import Spans
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.positions import mrope_positions, vision_layout

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared sizes arrays are padded to, ascending: their number bounds the number of compilations.

    Attributes:
      patches: window slots of a row's images.
      prompt: student prompt tokens.
      completion: completion tokens.
      sequence: tokens of a student's prompt and completion, or of all teacher branches of a row.
      agree: makes the size that is needed here the one that every process needs.
    """

    patches: tuple[int, ...]
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sequence: tuple[int, ...]
    agree: Callable[[int], int] = int

    def fit(self, kind: str, n: int) -> int:
        """The smallest declared size that holds n, in all processes; those must call it in the same order."""
        n = self.agree(n)
        for size in getattr(self, kind):
            if n <= size:
                return size
        raise InputError(f"{n} does not fit config.buckets.{kind}; the largest is {max(getattr(self, kind))}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample as the model reads it: its images, the student's turn and one turn per role of the table.

    A row without turns (`student` is None) is a bad row that keeps its slot in the batch.
    """

    images: tuple[EncodedImage, ...] = ()
    student: Turn | None = None
    teachers: tuple[Turn, ...] = ()

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
      logps: log-probability of each token under the sampler, or None for rollouts made elsewhere.
    """

    ids: tuple[int, ...]
    spans: Spans
    logps: tuple[float, ...] | None = None


def make_row(
    images: tuple[EncodedImage, ...],
    *,
    problem: str,
    student: Mapping[str, str],
    processor: Processor,
    roles: tuple[TeacherRole, ...] = (),
    reference: str = "",
    fields: Mapping[str, str] | None = None,
) -> Row:
    """Writes out the prompts of a sample.

    Args:
      student: `user` and `assistant_prefill`, as in `config.prompts.student`.
      roles: the teachers; none for a row that is only answered.
      reference: the answer that a role's template may show; the student's cannot ask for it.
      fields: texts of further columns that a role's template, but not the student's, may show.
    """
    visuals: dict[str, Any] = {
        "grids": [image.grid for image in images],
        "labels": [image.label for image in images],
        "continues": [image.continues for image in images],
    }

    def turn(text: str, prefill: str) -> Turn:
        return processor.encode_turn(user_text=text, assistant_prefill=prefill, **visuals)

    shown = {"problem": problem, "reference": reference} | dict(fields or {})
    return Row(
        images=images,
        student=turn(fill(student["user"], problem=problem), student["assistant_prefill"]),
        teachers=tuple(turn(fill(r.user, **shown), r.assistant_prefill) for r in roles),
    )


def slot_count(row: Row, config: ModelConfig) -> int:
    """Window slots of a row's images, what `Buckets.patches` counts."""
    return len(vision_layout([i.grid for i in row.images], config.vision).source)


def too_long(
    row: Row, *, roles: tuple[TeacherRole, ...], buckets: Buckets, max_completion: int, config: ModelConfig
) -> str | None:
    """The kind of bucket this row cannot fit whatever is sampled for it, or None if it always fits."""
    prompt = len(row.prompt.ids)
    branches = 0
    for valid in (True, False):
        length = len(row.prompt.prefix_ids)
        for role, turn in zip(roles, row.teachers, strict=True):
            if role.applies(valid):
                length += _gap(length, config) + len(turn.rest_ids) + max_completion
        branches = max(branches, length)
    longest = max(prompt + max_completion, branches)
    for kind, n in (("patches", slot_count(row, config)), ("prompt", prompt), ("sequence", longest)):
        if n > max(getattr(buckets, kind)):
            return kind
    return None


def _gap(length: int, config: ModelConfig) -> int:
    """Padding behind `length` tokens, so that a branch may start."""
    return -length % config.chunk


def _vision(rows: Sequence[Row], config: ModelConfig, buckets: Buckets) -> VisionInputs:
    v = config.vision
    layouts = [vision_layout([i.grid for i in row.images], v) for row in rows]
    slots = buckets.fit("patches", max(len(x.source) for x in layouts))
    slots = -(-max(slots, 1) // v.window_patches) * v.window_patches  # whole windows
    b = len(rows)
    patches = np.zeros((b, slots, v.patch_dim), np.float32)
    image_ids = np.zeros((b, slots), np.int32)
    hw, grid = np.zeros((b, slots, 2), np.int32), np.zeros((b, slots, 2), np.int32)
    token_unit = np.zeros((b, slots // v.merge_unit), np.int32)
    for i, (row, x) in enumerate(zip(rows, layouts, strict=True)):
        if not row.images:
            continue
        n, used = len(x.source), x.source >= 0
        patches[i, :n][used] = np.concatenate([image.patches for image in row.images])[x.source[used]]
        image_ids[i, :n], hw[i, :n], grid[i, :n] = x.image_ids, x.hw, x.grid
        token_unit[i, : len(x.token_unit)] = x.token_unit
    return host(VisionInputs, patches=patches, image_ids=image_ids, hw=hw, grid=grid, token_unit=token_unit)


def host(struct: Callable[..., T], **arrays: Any) -> T:
    """A struct of device arrays with numpy arrays in their place, until it is put on the mesh."""
    return struct(**arrays)


class _Sequence(NamedTuple):
    """One row of `TextInputs`, without its batch and its padding: [t], positions [3, t]."""

    ids: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    image_index: np.ndarray


def _padding(n: int) -> _Sequence:
    zeros = np.zeros(n, np.int32)
    return _Sequence(zeros, np.zeros((3, n), np.int32), zeros, zeros - 1)


_EMPTY = _padding(0)


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


def _text(sequences: Sequence[_Sequence], length: int, *, branches: int | None = None) -> TextInputs:
    """Pads sequences to `length`. branches: see `TextInputs`."""
    b = len(sequences)
    ids, segments = np.zeros((b, length), np.int32), np.zeros((b, length), np.int32)
    positions, image_index = np.zeros((b, 3, length), np.int32), np.full((b, length), -1, np.int32)
    for i, row in enumerate(sequences):
        n = len(row.ids)
        ids[i, :n], positions[i, :, :n], segments[i, :n] = row.ids, row.positions, row.segment_ids
        image_index[i, :n] = row.image_index
    return host(
        TextInputs, ids=ids, positions=positions, segment_ids=segments, image_index=image_index, branches=branches
    )


def _supervised(rows: Sequence[Sequence[_Token]], length: int) -> SupervisedTokens:
    """Pads each row's tokens to `length`."""
    columns = {}
    for name in _Token._fields:
        unused = getattr(_UNUSED, name)
        columns[name] = np.full((len(rows), length), unused, np.float32 if isinstance(unused, float) else np.int32)
        for i, tokens in enumerate(rows):
            columns[name][i, : len(tokens)] = [getattr(token, name) for token in tokens]
    return host(SupervisedTokens, **columns)


def _sequence(row: Row, prompt: Sequence[int], config: ModelConfig, completion: Sequence[int] = ()) -> _Sequence:
    """A prompt and its completion.

    Only the prompt's image tokens stand for images: one that was sampled is a token like any other.
    """
    positions = mrope_positions(
        prompt,
        [i.grid for i in row.images],
        visual_ids=config.visual_ids,
        merge_size=config.vision.spatial_merge_size,
        time_steps=[i.time_step for i in row.images],
    )
    is_image = np.isin(np.asarray(prompt, np.int32), config.visual_ids)
    image_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
    after, n = _after(positions), len(completion)
    ids = np.asarray((*prompt, *completion), np.int32)
    positions = np.concatenate([positions, np.broadcast_to(after + np.arange(n), (3, n))], 1)
    image_index = np.concatenate([image_index, np.full(n, -1)])
    return _Sequence(ids, positions, np.ones(len(ids), np.int32), image_index)


def _after(positions: np.ndarray) -> int:
    """Where text goes on behind a sequence with these positions that ends with text."""
    return int(positions[0, -1]) + 1 if positions.size else 0


def pack_prompts(rows: Sequence[Row], *, config: ModelConfig, buckets: Buckets) -> PromptBatch:
    """Student prompts: plain causal rows, padded at the end as all others are."""
    sequences = [_EMPTY if r.student is None else _sequence(r, r.student.ids, config) for r in rows]
    length = buckets.fit("prompt", max(len(s.ids) for s in sequences))
    return host(
        PromptBatch,
        vision=_vision(rows, config, buckets),
        text=_text(sequences, length),
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
    """Row numbers in `count` groups of equal size, shortest sequences first: micro-batches with little padding.

    One group keeps the rows' order.
    """
    if count == 1:
        return [list(range(len(rows)))]

    def length(i: int) -> int:
        rollout = rollouts[i]
        return len(rows[i].prompt.ids) + len(rollout.ids) if rollout is not None else 0

    order, size = sorted(range(len(rows)), key=length), len(rows) // count
    return [order[k * size : (k + 1) * size] for k in range(count)]


def token_clip(role: TeacherRole, position: int, scored: Sequence[int]) -> float:
    """The smallest of the clips that hold for this token of the positions `scored` by the role."""
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
      rollouts: one per row; None for a bad row.
      with_images: whether to pack the images; without, `vision` is None.
    """
    students, teachers, supervised = [], [], []
    for row, rollout in zip(rows, rollouts, strict=True):
        if row.student is None or rollout is None:
            students.append(_EMPTY)
            teachers.append(_EMPTY)
            supervised.append([])
            continue
        students.append(_sequence(row, row.student.ids, config, rollout.ids))
        packed, tokens = _pack_row(row, rollout, roles, config)
        teachers.append(packed)
        supervised.append(tokens)

    # There are as many as tokens are scored, up to that many times.
    times = roles_per_token(roles)
    most = max(1, *(len(tokens) for tokens in supervised))
    return ScoreBatch(
        supervised=_supervised(supervised, buckets.fit("completion", -(-most // times)) * times),
        vision=_vision(rows, config, buckets) if with_images else None,
        student=_text(students, buckets.fit("sequence", max(len(s.ids) for s in students)), branches=0),
        teacher=_text(
            teachers,
            buckets.fit("sequence", max(len(t.ids) for t in teachers)),
            branches=roles_per_rollout(roles),
        ),
    )


def _pack_row(
    row: Row, rollout: Rollout, roles: tuple[TeacherRole, ...], config: ModelConfig
) -> tuple[_Sequence, list[_Token]]:
    """One row's branches behind their prefix, and its supervised tokens."""
    prefix = row.prompt.prefix_ids
    parts = [_sequence(row, prefix, config)]
    after_prefix = _after(parts[0].positions)
    length, segment, tokens = len(prefix), 1, []
    for r, (role, turn) in enumerate(zip(roles, row.teachers, strict=True)):
        if turn.prefix_ids != prefix:
            raise ValueError(f"role {role.name} does not share the student's header and images")
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
        parts += [_padding(gap), _Sequence(branch, positions, np.full(n, segment, np.int32), np.full(n, -1))]
        length += gap
        for j in scored:
            logp = rollout.logps[j] if rollout.logps is not None else np.nan
            student_at, teacher_at = len(row.prompt.ids) + j - 1, length + len(turn.rest_ids) + at[j] - 1
            clip = token_clip(role, j, scored)
            tokens.append(_Token(r, student_at, teacher_at, j, rollout.ids[j], logp, clip))
        length += n
    return _Sequence(*(np.concatenate(x, -1) for x in zip(*parts, strict=True))), tokens
