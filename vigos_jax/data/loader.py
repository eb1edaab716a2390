"""Rows of a source as Examples, in batches. One that cannot be used keeps its slot in the batch and says why."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from vigos_jax.data.cleaning import clean_problem, clean_reference
from vigos_jax.data.images import BadImage, image_size, read_image
from vigos_jax.data.processor import EncodedImage, Processor
from vigos_jax.data.sources import fingerprint, raw_row
from vigos_jax.errors import InputError
from vigos_jax.runtime.signals import deaf_worker

MIN_FPS, MAX_FPS = 1e-3, 1e3  # of a video's frames
MIN_ROWS = 100  # a bad fraction is judged as if at least this many rows had been seen
MIN_ROWS_ALL_BAD = 8  # but if none of the first rows is usable, this many are enough


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row, ready for the model; a bad one has no images and empty texts."""

    id: str
    images: tuple[EncodedImage, ...] = ()
    problem: str = ""  # cleaned
    reference: str = ""  # cleaned reference answer
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # texts of further columns
    bad_reason: str | None = None  # None, or a short kind such as "image_unreadable"


class _BadRow(Exception):
    """The row cannot be used."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def encode_row(
    row: Mapping[str, Any],
    index: int,
    *,
    processor: Processor,
    max_images: int,
    image_roots: Sequence[str],
    fields: Sequence[str] = (),
    too_long: Callable[[Example], str | None] | None = None,
) -> Example:
    """Reads a raw row's pictures and texts.

    Args:
      row: a source's row; pictures are bytes, `{bytes, path}`, paths or PIL images, one or a list; a video among
        them is `{frames: pictures, fps: frames per second}`.
      index: the row's number.
      max_images: more pictures and videos than this make the row bad.
      image_roots: see `read_image`.
      fields: further columns of texts that prompts show; a row without one of them is bad.
      too_long: names the kind of a row that does not fit, None if it fits.
    """
    own = raw_row(row, index)
    try:
        if row.get("bad_reason"):
            raise _BadRow(row["bad_reason"])
        problem, reference = _texts(own["problem"], own["answer"])
        encoded = [_encode(item, processor, image_roots) for item in _items(own["images"], max_images)]
        images = tuple(image for images in encoded for image in images)
        example = Example(own["id"], images, problem, reference, {name: _field(row, name) for name in fields})
        if too_long is not None and (kind := too_long(example)):
            raise _BadRow(kind)
    except (_BadRow, BadImage) as e:
        return Example(own["id"], bad_reason=e.kind)
    return example


def _field(row: Mapping[str, Any], name: str) -> str:
    """The text of a further column, as it is."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"no_{name}")
    if not is_unicode(value):
        raise _BadRow("text_not_unicode")
    return value


def _texts(problem: object, answer: object) -> tuple[str, str]:
    """Cleaned (problem, reference)."""
    if problem is not None and not isinstance(problem, str):
        raise _BadRow("bad_problem_type")
    if answer is not None and not isinstance(answer, str | int | float):
        raise _BadRow("bad_answer_type")
    problem, reference = clean_problem(problem), clean_reference(answer)
    if not problem:
        raise _BadRow("empty_problem")
    if not reference:
        raise _BadRow("empty_answer")
    if not is_unicode(problem + reference):
        raise _BadRow("text_not_unicode")
    return problem, reference


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    return re.search("[\ud800-\udfff]", text) is None


def _items(images: object, max_images: int) -> list[object]:
    items = list(images) if isinstance(images, list | tuple | np.ndarray) else [images]
    items = [item for item in items if item is not None]
    if not items:
        raise _BadRow("no_image")
    if len(items) > max_images:
        raise _BadRow("too_many_images")
    return items


def _encode(item: object, processor: Processor, image_roots: Sequence[str]) -> tuple[EncodedImage, ...]:
    """A picture's patches, or those of a video's frames."""

    def read(item: object) -> Image.Image:
        image = read_image(item, image_roots=image_roots)
        if min(image.size) < processor.merge_unit:  # the image processor would blow it up; too little to train on
            raise BadImage("image_too_small", f"{image.width} x {image.height} pixels")
        return image

    if not _is_video(item):
        return (processor.encode_image(read(item)),)
    frames, fps = _frames(item), item.get("fps")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not MIN_FPS <= fps <= MAX_FPS:
        raise BadImage("bad_video", f"fps {fps!r} must be the frames per second, {MIN_FPS:g} to {MAX_FPS:g}")
    return processor.encode_video([read(frame) for frame in frames], fps=fps)


