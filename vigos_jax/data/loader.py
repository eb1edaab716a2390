"""The order in which a run reads its source, and the iterators over its batches of Examples: threads or processes."""

import collections
import contextlib
import dataclasses
import multiprocessing.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import grain
import numpy as np

from vigos_jax.data.examples import Encoder, Example, row_size
from vigos_jax.data.processor import PixelLimits, Processor
from vigos_jax.data.sources import fingerprint
from vigos_jax.errors import InputError
from vigos_jax.runtime.signals import ignore_signals, signals_blocked


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a run's rows: global batch i depends only on the source and these fields, not on the process.

    Attributes:
      batch_size: rows of a global batch.
      seed: 0 .. 2**32 - 1.
      shuffle: reshuffles every epoch; batches may span epochs, and no row is dropped.
      window: consecutive batches within which rows are grouped by size; 1 keeps the order.
    """

    batch_size: int
    seed: int
    shuffle: bool = True
    window: int = 1

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed} must be from 0 to 2**32 - 1")
        if self.window < 1:
            raise InputError(f"data.window {self.window} must be at least 1")


def order_of(config) -> Order:
    """The order of a run's rows."""
    return Order(config.batch_size, config.seed, config.data.shuffle, config.data.window)


class _Batches(Sequence):
    """Row numbers of every global batch: random access, and a function of its arguments alone.

    Within windows of `window` batches of the shuffled order, rows are sorted by size, so that those of a batch need
    about the same padding; the window's batches are then shuffled, so that sizes do not rise through it.
    """

    def __init__(self, numbers: Any, order: Order, *, size_of: Callable[[int], int]):
        self._numbers, self._order, self._size_of = numbers, order, size_of
        self._kept: dict[int, np.ndarray] = {}  # the last windows; several threads may fill it with the same

    def __len__(self) -> int:
        return len(self._numbers) // self._order.batch_size

    def __getitem__(self, index: Any) -> Any:
        number, place = divmod(int(index), self._order.window)
        rows = self._kept.get(number)
        if rows is None:
            rows = self._rows(number)
            self._kept = {**{k: v for k, v in self._kept.items() if abs(k - number) <= 1}, number: rows}
        return rows[place]

    def _rows(self, number: int) -> np.ndarray:
        o = self._order
        size = o.batch_size * o.window
        rows = np.array([int(self._numbers[i]) for i in range(number * size, (number + 1) * size)])
        if o.window > 1:
            rows = rows[np.argsort([self._size_of(i) for i in rows], kind="stable")]
        rows = rows.reshape(o.window, o.batch_size)
        return rows[np.random.default_rng([o.seed, number]).permutation(o.window)]


@dataclasses.dataclass(frozen=True)
class _SizeOf:
    """Row number -> size; picklable."""

    source: Any
    processor: Processor
    image_roots: tuple[str, ...]
    pixels: PixelLimits

    def __call__(self, index: int) -> int:
        row = self.source[index]
        return row_size(row, processor=self.processor, image_roots=self.image_roots, pixels=self.pixels)


@dataclasses.dataclass(frozen=True, eq=False)
class _EncodeBatch:
    """Row numbers of a global batch -> Examples of this process's part. Runs in threads or workers."""

    source: Any
    encoder: Encoder
    rows: tuple[int, ...]  # this process's part of the global batch

    def __call__(self, indices: np.ndarray) -> list[Example]:
        return [self.encoder(self.source, int(i)) for i in indices[list(self.rows)]]


