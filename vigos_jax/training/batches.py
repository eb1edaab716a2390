"""The host's work of a training step: this process's rows read, written out, packed and put on the mesh.

Every process does it for the rows that its own devices hold. What the devices then run has one shape for all: each
size is the one that the longest row of any process needs (`Buckets.agree`).
"""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vigos_jax.data.loader import Example, make_batches
from vigos_jax.method.packing import Rollout, Row, length_groups, pack_scores
from vigos_jax.models.inputs import ScoreBatch
from vigos_jax.rollouts.parse import Reader
from vigos_jax.runtime.distributed import total
from vigos_jax.runtime.sharding import batch_sharding, counts_rows
from vigos_jax.session import Loaded


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step starts from.

    Attributes:
      examples, rows: this process's, in the order of `Loaded.own_rows`.
      prompts: what the engine samples from, from `Engine.prepare`.
      bad_rows: of all processes, how many are unusable, by reason.
      seconds: what reading and packing took here.
    """

    examples: list[Example]
    rows: list[Row]
    prompts: Any
    bad_rows: dict[str, int]
    seconds: float


class Batches:
    """A run's batches from number `first` on, read ahead, and their micro-batches. Every method is all processes'.

    A context manager: leaving it ends the processes that read.

    Args:
      prepare: an engine's.
    """

    def __init__(self, config, loaded: Loaded, source: Any, *, prepare: Callable[[Sequence[Row]], Any], first: int):
        self._loaded, self._prepare, self._accumulation = loaded, prepare, config.accumulation
        self._reader = Reader.of(loaded, config)
        self._own = loaded.own_rows(config.batch_size)
        self._counts = counts_rows(loaded.mesh)
        self._take = jax.jit(lambda x, rows: x[rows], out_shardings=batch_sharding(loaded.mesh))
        self._examples = make_batches(
            source,
            processor=loaded.processor,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            max_images=config.data.max_images,
            fields=tuple(config.data.fields),
            window=config.data.window,
            workers=config.data.workers,
            too_long=functools.partial(self._reader.too_long, max_completion=config.sampling.max_tokens),
            rows=self._own,
            start_batch=first,
        )

    def next(self) -> Batch:
        """Reads and packs the next batch; the devices need not be idle for it."""
        start = time.monotonic()
        examples = next(self._examples)
        bad_rows = self.total(Counter(e.bad_reason for e in examples if e.bad_reason is not None))
        rows = [self._reader.row(e) for e in examples]
        return Batch(examples, rows, self._prepare(rows), bad_rows, time.monotonic() - start)

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums what the processes counted over their rows; rows that several hold count once."""
        return total(counts if self._counts else {})

    def micro_batches(
        self, rows: Sequence[Row], rollouts: Sequence[Rollout | None], images: jax.Array | None
    ) -> list[ScoreBatch]:
        """A step's rows in `config.accumulation` micro-batches, on the mesh; each process forms its parts by length.

        Args:
          rows, rollouts: this process's.
          images: [B, M, D], all rows' visual tokens if they serve everyone; else each micro-batch brings its pictures.
        """
        out = []
        for group in length_groups(rows, rollouts, self._accumulation):
            batch = pack_scores(
                [rows[i] for i in group],
                [rollouts[i] for i in group],
                roles=self._loaded.roles,
                config=self._loaded.config,
                buckets=self._loaded.buckets,
                with_images=images is None,
            )
            batch = self._loaded.put_batch(batch)
            if images is not None:
                numbers = np.array([self._own[i] for i in group], np.int32)  # within the global batch
                taken = images if self._accumulation == 1 else self._take(images, self._loaded.put_batch(numbers))
                batch = batch.replace(image_embeds=taken)
            out.append(batch)
        return out

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self._examples, "close"):
            self._examples.close()
