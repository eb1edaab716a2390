"""Lower bound on decoding's memory traffic, from shapes alone, to compare the compiled program with."""

from typing import Any

import jax

from vigos_jax.plan.abstract_run import AbstractRun, device_bytes


def cache_bytes(run: AbstractRun, *, slots: int) -> tuple[int, int]:
    """Bytes on one device of a KV cache with `slots` slots per row, and of the gated delta rule layers' states.

    A state is float32 for each value head, plus the convolution's last inputs in the compute dtype.
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
    """Least bytes that one device moves per decoded token: decoder, head, adapters and the whole cache, once each.

    A tied embedding counts as the head; an untied one is left out, as only single rows are read, and so is the vision
    tower. Adapters count in the compute dtype, in which a rollout can hold them. Gated delta rule states are read and
    written.
    """
    unread = {"visual"} if run.model.config.tie_embeddings else {"visual", "embedding"}
    weights = {name: part for name, part in run.student["params"].items() if name not in unread}
    adapters = {name: part for name, part in run.student.get("lora", {}).items() if name != "visual"}
    keys, states = cache_bytes(run, slots=slots)
    return device_bytes(weights) + device_bytes(_cast(adapters, run.model.dtype)) + keys + 2 * states


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)
