"""What decoding must move at least, from shapes alone: the measure of what the compiled program moves."""

from typing import Any

import jax

from vigos_jax.plan.abstract_run import AbstractRun, device_bytes


def decode_floor(run: AbstractRun, *, cache_bytes: int) -> int:
    """Bytes that one device reads for a decoded token: the decoder, its head, adapters, and the whole cache, once each.

    A tied head is the embedding; an embedding that is not the head is read in single rows and left out, as is the
    tower. Adapters count in the dtype of computation, in which a rollout can hold them.
    """
    unread = {"visual"} if run.model.config.tie_embeddings else {"visual", "embedding"}
    weights = {name: part for name, part in run.student["params"].items() if name not in unread}
    adapters = {name: part for name, part in run.student.get("lora", {}).items() if name != "visual"}
    return device_bytes(weights) + device_bytes(_cast(adapters, run.model.dtype)) + cache_bytes


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)
