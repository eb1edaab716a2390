"""A quantised base from a folder: the codes of the file's own numbers, in the places the mesh says; and back out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs as runs
from cases import others_slow

from vigos_jax.errors import InputError
from vigos_jax.models.families import tensor_table
from vigos_jax.models.quantization import QuantisedKernel, is_quantised, quantise, quantised_shapes
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.runtime.sharding import make_mesh, tree_shardings
from vigos_jax.weights import quantised, reading, writing
from vigos_jax.weights.weight_files import WeightFiles, open_weights

KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Widths of whole blocks: 128 and 256."""
    text = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    vision = {"out_hidden_size": 128}
    return runs.write_model(tmp_path_factory.mktemp("wide") / "model", text=text, vision=vision)


@pytest.fixture(scope="module")
def config(folder):
    return reading.load_config(folder)


def load(folder, config, kind: str, *, dtype=jnp.float32, mesh=None):
    abstract = {"params": quantised_shapes(abstract_variables(VisionLanguageModel(config))["params"], kind)}
    shardings = tree_shardings(abstract, mesh, tiny.RULES)["params"] if mesh else None
    return reading.load_params(folder, config, abstract["params"], dtype=dtype, shardings=shardings)


@pytest.fixture(scope="module")
def plain(folder, config):
    return load(folder, config, "none")


def check(params, plain, kind: str) -> None:
    """Every leaf is the file's, or the codes of the file's numbers, layer by layer."""
    count = 0
    for (path, leaf), (_, original) in zip(reading.leaves(params), reading.leaves(plain), strict=True):
        if not is_quantised(leaf):
            np.testing.assert_array_equal(np.asarray(leaf, np.float32), original, err_msg=str(path))
            continue
        count += 1
        for i, kernel in enumerate(original):
            runs.assert_same_trees(
                jax.tree.map(lambda x, i=i: x[i], leaf), jax.jit(quantise, static_argnums=1)(kernel, kind)
            )
    assert count == 7


@pytest.mark.parametrize("kind", others_slow(KINDS))
def test_codes_are_those_of_the_files_own_numbers(folder, config, plain, kind):
    check(load(folder, config, kind), plain, kind)


def test_codes_do_not_depend_on_the_dtype_of_the_rest(folder, config):
    a, b = (load(folder, config, "nf4", dtype=dtype)["layers"]["o_proj"]["kernel"] for dtype in ("float32", "bfloat16"))
    runs.assert_same_trees(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_on_a_mesh_are_the_same_and_split(folder, config, plain, kind):
    params = load(folder, config, kind, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    check(params, plain, kind)
    codes = params["layers"]["mlp"]["up_proj"]["kernel"].codes
    assert codes.addressable_shards[0].data.size == codes.size // 4


def test_one_tensor_of_the_files_is_held_at_a_time(folder, config, monkeypatch):
    """Of a kernel that is quantised the files are asked for one layer at a time."""
    asked, real = [], quantised.read_shard

    def read_shard(files, row, index, **options):
        asked.append(index[0].stop - index[0].start)
        return real(files, row, index, **options)

    monkeypatch.setattr(quantised, "read_shard", read_shard)
    load(folder, config, "nf4")
    assert len(asked) == 7 * config.num_layers and set(asked) == {1}


def test_a_tensor_that_is_not_finite_is_named(folder, config, tmp_path, plain):
    bad = jax.tree.map(lambda x: x, plain)
    bad["layers"]["k_proj"]["kernel"] = plain["layers"]["k_proj"]["kernel"].at[1, 3, 3].set(jnp.nan)
    writing.save_sharded(
        tmp_path, writing.file_tensors(bad, tensor_table(config), config, dtype=np.float32), max_shard_bytes=2**30
    )
    with pytest.raises(InputError, match=r"1 tensor\(s\) hold NaN .*layers\.1\.self_attn\.k_proj\.weight"):
        load(tmp_path, config, "int8")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_are_the_original_numbers_with_the_adapter(folder, config, plain, kind):
    lora = tiny.random_variables(VisionLanguageModel(config, lora=tiny.LORA))["lora"]
    options = {"dtype": np.float32, "lora": lora, "scale": 2.0}
    table, params = tensor_table(config), load(folder, config, kind)
    expected = dict(writing.stream_tensors(plain, table, config, **options))
    got = dict(writing.stream_tensors(params, table, config, files=open_weights(folder), **options))
    assert got.keys() == expected.keys()
    for name, x in got.items():
        np.testing.assert_allclose(np.asarray(x), np.asarray(expected[name]), atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="no files were given"):
        list(writing.stream_tensors(params, table, config, **options))


def test_scales_of_a_split_input_are_those_of_the_whole_column(folder, config):
    """The largest number of a column may lie on another device."""
    files: WeightFiles = open_weights(folder)
    row = next(r for r in tensor_table(config) if r.path == ("layers", "o_proj", "kernel"))
    shape = (config.num_layers, config.num_heads * config.head_dim, config.hidden_size)
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((shape[0], *x.shape), x.dtype),
        jax.eval_shape(lambda k: quantise(k, "int8"), jax.ShapeDtypeStruct(shape[1:], jnp.float32)),
    )
    tree = {"params": {"layers": {"o_proj": {"kernel": abstract}}}}
    shardings = tree_shardings(tree, mesh, tiny.RULES)["params"]["layers"]["o_proj"]["kernel"]
    got = quantised.read_quantised(files, row, shape, kind="int8", shardings=shardings)
    assert isinstance(got, QuantisedKernel)
    whole = quantised.read_quantised(files, row, shape, kind="int8", shardings=None)
    runs.assert_same_trees(got, whole)
