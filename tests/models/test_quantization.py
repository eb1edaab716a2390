"""Quantised kernels: codes against plain numpy, products and whole models against the dequantised weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch_models as tm

from vigos_jax.errors import InputError
from vigos_jax.models import quantization as q
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.variables import cast_floats, has_dtype
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.rollouts.sampler import Sampler, row_keys
from vigos_jax.rollouts.sampling import Sampling
from vigos_jax.runtime.sharding import make_mesh, tree_shardings

KINDS = ("int8", "nf4")
FAMILIES = {"qwen2_5_vl": tm.tiny_config, "qwen3_vl": tm.tiny_qwen3_config}
TOLERANCE = 1e-4
NOTICEABLE = 0.1
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"}


def plain_dequantise(kernel: q.QuantisedKernel) -> np.ndarray:
    """One kernel's numbers, number by number as the docstring of QuantisedKernel says where they lie."""
    codes, scales = np.asarray(kernel.codes), np.asarray(kernel.scales, np.float32)
    if kernel.kind == "int8":
        return codes.astype(np.float32) * scales
    out = np.empty((2 * codes.shape[0], codes.shape[1]), np.float32)
    for row in range(len(out)):
        block, inside = divmod(row, 64)
        byte = codes[32 * block + inside % 32]
        code = byte % 16 if inside < 32 else byte // 16
        out[row] = np.array(q.NF4, np.float32)[code] * scales[block]
    return out


def random_kernel(rows: int = 192, out: int = 24, *, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, out)).astype(np.float32)
    return x * np.logspace(-2, 1, out, dtype=np.float32)  # columns of very different sizes


# -- codes ------------------------------------------------------------------------------------------------------


def test_nf4_codes_are_the_nearest_values_in_units_of_their_block():
    kernel = random_kernel()
    kernel[64:128, 3] = 0  # a block of zeros stays zero
    got = q.quantise(jnp.asarray(kernel), "nf4")
    blocks = kernel.reshape(3, 64, 24)
    largest = np.abs(blocks).max(1)
    np.testing.assert_allclose(np.asarray(got.scales, np.float32)[largest > 0], largest[largest > 0], rtol=2**-8)
    scaled = blocks / np.where(largest > 0, largest, 1)[:, None]
    nearest = np.array(q.NF4, np.float32)[np.abs(scaled[..., None] - np.array(q.NF4)).argmin(-1)]
    np.testing.assert_allclose(plain_dequantise(got).reshape(blocks.shape), nearest * largest[:, None], rtol=2**-8)
    assert got.kernel_shape == kernel.shape and got.codes.dtype == jnp.uint8


def test_int8_codes_are_within_a_step_of_the_kernel():
    kernel = random_kernel()
    got = q.quantise(jnp.asarray(kernel), "int8")
    step = np.abs(kernel).max(0) / 127.5
    np.testing.assert_allclose(np.asarray(got.scales)[0], step, rtol=1e-6)
    error = np.abs(plain_dequantise(got) - kernel)
    assert (error <= 0.501 * step).all() and got.kernel_shape == kernel.shape


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_numbers_are_those_of_a_plain_reading(kind):
    one, other = (q.quantise(jnp.asarray(random_kernel(seed=s)), kind) for s in (1, 2))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    got = np.asarray(q.dequantise(stacked, jnp.float32))
    np.testing.assert_array_equal(got, np.stack([plain_dequantise(one), plain_dequantise(other)]))
    layer = jax.tree.map(lambda x: x[1], stacked)
    np.testing.assert_array_equal(np.asarray(q.dequantise(layer, jnp.float32)), got[1])


