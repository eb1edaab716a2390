"""Rows of a source as Examples: their images and texts, read and checked. A row that cannot be used says why."""

import contextlib
import dataclasses
import decimal
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vigos_jax.data.cleaning import clean_problem
from vigos_jax.data.images import BadImage, image_size
from vigos_jax.data.markers import MarkerMismatch, numbers_as_words
from vigos_jax.data.processor import AS_THE_FOLDER, EncodedImage, PixelLimits, Processor
from vigos_jax.data.references import reference_of, with_options
from vigos_jax.data.sources import VIEW_COLUMNS, raw_row
from vigos_jax.data.views import ImageView, ViewOfRow, view_of
from vigos_jax.data.visuals import (
    TooLong,
    Visual,
    fitting,
    frames_of,
    images_of_row,
    is_video,
    layouts,
    read_visuals,
    smallest,
)
from vigos_jax.grading.choice import option_index
from vigos_jax.grading.options import first_number, parse_options, parse_references


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row, ready for the model; a bad one has no images and empty texts.

    Attributes:
      views: images other than the row's own that roles see, by view.
      options: texts of options A, B, ... of a multiple-choice row; () without any.
      alternatives: further references, as right as `reference`; teachers see only `reference`.
      shrunk: whether its images were shrunk below the configured limits to fit the buckets.
      bad_detail: the value that makes a row bad, for people.
      place: the location of a bad row in its source.
    """

    id: str
    images: tuple[EncodedImage, ...] = ()
    problem: str = ""  # cleaned
    reference: str = ""  # cleaned reference answer
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # texts of further columns
    views: Mapping[ImageView, tuple[EncodedImage, ...]] = dataclasses.field(default_factory=dict)
    options: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    shrunk: bool = False
    bad_reason: str | None = None  # None, or a short kind such as "image_unreadable"
    bad_detail: str = ""
    place: str = ""

    @property
    def complaint(self) -> str:
        """Which row a bad one is, and what is wrong with it: "line 7, id '12': 'a.png' is not a file in /data"."""
        return f"{self.place}, id {self.id!r}" + (f": {self.bad_detail}" if self.bad_detail else "")


_OTHER_ROWS = 16  # looked at for another image, before a row is bad
_ANSWERS = (str, int, float, decimal.Decimal, type(None))


class BadRow(Exception):
    """The row cannot be used.

    Attributes:
      kind: a short name; the message tells the value.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(detail)
        self.kind = kind


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """Reads a source's rows; picklable if `too_long` is.

    Attributes:
      max_images: more images and videos than this make a row bad.
      fields: further text columns that prompts show; a row that lacks one is bad.
      views: image views that roles need besides a row's own images; a row that cannot provide one is bad.
      image_roots: folders that may hold images, besides the source's own; see `read_image`.
      options_template: how each option is appended to the question, like "{letter}. {option}"; "" appends none.
      pixels: limits for resizing each image, lowered alike for all images of a row that would not fit otherwise.
      too_long: returns the kind of an example that does not fit, None if it fits; of images it uses only the grids.
    """

    processor: Processor
    max_images: int
    fields: tuple[str, ...] = ()
    views: tuple[ImageView, ...] = ()
    image_roots: tuple[str, ...] = ()
    options_template: str = ""
    pixels: PixelLimits = AS_THE_FOLDER
    too_long: Callable[[Example], str | None] | None = None

    def __call__(self, source: Any, index: int) -> Example:
        """Row `index` of a source.

        Images in a row are bytes, `{bytes, path}`, paths or PIL images, one or a list; a video among them is
        `{frames: images, fps: frames per second}`.
        """
        row = source[index]
        own = raw_row(row, index)
        roots = (*getattr(source, "image_roots", ()), *self.image_roots)
        try:
            if row.get("bad_reason"):
                raise BadRow(row["bad_reason"], str(row.get("bad_detail") or ""))
            if own.get("bad_reason"):
                raise BadRow(own["bad_reason"], own["bad_detail"])
            return self._example(row, own, roots, lambda: self._other_rows_images(source, index, roots))
        except (BadRow, BadImage) as e:
            place = source.place(index) if hasattr(source, "place") else f"row {index}"
            detail = " ".join(str(e).removeprefix(f"{e.kind}: ").split())
            return Example(own["id"], bad_reason=e.kind, bad_detail=detail, place=place)

    def _example(
        self,
        row: Mapping[str, Any],
        own: Mapping[str, Any],
        roots: Sequence[str],
        others: Callable[[], Iterator[tuple[Visual, ...]]],
    ) -> Example:
        items = images_of_row(own)
        if not items:
            raise BadRow("no_image")
        videos = sum(map(is_video, items))
        problem = _problem(own["problem"], images=len(items) - videos, videos=videos)
        options, answer = self._options(problem, own["options"], own["answer"])
        if options and self.options_template:
            problem = with_options(problem, options, template=self.options_template)
        if not is_unicode(problem + "".join(answer)):
            raise BadRow("text_not_unicode")
        if len(items) > self.max_images:
            raise BadRow("too_many_images", f"{len(items)} images; config.data.max_images is {self.max_images}")
        reading = {"image_roots": roots, "least_side": self.processor.merge_unit}
        visuals, own_columns = read_visuals(items, **reading), row.get(VIEW_COLUMNS) or {}
        shown = [ViewOfRow(v, view_of(v, visuals, own_columns.get(v.column), others, **reading)) for v in self.views]
        if more := next((v for v in shown if len(v.visuals) > self.max_images), None):
            raise BadRow("too_many_images", f"{len(more.visuals)} in {more.view.column}; at most {self.max_images}")
        fields = {name: _field(row, name) for name in self.fields}
        example = Example(own["id"], (), problem, answer[0], fields, options=options, alternatives=answer[1:])
        pixels = others_pixels = self.pixels
        if self.too_long is not None:
            pixels, others_pixels = self._fitting(example, visuals, shown, self.too_long)
        images = tuple(image for v in visuals for image in v.encode(self.processor, pixels))
        views = {v.view: v.encode(self.processor, pixels if v.is_alike else others_pixels) for v in shown}
        shrunk = (pixels, others_pixels) != (self.pixels, self.pixels)
        return dataclasses.replace(example, images=images, views=views, shrunk=shrunk)

    def _other_rows_images(self, source: Any, index: int, roots: Sequence[str]) -> Iterator[tuple[Visual, ...]]:
        """Images of a few rows, starting half the source away, as neighbouring rows often share an image."""
        for step in range(min(_OTHER_ROWS, len(source) - 1)):
            other = (index + max(1, len(source) // 2) + step) % len(source)
            items = images_of_row(raw_row(source[other], other)) if other != index else []
            if 0 < len(items) <= self.max_images:
                with contextlib.suppress(BadImage):
                    yield read_visuals(items, image_roots=roots, least_side=self.processor.merge_unit)

    def _options(self, problem: str, options: object, answer: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(the row's options, its references); BadRow if they cannot be used.

        If the question or the template shows the options, a reference may be a letter. If nothing shows them, it is
        the option's text, as the letter cannot be inferred.
        """
        if any(not isinstance(v, _ANSWERS) for v in parse_references(answer)):
            raise BadRow("bad_answer_type", f"answer is {_short(answer)}, neither text nor number")
        texts = parse_options(options)
        if texts is None and self.options_template:
            raise BadRow("bad_options", f"options are {_short(options)}")
        texts = tuple(numbers_as_words(text) for text in texts or ())
        reference = reference_of(answer, texts, first=first_number(options))
        if reference.error == "empty_answer":
            raise BadRow("empty_answer", f"answer is {_short(answer)}")
        if not texts:
            return (), reference.texts
        are_shown = bool(self.options_template) or with_options(problem, texts) == problem
        if reference.error and (are_shown or reference.error != "answer_not_an_option" or reference.is_index):
            raise BadRow(reference.error, f"answer is {_short(answer)}, options are {_short(list(texts))}")
        if reference.error:  # a free-form answer: no options are shown
            return (), reference_of(answer, ()).texts
        index = option_index(reference.texts[0], texts)
        return texts, reference.texts if are_shown or index is None else (texts[index],)

    def _fitting(
        self,
        example: Example,
        visuals: Sequence[Visual],
        shown: Sequence[ViewOfRow],
        too_long: Callable[[Example], str | None],
    ) -> tuple[PixelLimits, PixelLimits]:
        """The limits (own images, views) under which the row fits; BadRow if there are none.

        The student has priority: its images shrink only if the row does not fit even with the smallest views.
        """

        def reason(own: PixelLimits, others: PixelLimits) -> str | None:
            images = layouts(visuals, self.processor, own)
            views = {v.view: v.layout(self.processor, own if v.is_alike else others) for v in shown}
            return too_long(dataclasses.replace(example, images=images, views=views))

        least = smallest(self.pixels, self.processor)
        try:
            if reason(self.pixels, self.pixels) is None:
                return self.pixels, self.pixels
            own = fitting(visuals, self.processor, self.pixels, lambda limits: reason(limits, least))
            return own, fitting(visuals, self.processor, self.pixels, lambda limits: reason(own, limits))
        except TooLong as e:
            detail = f"{e}, question of {len(example.problem)} characters"
            raise BadRow(e.kind, detail) from e


def _field(row: Mapping[str, Any], name: str) -> str:
    """The text of a further column, as it is."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"no_{name}", f"{name} is {_short(value)}")
    if not is_unicode(value):
        raise BadRow("text_not_unicode")
    return value


def _problem(problem: object, *, images: int, videos: int) -> str:
    """The cleaned question of a row with so many images and videos."""
    if problem is not None and not isinstance(problem, str):
        raise BadRow("bad_problem_type", f"problem is {_short(problem)}, not a text")
    try:
        text = clean_problem(problem, images=images, videos=videos)
    except MarkerMismatch as e:
        raise BadRow("image_markers", str(e)) from e
    if not text:
        raise BadRow("empty_problem")
    return text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    return re.search("[\ud800-\udfff]", text) is None


def row_size(
    row: Mapping[str, Any], *, processor: Processor, image_roots: Sequence[str], pixels: PixelLimits = AS_THE_FOLDER
) -> int:
    """About how many prompt tokens a raw row will have, from its images' headers and the length of its question."""
    tokens = 0
    for item in images_of_row(row):
        try:
            frames = frames_of(item) if is_video(item) else [item]
            blocks = -(-len(frames) // processor.frames_per_patch) if is_video(item) else 1
            tokens += blocks * processor.visual_tokens(*image_size(frames[0], image_roots=image_roots), pixels)
        except BadImage:  # a bad row, wherever it stands
            continue
    problem = row.get("problem")
    return tokens + len(problem) // 4 if isinstance(problem, str) else tokens
