"""Layers with a state on eight forced host devices: the numbers of one device, and heads that a mesh cannot split."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
import tiny_hybrid
from jax.sharding import AbstractMesh
from tiny import MIXES, RULES

from vigos_jax.errors import InputError
from vigos_jax.method.packing import pack_scores
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.runtime.sharding import AXES, batch_sharding, make_mesh, path_string, tree_shardings

SHAPES = ((1, 8, 1), (1, 1, 8), (2, 2, 2))
# One group: rounding grows with depth, and gradients are compared to 1e-5.
MODEL = VisionLanguageModel(dataclasses.replace(tiny_hybrid.CONFIG, num_layers=2), lora=tiny_hybrid.LORA)


@functools.cache
def weights():
    v = tiny_hybrid.random_variables(MODEL.config)
    return v["params"], v["lora"]


@functools.cache
def batch():
    rows, rollouts = zip(*MIXES["mixed"], strict=True)
    options = {"config": MODEL.config, "buckets": tiny_hybrid.BUCKETS}
    return pack_scores(rows, rollouts, roles=tiny.ROLES, **options)


@functools.cache
def on_one_device():
    base, lora = weights()
    return jax.device_get(tiny.gradient_step(model=MODEL)(base, {"lora": lora}, batch()))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(shape):
    """Loss, metrics and the adapter's gradient; hidden states and heads are placed as in a run."""
    mesh = make_mesh(**dict(zip(AXES, shape, strict=True)))
    base, lora = weights()
    put = lambda tree: jax.device_put(tree, tree_shardings(tree, mesh, RULES))  # noqa: E731
    placed = put({"params": base})["params"], put({"lora": lora}), jax.device_put(batch(), batch_sharding(mesh))
    gradient, metrics = jax.device_get(tiny.gradient_step(model=MODEL.clone(mesh=mesh))(*placed))
    want_gradient, want_metrics = on_one_device()
    assert want_metrics["loss"] > 0.1 and want_metrics["grad_norm"] > 0.1
    for name in want_metrics:
        assert metrics[name] == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-5), name
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), jax.tree.leaves(gradient), strict=True
    ):
        size = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got / size, want / size, atol=1e-5, err_msg=path_string(path))


def test_every_matrix_and_head_is_split():
    mesh = AbstractMesh((1, 4, 2), AXES)
    tree = abstract_variables(MODEL)
    shardings = tree_shardings(tree, mesh, RULES)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings), strict=True
    ):
        name = path_string(path)
        parts = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
        if name.endswith(("A_log", "dt_bias", "conv")):
            assert parts == 2, name
        elif "layers" in name and name.endswith("kernel"):
            assert parts == 8, name
        elif "/lora/" in f"/{name}" and name.endswith("/b"):
            assert parts in (2, 4), name


def test_heads_that_the_mesh_does_not_divide():
    delta = dataclasses.replace(tiny_hybrid.CONFIG.delta, value_heads=4)
    config = dataclasses.replace(tiny_hybrid.CONFIG, delta=delta)
    tree = abstract_variables(VisionLanguageModel(config, lora=tiny_hybrid.LORA))
    with pytest.raises(InputError) as e:
        tree_shardings(tree, AbstractMesh((1, 1, 8), AXES), RULES)
    text = str(e.value)
    assert "\n" not in text and "mixer/A_log [2, 4]: 4 is not a multiple of tensor=8" in text
    assert text.endswith("nearest that do: data=2 fsdp=1 tensor=4, data=1 fsdp=2 tensor=4, data=4 fsdp=1 tensor=2")
