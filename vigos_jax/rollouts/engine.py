"""The engine protocol: an engine samples completions of rows from the student that it was last given.

Training, snapshots, evaluation, diagnosis and `--mode generate` sample only through this protocol. `NativeEngine` is
this package's sampler, on the run's mesh.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from vigos_jax.errors import InputError
from vigos_jax.method.packing import pack_prompts
from vigos_jax.method.rows import Row
from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.sampler import Completions, Sampler
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.sharding import device_memory
from vigos_jax.session import Session

Array = jax.Array
_TOKENS_PER_PIECE = 8  # of a stream


class EngineFailed(InputError):
    """An engine cannot sample. A run saves what it has done; the same command resumes when the reason is gone."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """An engine's result for a batch.

    Attributes:
      completions: of this process's rows.
      step: optimizer steps taken by the weights that sampled them.
      images: [B, M, D], visual tokens of all rows from the student's vision tower, for reuse by teachers that share it;
        None if the engine does not have them.
    """

    completions: Completions
    step: int = 0
    images: Array | None = None


class Engine(Protocol):
    """Samples completions. With several processes, all must call every method, in the same order."""

    def prepare(self, rows: Sequence[Row]) -> Any:
        """Returns what `sample` takes for a batch: all the work that does not need the student.

        Args:
          rows: this process's rows of a global batch, in the order of `Session.own_rows`; a bad row is never sampled.
        """
        ...

    def sync(self, trained: Variables, *, step: int = 0) -> None:
        """Makes the student with these trained weights the one that answers; `{}` is the base.

        Args:
          step: optimizer steps that the weights have taken.

        Raises:
          EngineFailed: in all processes.
        """
        ...

    def start(self, prepared: Any, keys: Array) -> Any:
        """Begins sampling with the student of the last `sync`; arguments as `sample`. Returns a ticket for `finish`."""
        ...

    def finish(self, ticket: Any) -> Sampled:
        """The result of a batch begun by `start`; raises as `sample` does."""
        ...

    def sample(self, prepared: Any, keys: Array) -> Sampled:
        """One completion per row; raises EngineFailed in all processes, or Stopped for a signal.

        Args:
          keys: [B], a random key for each row of the global batch; a row's completion depends only on its key, its
            prompt and the student.
        """
        ...

    def stream(self, prepared: Any, keys: Array) -> Iterator[Completions]:
        """Yields the completions of `sample` as they grow; the last ones are complete."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


EngineFactory = Callable[[Session, Sampling], Engine]


class NativeEngine:
    """The package's own sampler behind the protocol: the same mesh, the same weights, nothing copied."""

    def __init__(self, session: Session, sampling: Sampling):
        self._session = session
        self._sampler = Sampler(
            session.model,
            sampling,
            eos_ids=session.processor.eos_ids,
            cache_sizes=session.buckets.completion,
            memory=device_memory(session.mesh),
        )
        self._student: Variables = {}
        self._step = 0

    def prepare(self, rows: Sequence[Row]) -> Any:
        """The rows' prompts and images, packed, on the mesh."""
        packed = pack_prompts(rows, config=self._session.config, buckets=self._session.buckets)
        return self._session.put_batch(packed)

    def sync(self, trained: Variables, *, step: int = 0) -> None:
        """Casts float32 master weights once; an adapter stays beside the base."""
        self._student = self._sampler.ready(self._session.student(trained))
        self._step = step

    def start(self, prepared: Any, keys: Array) -> tuple[Any, Array]:
        """Nothing yet: the devices are the run's own."""
        return prepared, keys

    def finish(self, ticket: tuple[Any, Array]) -> Sampled:
        """Samples with the present student."""
        return self.sample(*ticket)

    def sample(self, prepared: Any, keys: Array) -> Sampled:
        """Completions, and the visual tokens they were made from."""
        images = self._sampler.encode(self._student, prepared)
        return Sampled(self._sampler(self._student, prepared, keys, images), self._step, images)

    def stream(self, prepared: Any, keys: Array) -> Iterator[Completions]:
        """Completions a few tokens at a time."""
        return self._sampler.stream(self._student, prepared, keys, every=_TOKENS_PER_PIECE)

    def close(self) -> None:
        """Lets go of the weights."""
        self._student: Variables = {}
