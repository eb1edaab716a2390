"""Rollouts between the sampler and the objective: sampled here or read from a file, parsed, and what they look like."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vigos_jax.data.examples import Encoder, Example, is_unicode
from vigos_jax.data.images import read_image
from vigos_jax.data.processor import PixelLimits, Processor
from vigos_jax.data.sources import JsonlSource
from vigos_jax.data.visuals import Outline, Visual, fitting, layouts
from vigos_jax.grading.answer_text import last_boxed, mentions
from vigos_jax.grading.rules import grade
from vigos_jax.method.packing import Buckets, slot_count, too_long
from vigos_jax.method.roles import TeacherRole, views_of
from vigos_jax.method.rows import Rollout, Row, make_row
from vigos_jax.method.spans import find_spans
from vigos_jax.models.config import ModelConfig
from vigos_jax.rollouts.sampler import Completions
from vigos_jax.runtime.files import finite_or_none
from vigos_jax.session import Session, buckets_of, check_template, objective_of, resolve_model
from vigos_jax.teachers import check_teachers

_PARTS = ("description", "reasoning", "answer")
FAILED = "rollout_failed"  # in place of a bad row's reason: the row is good, but could not be sampled


@dataclasses.dataclass(frozen=True)
class Case:
    """One row with its rollout, ready to score, or with the reason why not; `index` is its number in the source."""

    index: int
    example: Example
    row: Row = Row()
    rollout: Rollout | None = None
    bad_reason: str | None = None

    @property
    def complaint(self) -> str:
        """What is wrong with a row that is bad, and with which value."""
        detail = self.example.bad_detail
        return f"id {self.example.id}: {self.bad_reason}" + (f": {detail}" if detail else "")

    @property
    def scored(self) -> Rollout:
        """The rollout of a row that is not bad."""
        if self.rollout is None:
            raise ValueError(f"case {self.index} has no rollout: {self.bad_reason}")
        return self.rollout


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a Reader needs of a session."""

    processor: Processor
    roles: tuple[TeacherRole, ...]
    buckets: Buckets
    config: ModelConfig


@dataclasses.dataclass(frozen=True)
class Reader:
    """Writes an example out as the student and all roles read it; picklable, so that data workers can have one."""

    processor: Processor
    student: Mapping[str, str]
    roles: tuple[TeacherRole, ...]
    buckets: Buckets
    config: ModelConfig
    max_images: int
    fields: tuple[str, ...]
    options_template: str
    pixels: PixelLimits

    @classmethod
    def of(cls, session: "Session | _Parts", config) -> "Reader":
        """The reader of a run: its student's prompt, its roles, its declared sizes."""
        student = dict(config.prompts.student.items())
        d = config.data
        rows = {"max_images": d.max_images, "fields": tuple(d.fields), "options_template": d.options_template}
        parts = session.processor, student, session.roles, session.buckets, session.config
        return cls(*parts, **rows, pixels=PixelLimits(d.min_pixels, d.max_pixels))

    @classmethod
    def of_folder(cls, config) -> "Reader":
        """The same without the model's weights: of its folder alone."""
        check_teachers(config)
        folder = resolve_model(config.model.path, weights=False)
        processor = Processor.load(folder, chat_template_kwargs=config.model.chat_template_kwargs.to_dict())
        check_template(config, processor, for_training=True)
        parts = _Parts(processor, objective_of(config).roles, buckets_of(config), ModelConfig.load(folder))
        return cls.of(parts, config)

    def example(
        self, source: Any, index: int, *, image_roots: Sequence[str] = (), max_completion: int | None = None
    ) -> Example:
        """Row `index` of a source, encoded.

        Args:
          image_roots: folders that its images may lie in, beside the source's own.
          max_completion: the row is to fit the buckets with a completion of this length: its images are made smaller
            where it would not, and it is bad where that does not help. None takes them as they are.
        """
        return self.encoder(image_roots=image_roots, max_completion=max_completion)(source, index)

    def encoder(self, *, image_roots: Sequence[str] = (), max_completion: int | None = None) -> Encoder:
        """What reads the rows; arguments as of `example`."""
        check = None if max_completion is None else functools.partial(self.too_long, max_completion=max_completion)
        options = {"options_template": self.options_template, "pixels": self.pixels, "too_long": check}
        views = tuple(view for view in views_of(self.roles) if view.is_read)
        return Encoder(self.processor, self.max_images, self.fields, views, tuple(image_roots), **options)

    def row(self, example: Example, *, reference: str | None = None, images: Example | None = None) -> Row:
        """The example's row, a bad one if the example is.

        Args:
          reference: instead of the example's own.
          images: whose images are shown, to the student and to every role; None for the example's own.
        """
        if example.bad_reason is not None:
            return Row()
        shown = example if images is None else images
        return make_row(
            shown.images,
            problem=example.problem,
            reference=example.reference if reference is None else reference,
            student=self.student,
            roles=self.roles,
            processor=self.processor,
            fields=example.fields,
            views=shown.views,
        )

    def too_long(
        self,
        example: Example,
        *,
        max_completion: int,
        reference: str | None = None,
        images: Example | None = None,
    ) -> str | None:
        """Why a row (arguments as for `row`) does not fit the buckets with `max_completion` tokens; None if it does."""
        row = self.row(example, reference=reference, images=images)
        kind = too_long(row, roles=self.roles, buckets=self.buckets, max_completion=max_completion, config=self.config)
        return kind and f"{kind}_too_long"


