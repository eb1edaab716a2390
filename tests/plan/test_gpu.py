"""XLA's GPU compiler without a GPU: our programs compile for absent cards, and are counted as the fixture is."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from vigos_jax.plan.devices import topology
from vigos_jax.plan.planner import compile_plan
from vigos_jax.plan.program_cost import read_traffic
from vigos_jax.plan.table import report

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "h100_two_layers.txt"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="XLA's GPU compiler is not installed: pip install 'vigos-jax[plan-gpu]'",
)

LAYERS, ROWS, WIDTH, HIDDEN, SLOTS = 2, 32, 512, 2048, 256


def config_of(name, **changes):
    config = base.get_config()
    config.update_from_flattened_dict({"plan.topology": name, "plan.advise": False} | changes)
    return config


@functools.cache
def target_of(name):
    return topology(config_of(name).plan)


def layer(carry, weights):
    """One token through a stacked layer: two products, and attention over its cache, which it writes first."""
    x, cache, at, i = carry
    up, down = weights
    x = x + jax.nn.silu((x @ up).astype(jnp.float32)).astype(jnp.bfloat16) @ down
    cache = jax.lax.dynamic_update_slice(cache, x[None, :, None], (i, 0, at, 0))
    keys = jax.lax.dynamic_index_in_dim(cache, i, 0, keepdims=False)
    logits = jnp.einsum("bd,bsd->bs", x, keys, preferred_element_type=jnp.float32)
    x = x + jnp.einsum("bs,bsd->bd", jax.nn.softmax(logits, -1).astype(jnp.bfloat16), keys)
    return (x, cache, at, i + 1), None


def decode(weights, x, cache, at):
    (x, cache, _, _), _ = jax.lax.scan(layer, (x, cache, at, jnp.int32(0)), weights)
    return x, cache


@functools.cache
def compiled_decode():
    """The text of `decode` for an H100."""
    place = NamedSharding(Mesh(np.array(target_of("h100:1").devices), ("x",)), P())
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    weights = (array(LAYERS, WIDTH, HIDDEN), array(LAYERS, HIDDEN, WIDTH))
    args = (weights, array(ROWS, WIDTH), array(LAYERS, ROWS, SLOTS, WIDTH), array(dtype=jnp.int32))
    return jax.jit(decode, donate_argnums=2).trace(*args).lower().compile().as_text()


def trimmed(text):
    """A compiled program without what no count reads: how the fixture was made, with jax 0.10.2."""
    text = re.sub(r"\nFileNames\n.*?\n\n\n", "\n\n", text, flags=re.S)
    text = re.sub(r", entry_computation_layout=.*", "", text)
    text = re.sub(r', backend_config=(\{"known_trip_count":\{"n":"\d+"\})?.*', lambda m: trips(m[1]), text)
    text = re.sub(r', metadata=\{(op_name="[^"]*")?[^}]*\}', lambda m: f", metadata={{{m[1]}}}" if m[1] else "", text)
    return re.sub(r"( parameter\(\d+\)).*", r"\1", text).rstrip() + "\n"


def trips(count):
    return f", backend_config={count}}}" if count else ""


def test_a_decode_step_is_counted_as_in_the_fixture():
    """The fixture is this program of jax 0.10: its numbers, counted by hand, are in test_memory_traffic.py."""
    traffic = read_traffic(compiled_decode(), devices=1)
    if jax.__version__.startswith("0.10."):
        assert traffic == read_traffic(FIXTURE.read_text(), devices=1)
        assert traffic == read_traffic(trimmed(compiled_decode()), devices=1)
    # Whatever a compiler makes of it: weights and cache are read, and no stack is read whole for one layer.
    weights, cache = 2 * 2 * LAYERS * WIDTH * HIDDEN, 2 * LAYERS * ROWS * SLOTS * WIDTH
    assert weights + cache < traffic.memory < 4 * weights + 8 * cache
    assert traffic.largest.bytes <= cache


@pytest.mark.parametrize("name", ["h100:1", "h200:1", "a100:1", "b200:1", "l4:1", "rtx4090:1", "t4:1"])
def test_every_card_has_a_compiler(name):
    place = NamedSharding(Mesh(np.array(target_of(name).devices), ("x",)), P())
    x = jax.ShapeDtypeStruct((256, 256), jnp.float16, sharding=place)
    compiled = jax.jit(lambda x: x @ x).trace(x).lower().compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 2
    assert 2 * 256 * 256 * 2 <= read_traffic(compiled.as_text(), devices=1).memory


@pytest.mark.parametrize("name, hosts, cards", [("h100:8", 1, 8), ("h100:2x8", 2, 16)])
def test_cards_and_hosts(name, hosts, cards):
    devices = target_of(name).devices
    assert len(devices) == cards and [d.process_index for d in devices] == [i // 8 for i in range(cards)]
    assert devices[-1].process_index == hosts - 1
    mesh = Mesh(np.array(devices), ("x",))
    x = jax.ShapeDtypeStruct((cards, 1024), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    text = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=NamedSharding(mesh, P())).trace(x).lower().compile().as_text()
    assert read_traffic(text, devices=cards).moved() == {"all-reduce": 1024 * 4 * 2 * (cards - 1) / cards}


def test_a_run_is_planned_for_a_card_without_bfloat16_units_or_fused_attention():
    config = config_of("t4:1", **{"model.dtype": "bfloat16", "mesh.data": 1})
    plan = compile_plan(config, target_of("t4:1"), only=("encode",))
    assert plan.attention == "xla" and plan.fits
    (program,) = plan.programs
    assert program.kernels > 0 and program.compile_seconds > 0 and program.largest.bytes > 0
    text = report(plan)
    assert "t4:1: no bfloat16 units" in text and "t4:1: no fused attention" in text
