"""A digest knows every bit of an array and its place, and nothing of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vigos_jax.runtime.digest import digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32"])
def test_every_bit_and_place(dtype):
    x = np.array(jax.random.normal(jax.random.key(0), (4, 6, 5)) * 100, jnp.dtype(dtype))
    seen = [digests({"x": jnp.array(x)})["x"]]
    bits = x.view(f"u{x.dtype.itemsize}")
    for place in ((0, 0, 0), (3, 5, 4)):
        for bit in range(8 * x.dtype.itemsize):
            changed = bits.copy()
            changed[place] ^= 1 << bit
            seen.append(digests({"x": jnp.array(changed.view(x.dtype))})["x"])
    for moved in (x[::-1], x[:, ::-1], x[:, :, ::-1], x.swapaxes(1, 2), x[[1, 0, 2, 3]]):
        seen.append(digests({"x": jnp.array(moved)})["x"])
    assert len(set(seen)) == len(seen) and all(len(d) == 16 for d in seen)


def test_the_mesh_does_not_matter():
    x = jax.random.normal(jax.random.key(0), (8, 4, 2))
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    want = digests({"x": x, "n": jnp.int32(7)})
    assert sorted(want) == ["n", "x"] and want["n"] != digests({"n": jnp.int32(6)})["n"]
    for spec in (P(), P("a"), P("b", "a"), P(("a", "b")), P(None, None, "b")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert digests({"x": placed, "n": jax.device_put(jnp.int32(7), NamedSharding(mesh, P()))}) == want


def test_an_empty_tree():
    assert digests({}) == {}
