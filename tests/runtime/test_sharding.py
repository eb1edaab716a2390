"""The mesh on eight forced host devices: the same numbers on every shape, fewer bytes on each device."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from tiny import CONFIG, MIXES, RULES, gradient_step, pack

from vigos_jax.errors import InputError
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.published_configs import PUBLISHED, published_config
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.runtime.sharding import (
    AXES,
    batch_sharding,
    check_batch,
    counts_rows,
    make_mesh,
    own_rows,
    parse_rules,
    path_string,
    read_rows,
    tree_shardings,
)

SHAPES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
OTHER_SHAPES = ((4, 2, 1), (1, 2, 4), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2))


def mesh_of(shape):
    return make_mesh(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))


def place(mesh, trained, batch):
    base, _ = tiny.weights()
    put = lambda tree: jax.device_put(tree, tree_shardings(tree, mesh, RULES))  # noqa: E731
    return put({"params": base})["params"], put(trained), jax.device_put(batch, batch_sharding(mesh))


@functools.cache
def on_one_device(kind):
    base, lora = tiny.weights()
    trained = {"lora": lora} if kind == "lora" else {"params": base}
    return jax.device_get(gradient_step()(base, trained, pack(MIXES["mixed"])))


def compare(shape, kind="lora", gradient_accumulation_steps=1):
    base, lora = tiny.weights()
    placed = place(mesh_of(shape), {"lora": lora} if kind == "lora" else {"params": base}, pack(MIXES["mixed"]))
    gradient, metrics = jax.device_get(gradient_step(gradient_accumulation_steps)(*placed))
    want_gradient, want_metrics = on_one_device(kind)
    assert want_metrics["loss"] > 0.1 and want_metrics["grad_norm"] > 0.1
    for name in want_metrics:
        assert metrics[name] == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-5), name
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), jax.tree.leaves(gradient), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=path_string(path))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(shape):
    compare(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_the_other_meshes_do_too(shape):
    compare(shape)


@pytest.mark.slow
def test_so_does_full_fine_tuning():
    compare((2, 2, 2), "params")


@pytest.mark.slow
def test_so_does_accumulation_on_a_mesh():
    compare((2, 2, 2), gradient_accumulation_steps=2)


def test_the_comparison_has_every_device_at_work():
    base, trained, batch = place(mesh_of((2, 2, 2)), {"lora": tiny.weights()[1]}, pack(MIXES["mixed"]))
    for x in jax.tree.leaves(batch):
        assert len(x.sharding.device_set) == 8 and x.addressable_shards[0].data.shape[0] == 2
    kernel = base["layers"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 16)
    assert len({str(s.index) for s in kernel.addressable_shards}) == 4


# Memory.


def bytes_per_device(shape, tree):
    placed = jax.device_put(tree, tree_shardings(tree, mesh_of(shape), RULES))
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(placed) for s in x.addressable_shards if s.device == first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["params", "lora"])
def test_bytes_per_device_fall_with_fsdp_and_tensor(kind):
    tree = {kind: tiny.weights()[0 if kind == "params" else 1]}
    whole = sum(x.nbytes for x in jax.tree.leaves(tree))
    assert bytes_per_device((8, 1, 1), tree) == whole
    by_fsdp = [bytes_per_device(s, tree) for s in ((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1))]
    by_tensor = [bytes_per_device(s, tree) for s in ((8, 1, 1), (4, 1, 2), (2, 1, 4), (1, 1, 8))]
    for sizes in (by_fsdp, by_tensor):
        assert all(b < 0.95 * a for a, b in zip(sizes, sizes[1:], strict=False)), sizes
    if kind == "params":
        assert by_fsdp[-1] < 0.2 * whole  # little but norms and biases is left whole
        assert bytes_per_device((1, 4, 2), tree) < min(by_fsdp[2], by_tensor[1])


def test_large_leaves_are_all_split():
    """No matrix of the decoder is held whole by a device of an fsdp and tensor mesh; tied or not."""
    for tied in (True, False):
        config = dataclasses.replace(CONFIG, tie_embeddings=tied)
        tree = abstract_variables(VisionLanguageModel(config, lora=tiny.LORA))
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(tree),
            jax.tree.leaves(tree_shardings(tree, mesh_of((1, 4, 2)), RULES)),
            strict=True,
        ):
            name = path_string(path)
            if "kernel" in name or "embedding" in name or "lm_head" in name:
                parts = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
                assert parts == (4 if "visual" in name else 8), name


# Rules.


@pytest.mark.parametrize(
    "path, spec",
    [
        ("params/embedding", P("tensor", "fsdp")),
        ("params/lm_head", P("fsdp", "tensor")),
        ("params/layers/q_proj/kernel", P(None, "fsdp", "tensor")),
        ("params/layers/q_proj/bias", P(None, "tensor")),
        ("params/layers/o_proj/kernel", P(None, "tensor", "fsdp")),
        ("params/layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),
        ("params/layers/input_norm/scale", P()),
        ("params/norm/scale", P()),
        ("params/visual/blocks/attn/qkv/kernel", P(None, "fsdp", None)),
        ("params/visual/blocks/mlp/down_proj/kernel", P(None, None, "fsdp")),
        ("params/visual/blocks/attn/qkv/bias", P()),
        ("params/visual/merger_in/kernel", P(None, "fsdp")),
        ("lora/layers/mlp/up_proj/a", P(None, "fsdp", None)),
        ("lora/layers/mlp/up_proj/b", P(None, None, "tensor")),
        ("lora/layers/mlp/down_proj/a", P(None, "tensor", None)),
        ("lora/layers/mlp/down_proj/b", P(None, None, "fsdp")),
        ("lora/visual/blocks/mlp/up_proj/a", P()),
        ("1/0/mu/lora/layers/q_proj/a", P(None, "fsdp", None)),  # optimizer state follows its parameter
        ("1/0/count", P()),
    ],
)
def test_rules(path, spec):
    tree = jax.ShapeDtypeStruct((8, 8, 8)[: max(len(spec), 1)], jnp.float32)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    (sharding,) = jax.tree.leaves(tree_shardings(tree, mesh_of((1, 4, 2)), RULES))
    assert sharding.spec == spec


@functools.cache
def published_tree(name):
    """Abstract parameters and adapters, the vision tower's among them where it has such projections."""
    config = ModelConfig.from_hf(published_config(name))
    family = FAMILIES[config.family]
    lora = LoraSpec(64, 2.0, language=frozenset(family.language_adapters), vision=frozenset(family.vision_adapters))
    return abstract_variables(VisionLanguageModel(config, lora=lora))