# -- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_dequantised_kernel(kind):
    kernel = q.quantise(jnp.asarray(random_kernel()), kind)
    plain = plain_dequantise(kernel)
    rng = np.random.default_rng(3)
    x, dy = (rng.standard_normal((2, 5, n)).astype(np.float32) for n in (192, 24))
    y, pull = jax.vjp(lambda x: q.matmul(x, kernel), jnp.asarray(x))
    np.testing.assert_allclose(y, x @ plain, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dy @ plain.T, atol=1e-4, rtol=1e-5)
    kept = [a for a in jax.tree.leaves(pull) if a.size >= plain.size // 2]
    assert [a.dtype for a in kept] == [kernel.codes.dtype]  # for the gradient: the codes, not the kernel


def test_int8_scales_are_not_rounded_to_the_dtype_of_the_states():
    kernel = q.quantise(jnp.asarray(random_kernel()), "int8")
    x = jnp.zeros((1, 192)).at[0, 0].set(1.0)
    got = np.asarray(q.matmul(x.astype(jnp.bfloat16), kernel), np.float32)
    exact = plain_dequantise(kernel)[:1]
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32))


# -- models -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, its variables, and the same with quantised and with dequantised kernels."""

    model: VisionLanguageModel
    variables: dict
    batch: object

    def quantised(self, kind: str) -> dict:
        one = functools.partial(q.quantise, kind=kind)

        def convert(path, leaf):
            keys = tuple(k.key for k in path)
            if not q.is_quantisable(keys):
                return leaf
            return jax.tree.map(lambda *x: jnp.stack(x), *[one(layer) for layer in leaf])

        return {**self.variables, "params": jax.tree_util.tree_map_with_path(convert, self.variables["params"])}

    def run(self, variables: dict) -> np.ndarray:
        """Logits [B, T, V] of the prompts."""
        return np.asarray(_run(self.model)(variables, self.batch.vision, self.batch.text)[1])


_run = functools.cache(parity.make_run)


def dequantised(variables: dict, dtype=jnp.float32) -> dict:
    plain = lambda x: q.dequantise(x, dtype) if q.is_quantised(x) else x  # noqa: E731
    return jax.tree.map(plain, variables, is_leaf=q.is_quantised)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> Case:
    raw = FAMILIES[request.param](tied=True).to_dict()
    config = dataclasses.replace(ModelConfig.from_hf(raw), intermediate_size=128)
    model = VisionLanguageModel(config, lora=tiny.LORA)
    samples = [tm.make_sample(s, seed=i, family=config.family) for i, s in enumerate(([9], [3, tm.SMALL, 5]))]
    return Case(model, tiny.random_variables(model), parity.pack(samples, config, length=24, slots=64))


@pytest.fixture(scope="module", params=KINDS)
def pair(case, request) -> tuple[dict, dict, np.ndarray]:
    """Quantised variables, dequantised ones, and the logits of these."""
    variables = case.quantised(request.param)
    plain = dequantised(variables)
    return variables, plain, case.run(plain)


def real(case: Case, logits: np.ndarray) -> np.ndarray:
    return logits[np.asarray(case.batch.text.segment_ids) > 0]


@pytest.mark.slow
def test_logits_are_those_of_the_dequantised_weights(case, pair):
    variables, _, expected = pair
    worst = tm.max_difference(real(case, case.run(variables)), real(case, expected))
    assert worst <= TOLERANCE
    assert expected.std() > 1 and tm.max_difference(case.run(case.variables), expected) > NOTICEABLE


def broken(variables: dict, change) -> dict:
    """The variables with every quantised kernel changed."""
    return jax.tree.map(lambda x: change(x) if q.is_quantised(x) else x, variables, is_leaf=q.is_quantised)


