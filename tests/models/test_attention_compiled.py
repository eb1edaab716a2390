"""Attention as the compilers of GPUs and TPUs build it: a tower, packed teachers and a gradient, without any [T, T]."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from vigos_jax.models import masked_attention
from vigos_jax.models.attention import attention
from vigos_jax.models.attention_masks import Branches, Causal, Images, Windows
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.plan.devices import topology

ROWS, SLOTS, STUDENT, TEACHER = 8, 1024, 1024, 1152
# One boolean for a pair of a device's two rows would be this many, logits so many for each head. All else is smaller.
PAIRS = 2 * SLOTS * SLOTS

CONFIG = dataclasses.replace(
    tiny.CONFIG, hidden_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128, intermediate_size=384,
    mrope_section=(16, 24, 24),
    vision=dataclasses.replace(
        tiny.CONFIG.vision, depth=2, full_attention_blocks=(1,), hidden_size=160, num_heads=2, intermediate_size=320,
        out_hidden_size=256,
    ),
)  # fmt: skip


def compiled(devices, implementation, *, transform=jax.grad, **options):
    """The text of one program: images, the teachers' states, and the gradient of the student's adapter."""
    mesh = Mesh(np.array(devices[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
    model = VisionLanguageModel(
        CONFIG, lora=tiny.MODEL.lora, dtype=jnp.bfloat16, remat="full", attention=implementation, mesh=mesh
    )
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=rows)  # noqa: E731
    text = lambda t, branches: TextInputs(array(t), array(3, t), array(t), array(t), branches)  # noqa: E731
    patches = array(SLOTS, CONFIG.vision.patch_dim, dtype=jnp.float32)
    vision = VisionInputs(patches, array(SLOTS), array(SLOTS, 2), array(SLOTS, 2), array(SLOTS // 4))
    abstract = abstract_variables(model)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)  # noqa: E731
    params, lora = jax.tree.map(place, abstract["params"]), jax.tree.map(place, abstract["lora"])

    def loss(lora, params, vision, student, teacher):
        images = model.apply({"params": params}, vision, method="encode_images")
        wanted, _ = model.apply({"params": params}, teacher, images)
        states, _ = model.apply({"params": params, "lora": lora}, student, images)
        return jnp.sum((states * wanted[:, :STUDENT]).astype(jnp.float32))

    args = (lora, params, vision, text(STUDENT, 0), text(TEACHER, 2))
    with jax.default_matmul_precision("default"):  # not that of a float32 run in the same process
        return jax.jit(transform(loss)).trace(*args).lower().compile(options).as_text()


def largest(text):
    """Elements of the largest array of floats or booleans in a compiled program, in memory or inside a fusion."""
    shapes = re.findall(r"\b(?:f32|f16|bf16|pred)\[([\d,]+)\]", text)
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


def devices_of(name):
    config = base.get_config()
    config.plan.topology = name
    return topology(config.plan).devices


HAS_GPU_COMPILER = all(importlib.util.find_spec(m) for m in ("jax_plugins", "jax_cuda13_plugin")) and all(
    importlib.util.find_spec(m) for m in ("nvidia", "nvidia.cudnn")
)


@pytest.mark.skipif(not HAS_GPU_COMPILER, reason="XLA's GPU compiler or cuDNN is not installed")
def test_on_eight_h100():
    text = compiled(devices_of("h100:8"), "cudnn")
    calls = re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax(\w*)"', text)
    # Both kinds of block, two branches of the teachers, the student twice, as it is rematerialised.
    assert calls.count("") >= 2 + 2 + 2 and calls.count("Backward") == 1
    assert largest(text) < PAIRS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
def test_on_eight_v5e():
    text = compiled(devices_of("v5e:2x4"), "splash", exec_time_optimization_effort=-1.0)
    assert text.count('custom_call_target="tpu_custom_call"') >= 2 + 2 + 2 + 2  # a backward pass is two kernels
    assert largest(text) < PAIRS


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
def test_heads_of_256_on_a_v5e():
    """Qwen3.5's: all three kernels fit into on-chip memory."""
    one = jax.sharding.SingleDeviceSharding(devices_of("v5e:2x4")[0])
    q, kv = (jax.ShapeDtypeStruct((1, 2048, n, 256), jnp.bfloat16, sharding=one) for n in (2, 1))
    mask = Causal(jax.ShapeDtypeStruct((1,), jnp.int32, sharding=one))
    loss = lambda q, k, v, mask: jnp.sum(attention(q, k, v, mask, implementation="splash"))  # noqa: E731
    with jax.default_matmul_precision("default"):  # as in `compiled`
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, mask).lower().compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and a backward pass of two
    assert largest(text) < 2048 * 2048


def test_logits_would_be_found():
    assert largest(compiled(jax.devices(), "xla", transform=lambda f: f)) >= PAIRS


@pytest.mark.parametrize(
    "mask, head_dim",
    [
        (Causal(np.zeros(4, np.int32)), 128),
        (Branches(np.zeros((4, 2048), np.int32), most=3), 128),
        (Images(np.zeros((4, 2048), np.int32), most=2048), 80),
        (Windows(np.zeros((4, 2048), np.int32), most=2048, window=64), 80),
    ],
)
def test_what_xla_holds(mask, head_dim, monkeypatch):
    """A gradient's temporaries on a CPU: a part of what is said, and what has the size of q, k and v."""
    q = jax.ShapeDtypeStruct((4, 2048, 4, head_dim), jnp.float32)

    def held(said):
        monkeypatch.setattr(masked_attention, "PART_BYTES", said)
        loss = lambda q, k, v, mask: jnp.sum(attention(q, k, v, mask) ** 2)  # noqa: E731
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q, mask).lower().compile()
        return program.memory_analysis().temp_size_in_bytes

    said, arrays = 64 * 2**20, 12 * math.prod(q.shape) * 4
    assert held(said) < said + arrays
    if not isinstance(mask, Windows):
        assert held(2**40) > said + arrays