@pytest.mark.slow
def test_every_rule_is_used():
    trees = [published_tree(name) for name in (PUBLISHED[1], PUBLISHED[-1])]
    names = [path_string(path) for tree in trees for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    first = [next(i for i, (pattern, _) in enumerate(RULES) if re.search(pattern, name)) for name in names]
    assert set(first) == set(range(len(RULES)))


# Eight devices, a pod, and a pod of hosts with eight.
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 64, 1), (1, 32, 4), (8, 8, 8)], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_can_be_placed(name, shape):
    mesh = AbstractMesh(shape, AXES)
    tree = published_tree(name)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    for part in (tree, jax.eval_shape(optimizer.init, {"lora": tree["lora"]})):
        shardings = tree_shardings(part, mesh, RULES)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(part), jax.tree.leaves(shardings), strict=True
        ):
            name, parts = path_string(path), leaf.size // np.prod(sharding.shard_shape(leaf.shape))
            if leaf.size > 2**24 and "visual" in name:
                assert parts == shape[1], name
            elif leaf.size > 2**24 and "lora" not in name:
                assert parts == shape[1] * shape[2], name


def test_optimizer_state_and_scalars():
    trained = {"lora": tiny.weights()[1]}
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, trained)
    shardings = tree_shardings(state, mesh_of((1, 4, 2)), RULES)
    by_path = {path_string(p): s.spec for p, s in jax.tree_util.tree_leaves_with_path(shardings)}
    want = tree_shardings(trained, mesh_of((1, 4, 2)), RULES)
    for path, sharding in jax.tree_util.tree_leaves_with_path(want):
        for moment in ("mu", "nu"):
            (found,) = (s for p, s in by_path.items() if p.endswith(f"{moment}/{path_string(path)}"))
            assert found == sharding.spec
    assert {s for p, s in by_path.items() if p.endswith("count")} == {P()}


# What a user can get wrong.


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "tensor": 1}, {"data": 3, "fsdp": 1, "tensor": 1}, {"data": -1, "fsdp": 3, "tensor": 1}],
)
def test_axes_that_do_not_cover_the_devices(axes):
    with pytest.raises(InputError, match=rf"data={axes['data']}, fsdp={axes['fsdp']}.* 8 device.* must be 8"):
        make_mesh(**axes)


@pytest.mark.parametrize(
    "axes",
    [{"data": 0, "fsdp": 1, "tensor": 8}, {"data": 8, "fsdp": 0, "tensor": 1}, {"data": 8, "fsdp": 1, "tensor": -2}],
)
def test_axes_below_one(axes):
    with pytest.raises(InputError, match="at least 1"):
        make_mesh(**axes)