BREAKS = {
    "scales dropped": lambda k: k.replace(scales=jnp.ones_like(k.scales)),
    "another block's scale": lambda k: k.replace(scales=jnp.roll(k.scales, 1, -2 if k.kind == "nf4" else -1)),
    "another layer's codes": lambda k: k.replace(codes=jnp.roll(k.codes, 1, 0)),
    "halves of a byte exchanged": lambda k: k.replace(codes=(k.codes << 4) | (k.codes >> 4)),  # int8: another code
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
def test_parity_notices(case, pair, what):
    variables, _, expected = pair
    changed = broken(variables, BREAKS[what])
    assert tm.max_difference(real(case, case.run(changed)), real(case, expected)) > NOTICEABLE


@pytest.mark.slow
def test_decoding_is_that_of_the_dequantised_weights(case, pair):
    variables, plain, _ = pair
    sampler = Sampler(case.model, Sampling(max_tokens=6, temperature=1.0), eos_ids=(0,), cache_sizes=(4,))
    ours, theirs = (sampler(v, case.batch, row_keys(0, 0, 2)) for v in (variables, plain))
    assert ours.ids == theirs.ids and min(map(len, ours.ids)) > 2
    for a, b in zip(ours.logps, theirs.logps, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


# -- trees ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_quantised_are_the_decoders_seven_projections(case):
    shapes = q.quantised_shapes(abstract_variables(case.model)["params"], "nf4")
    found = jax.tree_util.tree_leaves_with_path(shapes, is_leaf=q.is_quantised)
    names = {"/".join(k.key for k in path) for path, leaf in found if q.is_quantised(leaf)}
    assert names == {f"layers/{name}/kernel" for name in PROJECTIONS}
    real = case.quantised("nf4")["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


def test_blocks_must_divide_the_input():
    params = abstract_variables(tiny.MODEL)["params"]  # 32 and 48 wide
    with pytest.raises(InputError, match=r"quantization=nf4 needs inputs .* layers/\S+/kernel has (32|48); choices"):
        q.quantised_shapes(params, "nf4")
    assert q.is_quantised(q.quantised_shapes(params, "int8")["layers"]["q_proj"]["kernel"])


@pytest.mark.parametrize("kind", KINDS)
def test_casting_leaves_codes_and_scales_alone(kind):
    tree = {"kernel": q.quantise(jnp.asarray(random_kernel()), kind), "bias": jnp.ones(3, jnp.bfloat16)}
    assert has_dtype(tree, jnp.bfloat16) and not has_dtype(tree, jnp.float32)
    got = cast_floats(tree, jnp.float32)
    assert got["bias"].dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, got["kernel"]) == jax.tree.map(lambda x: x.dtype, tree["kernel"])


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_split_as_the_kernel_would_be(kind):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    kernel = jax.eval_shape(functools.partial(q.quantise, kind=kind), jax.ShapeDtypeStruct((256, 64), jnp.float32))
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), kernel)
    tree = {"params": {"layers": {"q_proj": {"kernel": stacked}, "o_proj": {"kernel": stacked}}}}
    layers = tree_shardings(tree, mesh, tiny.RULES)["params"]["layers"]
    for name, axes in (("q_proj", ("fsdp", "tensor")), ("o_proj", ("tensor", "fsdp"))):
        got = layers[name]["kernel"]
        assert tuple(got.codes.spec) == (None, *axes)
        assert tuple(got.scales.spec) == (None, axes[0] if kind == "nf4" else None, axes[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_kernel_gives_the_same_product(kind):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    kernel = q.quantise(jnp.asarray(random_kernel(256, 64)), kind)
    tree = {"layers": {"o_proj": {"kernel": jax.tree.map(lambda x: x[None], kernel)}}}
    split = jax.device_put(tree, tree_shardings(tree, mesh, tiny.RULES))
    x = jax.random.normal(jax.random.key(0), (4, 256))
    run = jax.jit(lambda t, x: q.matmul(x, jax.tree.map(lambda a: a[0], t["layers"]["o_proj"]["kernel"])))
    np.testing.assert_allclose(run(split, x), run(tree, x), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_kernels_size_is_made_outside_the_loop_over_layers(kind):
    """What does not depend on the layer jax computes before the loop, and keeps."""
    kernel = q.quantise(jnp.asarray(random_kernel(256, 256)), kind)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), kernel)

    def loss(scale, stacked):
        def layer(x, kernel):
            return q.matmul(x * scale, kernel), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), jnp.ones((2, 256)), stacked)[0] ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(1.0, stacked).jaxpr
    made = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert any(eqn.primitive.name == "scan" for eqn in jaxpr.eqns) and max(made) < 256 * 256