class _Workers:
    """Encodes batches of row numbers in worker processes; each has its own pipe and takes every n-th batch.

    Grain's worker processes are not used: they exit only when all their output has been read, which nothing does after
    `close()`, and are killed only after 25 seconds each.
    """

    def __init__(self, batches: Any, encode: Callable[[np.ndarray], list[Example]], *, workers: int):
        self._batches = (batches[i] for i in range(len(batches)))
        self._workers: collections.deque[tuple[BaseProcess, Connection]] = collections.deque()
        # At the interpreter's end too, where daemons get a SIGTERM, which these ignore.
        self.close = multiprocessing.util.Finalize(self, _end, args=(self._workers,), exitpriority=10)
        spawn = multiprocessing.get_context("spawn")  # a fork would copy jax's threads in whatever state they are
        for _ in range(workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_encode_batches, args=(theirs, encode), daemon=True)
            with signals_blocked():
                process.start()
            theirs.close()  # or the end of the process would not be the end of the pipe
            self._workers.append((process, ours))
            ours.send(next(self._batches))

    def __iter__(self) -> Iterator[list[Example]]:
        return self

    def __next__(self) -> list[Example]:
        process, pipe = self._workers[0]
        indices = next(self._batches)
        try:
            examples = pipe.recv()
            pipe.send(indices)
        except (EOFError, OSError) as e:
            process.join(timeout=1)
            raise InputError(
                f"a data worker ended with exit code {process.exitcode}, perhaps for lack of memory: lower "
                "config.data.workers; 0 reads in threads of the main process"
            ) from e
        self._workers.rotate(-1)
        if isinstance(examples, Exception):
            raise examples
        return examples


def _end(workers: collections.deque[tuple[BaseProcess, Connection]]) -> None:
    for process, pipe in workers:
        process.kill()  # there is nothing that it could lose
        process.join()
        pipe.close()
    workers.clear()


def _encode_batches(pipe: Connection, encode: Callable[[np.ndarray], list[Example]]) -> None:
    ignore_signals()
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        while True:
            indices = pipe.recv()
            try:
                examples = encode(indices)
            except Exception as e:
                examples = e
            pipe.send(examples)


def row_numbers(source: Any, encoder: Encoder, order: Order) -> Sequence[np.ndarray]:
    """The row numbers [batch_size] of every global batch, with random access; there is no last one."""
    numbers = grain.MapDataset.range(len(source)).seed(order.seed)
    numbers = (numbers.shuffle() if order.shuffle else numbers).repeat()
    size_of = _SizeOf(source, encoder.processor, tuple(getattr(source, "image_roots", ())), encoder.pixels)
    return _Batches(numbers, order, size_of=size_of)


def make_batches(
    source: Any,
    encoder: Encoder,
    order: Order,
    *,
    workers: int = 0,
    rows: Sequence[int] | None = None,
    start_batch: int = 0,
) -> Iterator[list[Example]]:
    """An endless iterator over this process's part of every global batch, from number `start_batch` on.

    Args:
      source: `load_source`, or any object with `__len__` and `__getitem__` that gives such rows.
      workers: processes that read and encode, 0 for threads of this one; the batches are the same.
        With workers, source and encoder must be picklable and the main module importable; the iterator's
        `close()` ends them.
      rows: numbers, within a global batch, of the rows this process reads, in this order; None for all.

    Raises:
      InputError: a value is out of its range, or the source is empty.
    """
    for name, (value, least) in {"data.workers": (workers, 0), "data.max_images": (encoder.max_images, 1)}.items():
        if value < least:
            raise InputError(f"{name} {value} must be at least {least}")
    if len(source) == 0:
        raise InputError("config.data.source has 0 rows; it needs at least 1")

    own = tuple(range(order.batch_size) if rows is None else rows)
    batches = grain.MapDataset.source(row_numbers(source, encoder, order))[start_batch:]
    encode = _EncodeBatch(source, encoder, own)
    if workers:
        return _Workers(batches, encode, workers=workers)
    # grain's own defaults hold 500 batches; encoded images are tens of megabytes each.
    return iter(batches.map(encode).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))


def data_state(source: Any, order: Order, *, next_batch: int) -> dict[str, Any]:
    """What a checkpoint keeps of the data, JSON; any number of processes and workers can resume from it."""
    return {"next_batch": next_batch, **dataclasses.asdict(order), "source": fingerprint(source)}


def resume_batch(saved: Mapping[str, Any], current: Mapping[str, Any]) -> int:
    """The batch to resume with, given `data_state` then and now; InputError if they differ."""
    differing = [key for key in current if key != "next_batch" and saved.get(key) != current[key]]
    if differing:
        words = ", ".join(f"{key} was {saved.get(key)!r} and is {current[key]!r}" for key in differing)
        raise InputError(f"cannot resume with other data: {words}; choices: the old values, a new workdir")
    return int(saved["next_batch"])