def test_data_takes_the_rest():
    assert dict(make_mesh(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices()[:3]).shape["data"] == 3


def test_any_axis_takes_the_rest():
    assert make_mesh(data=1, fsdp=-1, tensor=1).shape["fsdp"] == 8
    assert make_mesh(data=2, fsdp=1, tensor=-1).shape["tensor"] == 4
    with pytest.raises(InputError, match="one may be -1"):
        make_mesh(data=-1, fsdp=-1, tensor=1)
    with pytest.raises(InputError, match=r"data=1, fsdp=-1, tensor=3 does not cover the 8 device\(s\)"):
        make_mesh(data=1, fsdp=-1, tensor=3)


def test_a_model_that_the_mesh_does_not_divide():
    config = dataclasses.replace(CONFIG, num_kv_heads=1, head_dim=12, mrope_section=(2, 2, 2))
    tree = abstract_variables(VisionLanguageModel(config, lora=tiny.LORA))
    with pytest.raises(InputError) as e:
        tree_shardings(tree, mesh_of((1, 1, 8)), RULES)
    text = str(e.value)
    assert "\n" not in text and "does not divide" in text
    assert "layers/k_proj/kernel [2, 32, 12]: 12 is not a multiple of tensor=8" in text
    assert text.endswith("nearest that do: data=2 fsdp=1 tensor=4, data=1 fsdp=2 tensor=4, data=4 fsdp=1 tensor=2")
    tree_shardings(tree, mesh_of((2, 2, 2)), RULES)


def test_the_nearest_meshes_do_divide():
    tree, checked = {"x": jax.ShapeDtypeStruct((6, 20), jnp.float32)}, 0
    rules = [["x", ["fsdp", "tensor"]]]  # as JSON has it
    for shape in ((1, 8, 1), (1, 1, 8), (2, 1, 4), (1, 4, 2), (1, 2, 4)):
        try:
            tree_shardings(tree, AbstractMesh(shape, AXES), rules)
        except InputError as e:
            checked += 1
            offered = re.findall(r"data=(\d) fsdp=(\d) tensor=(\d)", str(e))
            assert offered
            for other in offered:
                tree_shardings(tree, AbstractMesh(tuple(map(int, other)), AXES), rules)
    assert checked == 3
    with pytest.raises(InputError, match="none of 8 devices; change config.mesh.rules"):
        odd = {"x": jax.ShapeDtypeStruct((3, 3, 3), jnp.float32)}
        tree_shardings(odd, AbstractMesh((8, 1, 1), AXES), (("", AXES),))


@pytest.mark.parametrize(
    "rules, message",
    [
        ((("[", ()),), r"rules\[0\]=.* must be a regular expression"),
        (((3, ()),), "must be a regular expression"),
        ((("", ()), ("x", ("model",))), r"rules\[1\]=.*'model'; choices: data, fsdp, tensor, None"),
        ((("x", ("fsdp", None, "fsdp")),), "uses fsdp twice"),
        ((("x", (None, None, None)),), r"3 axes for x \[8, 8\], which has 2"),
        ((("y", ()),), "none matches x; end them with"),
        ((("x", "fsdp"),), "must be a pair"),
        (("x",), "must be a pair"),
        ("x", "must be a list"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(InputError, match=message) as e:
        tree_shardings({"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, mesh_of((2, 2, 2)), rules)
    assert "\n" not in str(e.value)


def test_a_rule_that_matches_nothing_is_fine_and_the_first_counts():
    tree = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    rules = (("nowhere", ("fsdp",) * 1), ("x", (None, "fsdp")), ("", ("tensor",)))
    assert tree_shardings(tree, mesh_of((2, 2, 2)), rules)["x"].spec == P(None, "fsdp")


def test_rules_survive_json():
    assert parse_rules(json.loads(json.dumps(RULES))) == parse_rules(RULES)


def test_one_process_holds_and_counts_all_rows():
    mesh = mesh_of((2, 2, 2))
    assert own_rows(mesh, 8) == list(range(8)) and counts_rows(mesh)
    x = np.arange(24).reshape(8, 3)
    np.testing.assert_array_equal(read_rows(jax.device_put(x, batch_sharding(mesh)), mesh), x)


@pytest.mark.parametrize("batch_size, gradient_accumulation_steps", [(8, 1), (16, 1), (8, 2), (16, 4)])
def test_batches_that_fit(batch_size, gradient_accumulation_steps):
    check_batch(mesh_of((2, 2, 2)), batch_size=batch_size, micro_batches=gradient_accumulation_steps)


@pytest.mark.parametrize(
    "batch_size, gradient_accumulation_steps, ways, nearest",
    [(6, 1, 4, 8), (0, 1, 4, 4), (-4, 1, 4, 4), (8, 4, 16, 16), (1, 1, 4, 4), (17, 2, 8, 16)],
)
def test_batches_that_do_not(batch_size, gradient_accumulation_steps, ways, nearest):
    with pytest.raises(InputError, match=rf"config.batch_size={batch_size} .* = {ways}; the nearest is {nearest}$"):
        check_batch(mesh_of((2, 2, 2)), batch_size=batch_size, micro_batches=gradient_accumulation_steps)
