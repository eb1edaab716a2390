"""Any number of rows answered by an engine: the one copy of pad, pack, sample and collect outside of training."""

from collections.abc import Sequence

import jax

from vigos_jax.method.rows import Row
from vigos_jax.rollouts.engine import Engine
from vigos_jax.rollouts.sampler import Completions
from vigos_jax.runtime.distributed import exchange
from vigos_jax.session import Session


def sample_rows(engine: Engine, session: Session, rows: Sequence[Row], keys: jax.Array) -> Completions:
    """Completions of `rows` in every process, sampled as one batch.

    Args:
      rows: of the global batch, at most as many as there are keys; the rest of the batch is empty. A process needs
        those that `Session.own_rows` gives it, and may have anything in the other places.
      keys: one per row of the batch, as many as the mesh can split (`Session.whole_batch`).
    """
    size = len(keys)
    padded = [*rows, *[Row()] * (size - len(rows))]
    own = session.own_rows(size)
    sampled = engine.sample(engine.prepare([padded[i] for i in own]), keys).completions
    failed = map(sampled.failure, range(len(own)))
    parts = exchange(list(zip(own, sampled.ids, sampled.logps, failed, strict=True)))
    # Several processes may hold a row.
    by_row = {i: (tuple(ids), tuple(logps), why) for part in parts for i, ids, logps, why in part}
    return Completions(*zip(*(by_row[i] for i in range(len(rows))), strict=True)) if rows else Completions((), ())
