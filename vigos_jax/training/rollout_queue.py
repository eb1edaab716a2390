"""A run's batches on their way through its engine: rollouts of the next ones may be under way while a step trains."""

import collections
from typing import Any

from vigos_jax.models.variables import Variables
from vigos_jax.rollouts.engine import Engine, Sampled
from vigos_jax.rollouts.sampler import row_keys
from vigos_jax.training.batches import Batch, Batches


class RolloutQueue:
    """Requests rollouts from an engine, at most `config.rollout.max_staleness` steps ahead, in data order.

    The engine's weights are updated at the first step and at every multiple of `sync_every`. The staleness
    from infrequent updates and from requesting ahead is at most `max_staleness` in total. Rollouts that were requested
    but not taken when a run ends are requested again when it resumes.

    Args:
      first: the step that the first batch is for.

    Attributes:
      upcoming: the next batch, not yet requested; None before it is read, and after the last one.
    """

    def __init__(self, config, engine: Engine, batches: Batches, *, first: int):
        self._config, self._engine, self._batches, self._next = config, engine, batches, first
        r = config.rollout
        self._every, self._ahead = r.sync_every, r.max_staleness - (r.sync_every - 1)
        self._asked: collections.deque[tuple[Batch, Any]] = collections.deque()
        self._is_synced = False
        self.upcoming: Batch | None = None
        self.read()

    def read(self) -> None:
        """Reads the next batch, if the run has one: while the devices are at work."""
        if self.upcoming is None and self._next < self._config.steps:
            self.upcoming = self._batches.next()

    def take(self, trained: Variables, *, step: int) -> tuple[Batch, Sampled]:
        """The batch of a step and its rollouts.

        Args:
          trained: after `step` steps.

        Raises:
          EngineFailed, Stopped: nothing has happened, and nothing more can be taken.
        """
        if step % self._every == 0 or not self._is_synced:
            self._engine.sync(trained, step=step)
            self._is_synced = True
        while self.upcoming is not None and self._next <= step + self._ahead:
            keys = row_keys(self._config.seed, self._next, self._config.batch_size)
            self._asked.append((self.upcoming, self._engine.start(self.upcoming.prompts, keys)))
            self._next, self.upcoming = self._next + 1, None
            if self._next <= step + self._ahead:
                self.read()
        batch, ticket = self._asked.popleft()
        return batch, self._engine.finish(ticket)