def prompt_pixels(
    visuals: Sequence[Visual | Outline], session: Session, config, *, problem: str, student: Mapping[str, str]
) -> PixelLimits:
    """Image size limits of a row that is only sampled, not trained on: the largest that fit the buckets.

    Raises:
      TooLong: the row does not fit even with the smallest images.
    """
    processor, buckets = session.processor, session.buckets

    def reason(limits: PixelLimits) -> str | None:
        row = make_row(layouts(visuals, processor, limits), problem=problem, student=student, processor=processor)
        sizes = {"patches": slot_count(row, session.config), "prompt": len(row.prompt.ids)}
        return next((f"{kind}_too_long" for kind, n in sizes.items() if n > max(getattr(buckets, kind))), None)

    return fitting(visuals, processor, PixelLimits(config.data.min_pixels, config.data.max_pixels), reason)


def prompt_row(visuals: Sequence[Visual], session: Session, config, *, problem: str, student: Mapping[str, str]) -> Row:
    """A row that is only answered; TooLong as of `prompt_pixels`."""
    pixels = prompt_pixels(visuals, session, config, problem=problem, student=student)
    images = tuple(image for v in visuals for image in v.encode(session.processor, pixels))
    return make_row(images, problem=problem, student=student, processor=session.processor)


def parse(session: Session, rows: Sequence[Row], sampled: Completions) -> list[Rollout | None]:
    """The sampler's completions with their spans; None for bad rows and for those whose sampling failed."""
    spans = [find_spans(session.processor.token_bytes(ids), rule=session.span_rule) for ids in sampled.ids]
    parts = zip(rows, sampled.ids, spans, sampled.logps, strict=True)
    return [
        Rollout(ids, where, logps) if row.student and sampled.failure(i) is None else None
        for i, (row, ids, where, logps) in enumerate(parts)
    ]


def read_cases(source: JsonlSource, session: Session, config) -> Iterator[Case]:
    """The rows of a rollouts file: `{"id", "images", "problem", "answer"}` and `"completion"` or `"completion_ids"`."""
    reader = Reader.of(session, config)
    for i in range(len(source)):
        ids = _completion_ids(source[i], session)
        length = None if isinstance(ids, str) or len(ids) > max(session.buckets.completion) else len(ids)
        # The rollouts' own engine chose the paths.
        example = reader.example(source, i, image_roots=("/",), max_completion=length)
        completion = example.bad_reason or _completion(ids, session)
        if isinstance(completion, str):
            yield Case(i, example, bad_reason=completion)
        else:
            yield Case(i, example, reader.row(example), completion)


def _completion(ids: list[int] | str, session: Session) -> Rollout | str:
    """The rollout of a usable row, or the reason why it has none."""
    if isinstance(ids, str):
        return ids
    if len(ids) > max(session.buckets.completion):
        return "completion_too_long"
    return Rollout(tuple(ids), find_spans(session.processor.token_bytes(ids), rule=session.span_rule))


def _completion_ids(raw: dict[str, Any], session: Session) -> list[int] | str:
    """Token ids of a row's completion, or the reason why there are none."""
    ids = raw.get("completion_ids")
    if ids is None:
        text = raw.get("completion")
        if not isinstance(text, str):
            return "no_completion"
        return session.processor.encode_text(text) if is_unicode(text) else "text_not_unicode"
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < session.config.vocab_size for i in ids):
        return "bad_completion_ids"
    return ids


