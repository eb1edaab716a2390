"""Every attention implementation against softmax written out, values and gradients, with its negative case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vigos_jax.errors import InputError
from vigos_jax.models import attention as module
from vigos_jax.models.attention import Causal, attention, choose, splash

LENGTHS = np.array([128, 77, 1], np.int32)


def _arrays(t=128, s=128, heads=4, kv_heads=2, head_dim=16):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    b = len(LENGTHS)
    return draw(b, t, heads, head_dim), draw(b, s, kv_heads, head_dim), draw(b, s, kv_heads, head_dim)


def _plain(q, k, v, mask):
    """Softmax attention as in a textbook."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def _causal(t=128):
    at = np.arange(t)
    return jnp.asarray((at[:, None] >= at) & (at < LENGTHS[:, None, None]))


def _random_mask(t=128, s=128):
    mask = np.random.default_rng(1).random((len(LENGTHS), t, s)) < 0.3
    mask[:, :, 0] = True
    return jnp.asarray(mask)


def _compare(ours, theirs, arrays, used, *, tolerance=2e-5):
    """Values at the used queries, and the gradients of a sum over them that weighs each differently."""
    weigh = jnp.asarray(np.random.default_rng(2).standard_normal(arrays[0].shape, np.float32)) * used[:, :, None, None]
    both = []
    for f in (ours, theirs):
        value, grads = jax.value_and_grad(lambda *x, f=f: jnp.sum(f(*x) * weigh), argnums=(0, 1, 2))(*arrays)
        both.append((f(*arrays) * used[:, :, None, None], value, *grads))
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


ALL = jnp.ones((len(LENGTHS), 128), bool)
USED = jnp.asarray(np.arange(128) < LENGTHS[:, None])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_mask(kv_heads):
    mask = _random_mask()
    _compare(lambda *x: attention(*x, mask), lambda *x: _plain(*x, mask), _arrays(kv_heads=kv_heads), ALL)


def test_a_mask_is_obeyed():
    mask = _random_mask()
    other = mask.at[0, 5, 9].set(~mask[0, 5, 9])
    with pytest.raises(AssertionError):
        _compare(lambda *x: attention(*x, other), lambda *x: _plain(*x, mask), _arrays(), ALL)


def test_many_queries_go_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_MAX_QUERIES", 50)  # 128 = 3 parts of 43, padded
    mask = _random_mask()
    _compare(lambda *x: attention(*x, mask), lambda *x: _plain(*x, mask), _arrays(), ALL)


def test_causal():
    _compare(lambda *x: attention(*x, Causal(LENGTHS)), lambda *x: _plain(*x, _causal()), _arrays(), USED)


def test_a_query_that_sees_nothing_is_finite():
    nothing = jnp.zeros((len(LENGTHS), 128, 128), bool)
    value, grads = jax.value_and_grad(lambda *x: jnp.sum(attention(*x, nothing)), argnums=(0, 1, 2))(*_arrays())
    assert all(np.isfinite(x).all() for x in (value, *grads))
    empty = attention(*_arrays(), Causal(np.zeros(len(LENGTHS), np.int32)))
    assert np.isfinite(empty).all()


def test_sixteen_bits():
    mask, arrays = _random_mask(), _arrays()
    short = [x.astype(jnp.bfloat16) for x in arrays]
    out = attention(*short, mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), _plain(*arrays, mask), atol=0.05)
    grads = jax.grad(lambda *x: jnp.sum(attention(*x, mask).astype(jnp.float32)), argnums=(0, 1, 2))(*short)
    assert {x.dtype for x in grads} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("axes", [None, (2, 2, 2), (1, 2, 4)])
def test_splash(axes):
    """The TPU's kernel, interpreted; also over a mesh, where 4 ways do not divide 2 key/value heads."""
    mesh, arrays, lengths = None, _arrays(head_dim=128), LENGTHS
    used, causal = USED, _causal()
    if axes:
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(axes), ("data", "fsdp", "tensor"))
        arrays = tuple(jnp.concatenate([x, x[:1]]) for x in arrays)
        lengths = np.append(LENGTHS, LENGTHS[0])
        used, causal = (jnp.concatenate([x, x[:1]]) for x in (used, causal))
    run = jax.jit(lambda *x: splash(*x, jnp.asarray(lengths), mesh=mesh, interpret=True))
    _compare(run, lambda *x: _plain(*x, causal), arrays, used, tolerance=1e-4)


def test_cudnn_is_asked_for_lengths_and_no_mask(monkeypatch):
    """cuDNN runs on a GPU alone; what it is asked for can be seen anywhere."""
    asked = []
    plain = jax.nn.dot_product_attention

    def spy(*arrays, implementation, **options):
        asked.append((implementation, options))
        return plain(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    run = lambda *x: attention(*x, Causal(LENGTHS), implementation="cudnn")  # noqa: E731
    _compare(run, lambda *x: _plain(*x, _causal()), _arrays(), USED)
    implementation, options = asked[0]
    assert implementation == "cudnn" and "mask" not in options and options["is_causal"]
    attention(*_arrays(), _random_mask(), implementation="cudnn")
    assert {name for name, _ in asked} == {"cudnn"} and len(asked) == 2  # a mask is XLA's


def test_chosen_by_platform():
    at = lambda platform, asked="auto", dtype="bfloat16": choose(asked, platform=platform, dtype=dtype)  # noqa: E731
    assert [at(p) for p in ("cpu", "gpu", "tpu")] == ["xla", "cudnn", "splash"]
    assert {at(p, dtype="float32") for p in ("cpu", "gpu", "tpu")} == {"xla"}
    assert [at("gpu", "xla"), at("gpu", "cudnn")] == ["xla", "cudnn"]
    for platform, dtype in (("cpu", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "float32")):
        with pytest.raises(InputError, match=f"attention='cudnn' does not run on {platform}.*choices: auto, xla"):
            at(platform, "cudnn", dtype)
