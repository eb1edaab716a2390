"""The host side of a training step: reads, encodes and packs this process's rows and puts them on the mesh.

Each process handles the rows that its own devices hold. Shapes are the same in all processes: each size is the one
that the longest row of any process needs (`Buckets.agree`).
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vigos_jax.data.examples import Example
from vigos_jax.data.loader import make_batches, order_of
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.packing import length_groups
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.rollouts.parse import Reader
from vigos_jax.runtime.distributed import exchange, total
from vigos_jax.runtime.sharding import batch_sharding, counts_rows
from vigos_jax.session import Session


@dataclasses.dataclass(frozen=True)
class Batch:
    """The input of a step.

    Attributes:
      examples, rows: those of this process, in the order of `Session.own_rows`.
      prompts: what the engine samples from, as `Engine.prepare` returns it.
      bad_rows: number of unusable rows in all processes, by reason.
      bad_examples: a description of the first bad row for each reason, for display.
      seconds: time to read and pack the batch in this process.
    """

    examples: list[Example]
    rows: list[Row]
    prompts: Any
    bad_rows: dict[str, int]
    bad_examples: dict[str, str]
    seconds: float


class Batches:
    """A run's batches from index `first` on, prefetched, and their micro-batches. All processes must call every method.

    A context manager: leaving it stops the data workers.

    Args:
      prepare: the engine's `prepare`.
    """

    def __init__(self, config, session: Session, source: Any, *, prepare: Callable[[Sequence[Row]], Any], first: int):
        self._session, self._prepare, self._count = session, prepare, config.gradient_accumulation_steps
        self._reader = Reader.of(session, config)
        self._own = session.own_rows(config.batch_size)
        self._counts = counts_rows(session.mesh)
        self._take = jax.jit(lambda x, rows: x[rows], out_shardings=batch_sharding(session.mesh))
        self._examples = make_batches(
            source,
            self._reader.encoder(max_completion=config.sampling.max_tokens),
            order_of(config),
            workers=config.data.workers,
            rows=self._own,
            start_batch=first,
        )

    def next(self) -> Batch:
        """Reads and packs the next batch; the devices need not be idle for it."""
        start = time.monotonic()
        examples = next(self._examples)
        bad_rows = self.total(Counter(e.bad_reason for e in examples if e.bad_reason is not None))
        bad_examples = self._bad_examples(examples) if bad_rows else {}
        rows = [self._reader.row(e) for e in examples]
        return Batch(examples, rows, self._prepare(rows), bad_rows, bad_examples, time.monotonic() - start)

    @staticmethod
    def _bad_examples(examples: Sequence[Example]) -> dict[str, str]:
        own = {e.bad_reason: e.complaint for e in reversed(examples) if e.bad_reason is not None}
        return {kind: text for found in reversed(exchange(own)) for kind, text in found.items()}

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums what the processes counted over their rows; rows that several hold count once."""
        return {name: int(n) for name, n in total(counts if self._counts else {}).items()}

    def micro_batches(
        self, rows: Sequence[Row], rollouts: Sequence[Rollout | None], images: jax.Array | None
    ) -> list[ScoreBatch]:
        """A step's rows in micro-batches, on the mesh; each process forms its parts by length.

        Args:
          rows, rollouts: this process's.
          images: [B, M, D], all rows' visual tokens if they serve everyone; else each micro-batch brings its images.
        """
        out = []
        for group in length_groups(rows, rollouts, self._count):
            parts = [rows[i] for i in group], [rollouts[i] for i in group]
            batch = self._session.put_batch(self._session.pack_scores(*parts, with_images=images is None))
            if images is not None:
                numbers = np.array([self._own[i] for i in group], np.int32)  # within the global batch
                taken = images if self._count == 1 else self._take(images, self._session.put_batch(numbers))
                batch = batch.replace(image_embeds=taken)
            out.append(batch)
        return out

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self._examples, "close"):
            self._examples.close()