def spans_json(rollout: Rollout) -> dict[str, list[list[int]]]:
    """Token ranges [start, end) of the parts; an empty part has none."""
    parts = {name: getattr(rollout.spans, name) for name in _PARTS}
    return {name: [list(span)] if span[1] > span[0] else [] for name, span in parts.items()}


def pieces(session: Session, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character that is split between tokens shows as replacement characters."""
    return [piece.decode("utf-8", errors="replace") for piece in session.processor.token_bytes(ids)]


def first_image(source: Any, index: int) -> Image.Image:
    """The first image of a row that could be read a moment ago; a video's first frame."""
    items = source[index]["images"]
    first = items[0] if isinstance(items, list | tuple | np.ndarray) else items
    if isinstance(first, Mapping) and "frames" in first:
        first = first["frames"][0]
    return read_image(first, image_roots=(*getattr(source, "image_roots", ()), "/"))


def records(session: Session, examples: Sequence[Example], rollouts: Sequence[Rollout | None]) -> list[dict[str, Any]]:
    """JSON of each row and its rollout, to look at; a bad row has its reason instead."""
    out = []
    for example, rollout in zip(examples, rollouts, strict=True):
        row: dict[str, Any] = {"id": example.id}
        if rollout is None:
            out.append(row | {"bad_reason": example.bad_reason or FAILED})
            continue
        row |= {"problem": example.problem, "answer": example.reference, "completion_ids": list(rollout.ids)}
        row |= {"completion": session.processor.decode(rollout.ids), "is_valid": rollout.spans.is_valid}
        out.append(row | {"sampled_logps": [finite_or_none(p) for p in rollout.logps or ()]})
    return out


def rollout_counts(session: Session, examples: Sequence[Example], rollouts: Sequence[Rollout | None]) -> dict[str, int]:
    """What `rollout_metrics` is made of; the counts of several processes add up, name by name."""
    decode, eos = session.processor.decode, set(session.processor.eos_ids)
    out: Counter[str] = Counter()
    for example, rollout in zip(examples, rollouts, strict=True):
        if rollout is None:
            continue
        answer, spans = last_boxed(decode(rollout.ids)), rollout.spans
        out["rollouts"] += 1
        references = (example.reference, *example.alternatives)
        out["correct"] += any(grade(answer, r, options=example.options).is_correct for r in references)
        out["tokens"] += len(rollout.ids)
        out["truncated"] += not rollout.ids or rollout.ids[-1] not in eos
        if not spans.is_valid:
            out[f"invalid/{spans.invalid_reason}"] += 1
            continue
        out["valid"] += 1
        for part in _PARTS:
            start, end = getattr(spans, part)
            out[f"length/{part}"] += end - start
        told = mentions(decode(rollout.ids[slice(*spans.description)]), answer) if answer else None
        if told is not None:
            out["can_be_told"] += 1
            out["told"] += told
    return {name: int(n) for name, n in out.items()}


def rollout_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """How a step's rollouts look, from `rollout_counts`; rates are over the usable rows unless said otherwise.

    valid_rate, accuracy (of the last closed box), truncated_rate (no end token), completion_tokens (mean);
    invalid/REASON: share of rollouts that break this rule first;
    length/PART: mean tokens of the part in valid rollouts;
    leak_rate: share of valid rollouts whose description already contains their final answer. That is not always a
      leak: an answer that can be seen belongs in the description. Watch the trend.
    """
    rollouts, valid = counts.get("rollouts", 0), counts.get("valid", 0)
    if not rollouts:
        return {}
    out = {
        "valid_rate": valid / rollouts,
        "accuracy": counts["correct"] / rollouts,
        "completion_tokens": counts["tokens"] / rollouts,
        "truncated_rate": counts["truncated"] / rollouts,
    }
    out |= {name: n / rollouts for name, n in sorted(counts.items()) if name.startswith("invalid/")}
    if valid:
        out |= {f"length/{part}": counts[f"length/{part}"] / valid for part in _PARTS}
    return out | ({"leak_rate": counts["told"] / counts["can_be_told"]} if "can_be_told" in counts else {})