def _is_video(item: object) -> bool:
    return isinstance(item, Mapping) and item.get("frames") is not None


def _frames(video: Mapping[str, Any]) -> Sequence[object]:
    frames = video["frames"]
    if not isinstance(frames, list | tuple | np.ndarray) or not len(frames):
        raise BadImage("bad_video", "its frames must be a list of pictures")
    return frames


def row_size(row: Mapping[str, Any], *, processor: Processor, image_roots: Sequence[str]) -> int:
    """About how many prompt tokens a raw row will have, from its pictures' headers and the length of its question."""
    images = row.get("images")
    items = list(images) if isinstance(images, list | tuple | np.ndarray) else [images]
    tokens = 0
    for item in items:
        try:
            frames = _frames(item) if _is_video(item) else [item]
            blocks = -(-len(frames) // processor.frames_per_patch) if _is_video(item) else 1
            tokens += blocks * processor.visual_tokens(*image_size(frames[0], image_roots=image_roots))
        except BadImage:  # a bad row, wherever it stands
            continue
    problem = row.get("problem")
    return tokens + len(problem) // 4 if isinstance(problem, str) else tokens


class _Batches:
    """Row numbers of every global batch: random access, and a function of its arguments alone.

    Within windows of `window` batches of the shuffled order, rows are sorted by size, so that those of a batch need
    about the same padding; the window's batches are then shuffled, so that sizes do not rise through it.
    """

    def __init__(self, order: Any, *, batch_size: int, window: int, seed: int, size_of: Callable[[int], int]):
        self._order, self._batch_size, self._window, self._seed = order, batch_size, window, seed
        self._size_of = size_of
        self._kept: dict[int, np.ndarray] = {}  # the last windows; several threads may fill it with the same

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, index: int) -> np.ndarray:
        number, place = divmod(int(index), self._window)
        rows = self._kept.get(number)
        if rows is None:
            rows = self._rows(number)
            self._kept = {**{k: v for k, v in self._kept.items() if abs(k - number) <= 1}, number: rows}
        return rows[place]

    def _rows(self, number: int) -> np.ndarray:
        size = self._batch_size * self._window
        rows = np.array([int(self._order[i]) for i in range(number * size, (number + 1) * size)])
        if self._window > 1:
            rows = rows[np.argsort([self._size_of(i) for i in rows], kind="stable")]
        rows = rows.reshape(self._window, self._batch_size)
        return rows[np.random.default_rng([self._seed, number]).permutation(self._window)]


@dataclasses.dataclass(frozen=True)
class _SizeOf:
    """Row number -> size; picklable."""

    source: Any
    processor: Processor
    image_roots: tuple[str, ...]

    def __call__(self, index: int) -> int:
        return row_size(self.source[index], processor=self.processor, image_roots=self.image_roots)


@dataclasses.dataclass(frozen=True, eq=False)
class _EncodeBatch:
    """Row numbers of a global batch -> Examples of this process's part. Runs in grain's workers."""

    source: Any
    rows: tuple[int, ...]  # this process's part of the global batch
    options: Mapping[str, Any]  # keyword arguments of encode_row

    def __call__(self, indices: np.ndarray) -> list[Example]:
        return [encode_row(self.source[int(i)], int(i), **self.options) for i in indices[list(self.rows)]]


