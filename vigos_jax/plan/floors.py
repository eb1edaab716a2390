"""What decoding must move at least, from shapes alone: the measure of what the compiled program moves."""

from typing import Any

import jax

from vigos_jax.plan.abstract_run import AbstractRun, device_bytes


def cache_bytes(run: AbstractRun, *, slots: int) -> tuple[int, int]:
    """Bytes on one device of keys and values in `slots` slots a row, and of what gated delta rule layers keep.

    Those keep a float32 state for each value head, and the convolution's last inputs in the dtype of computation.
    """
    c, d, mesh = run.model.config, run.model.config.delta, run.mesh.shape
    split = lambda heads: heads // mesh["tensor"] if heads % mesh["tensor"] == 0 else heads  # noqa: E731
    rows = run.config.batch_size // (mesh["data"] * mesh["fsdp"])
    keys = 2 * c.attention_layers * rows * slots * split(c.num_kv_heads) * c.head_dim * run.model.dtype.itemsize
    if d is None:
        return keys, 0
    state = 4 * split(d.value_heads) * d.key_dim * d.value_dim
    inputs = (d.conv_width - 1) * split(d.channels) * run.model.dtype.itemsize
    return keys, (c.num_layers - c.attention_layers) * rows * (state + inputs)


def decode_floor(run: AbstractRun, *, slots: int) -> int:
    """Bytes that one device moves for a decoded token: decoder, its head, adapters, and the whole cache, once each.

    A tied head is the embedding; an embedding that is not the head is read in single rows and left out, as is the
    tower. Adapters count in the dtype of computation, in which a rollout can hold them. What gated delta rule layers
    keep is read and written.
    """
    unread = {"visual"} if run.model.config.tie_embeddings else {"visual", "embedding"}
    weights = {name: part for name, part in run.student["params"].items() if name not in unread}
    adapters = {name: part for name, part in run.student.get("lora", {}).items() if name != "visual"}
    keys, states = cache_bytes(run, slots=slots)
    return device_bytes(weights) + device_bytes(_cast(adapters, run.model.dtype)) + keys + 2 * states


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)