def make_batches(
    source,
    *,
    processor: Processor,
    batch_size: int,
    seed: int,
    shuffle: bool,
    max_images: int,
    workers: int,
    window: int = 1,
    fields: Sequence[str] = (),
    too_long: Callable[[Example], str | None] | None = None,
    rows: Sequence[int] | None = None,
    start_batch: int = 0,
) -> Iterator[list[Example]]:
    """An endless iterator over this process's part of every global batch, from number `start_batch` on.

    The rows are shuffled anew in every epoch, and a batch may reach over an epoch's end: no row is dropped.
    Global batch i depends on (source, batch_size, seed, shuffle, window) alone, whatever part of it a process reads.

    Args:
      source: `load_source`, or any object with `__len__` and `__getitem__` that gives such rows.
      batch_size: rows of a global batch.
      rows: numbers, within a global batch, of the rows this process reads, in this order; None for all.
      seed: 0 .. 2**32 - 1.
      workers: processes that read and encode, 0 for threads of this one; the batches are the same.
        With workers, source and too_long must be picklable and the main module importable; the iterator's
        `close()` ends them.
      window: batches whose rows are grouped by size among themselves; 1 leaves the order as it is.
      fields, too_long: see `encode_row`; runs in the workers.

    Raises:
      InputError: a value is out of its range, or the source is empty.
    """
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} must be from 0 to 2**32 - 1")
    least_of = {"data.workers": (workers, 0), "data.max_images": (max_images, 1), "data.window": (window, 1)}
    for name, (value, least) in least_of.items():
        if value < least:
            raise InputError(f"{name} {value} must be at least {least}")
    if len(source) == 0:
        raise InputError("the data source has no rows")

    order = grain.MapDataset.range(len(source)).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()
    roots = tuple(getattr(source, "image_roots", ()))
    size_of = _SizeOf(source, processor, roots)
    numbers = _Batches(order, batch_size=batch_size, window=window, seed=seed, size_of=size_of)
    encode = _EncodeBatch(
        source=source,
        rows=tuple(range(batch_size) if rows is None else rows),
        options={
            "processor": processor,
            "max_images": max_images,
            "image_roots": roots,
            "fields": tuple(fields),
            "too_long": too_long,
        },
    )
    batches = grain.MapDataset.source(numbers)[start_batch:].map(encode)
    # grain's own defaults hold 500 batches; encoded pictures are tens of megabytes each.
    ahead = 1 if workers else 2
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, and outside absl.app nobody parses them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options, worker_init_fn=deaf_worker)
    return iter(batches)


def data_state(
    source, *, batch_size: int, seed: int, shuffle: bool, next_batch: int, window: int = 1
) -> dict[str, Any]:
    """What a checkpoint keeps of the data, JSON; any number of processes and workers can go on from it."""
    state = {"next_batch": next_batch, "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
    return state | {"window": window, "source": fingerprint(source)}


def resume_batch(saved: Mapping[str, Any], current: Mapping[str, Any]) -> int:
    """The batch to go on with, given `data_state` then and now; InputError if they differ."""
    differing = [key for key in current if key != "next_batch" and saved.get(key) != current[key]]
    if differing:
        words = ", ".join(f"{key} was {saved.get(key)!r} and is {current[key]!r}" for key in differing)
        raise InputError(f"cannot go on with other data: {words}; choices: the old values, a new workdir")
    return int(saved["next_batch"])


class BadRows:
    """Counts unusable rows of all processes by reason, and says when there are too many."""

    def __init__(self):
        self.rows = 0
        self.reasons: collections.Counter[str] = collections.Counter()

    @property
    def bad(self) -> int:
        return self.reasons.total()

    def update(self, rows: int, reasons: Mapping[str, int]) -> None:
        """Adds `rows` more, and how many of them are bad for which reason."""
        self.rows += rows
        self.reasons.update(reasons)

    def summary(self) -> str:
        """One line: "3 of 64 rows bad: image_unreadable 2, empty_answer 1"."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.reasons.most_common())
        return f"{self.bad} of {self.rows} rows bad" + (f": {kinds}" if kinds else "")

    def check(self, max_fraction: float) -> None:
        """Raises InputError, with the counts, if the data is too broken to go on.

        A few bad rows at the start prove little: they may be `max_fraction` of the rows seen or of MIN_ROWS,
        whichever is more. But if none of the first MIN_ROWS_ALL_BAD rows or more is usable, that is enough.
        """
        if self.bad == self.rows >= MIN_ROWS_ALL_BAD:
            raise InputError(f"no usable row: {self.summary()}")
        if self.bad > max_fraction * max(self.rows, MIN_ROWS):
            raise InputError(f"{self.summary()}; data.max_bad_fraction allows {max_fraction:g}")
