"""The gated delta rule against its recurrence written out, torch's functions, and each branch run alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from vigos_jax.models import delta_rule as module
from vigos_jax.models.delta_rule import (
    CHUNK,
    StepState,
    causal_conv,
    causal_conv_step,
    chunked_delta_rule,
    conv_cache,
    delta_rule_step,
    recurrent_delta_rule,
)

K, N, H, HV, WIDTH = 2, 4, 16, 8, 4
OPTIONS = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}  # of transformers' functions
NAMES = ("q", "k", "v", "g", "beta")
F = K * H * 2 + N * HV


def _arrays(t, b=2, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    g = -0.3 * np.abs(draw(b, t, N))
    g[:, :, 0] *= 200  # a head that forgets everything within a token: exp(-g) is beyond float32
    return draw(b, t, K, H), draw(b, t, K, H), draw(b, t, N, HV), g, 1 / (1 + np.exp(-draw(b, t, N)))


def _written_out(q, k, v, g, beta):
    """The rule in float64, one row, head and token at a time. Returns outputs and the last state, [B, N, Hv, H]."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    b, t, n, _ = v.shape
    state = np.zeros((b, n, k.shape[-1], v.shape[-1]))
    out = np.zeros(v.shape)
    for i in range(b):
        for j in range(n):
            of = j // (n // k.shape[2])
            for at in range(t):
                s = state[i, j] * np.exp(g[i, at, j])
                error = beta[i, at, j] * (v[i, at, j] - s.T @ k[i, at, of])
                state[i, j] = s + np.outer(k[i, at, of], error)
                out[i, at, j] = state[i, j].T @ q[i, at, of] / np.sqrt(k.shape[-1])
    return out, np.swapaxes(state, 2, 3)


def _close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


def _differs(got, want, by=1e-3):
    assert np.abs(np.asarray(got) - np.asarray(want)).max() > by


def _relative(got, want, tolerance=1e-4):
    """Gradients: the largest difference against the largest entry."""
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


chunked, recurrent = jax.jit(chunked_delta_rule), jax.jit(recurrent_delta_rule)


@pytest.fixture(scope="module")
def plain():
    """Arrays of 100 tokens, and the outputs and last state of the rule written out."""
    arrays = _arrays(100)
    return arrays, *_written_out(*arrays)


def test_recurrence(plain):
    arrays, out, last = plain
    for got, want in zip(recurrent(*arrays), (out, last), strict=True):
        _close(got, want)


def test_chunks(plain):
    arrays, out, last = plain
    got = chunked(*arrays)
    assert got.out.dtype == got.state.dtype == jnp.float32
    _close(got.out, out)
    _close(got.state, last)
    np.testing.assert_array_equal(got.state, got.prefix_state)


@pytest.mark.parametrize("t", [1, 64, 65])
def test_chunks_at_other_lengths(t):
    arrays = _arrays(t, seed=t)
    out, last = _written_out(*arrays)
    got = chunked(*arrays)
    _close(got.out, out)
    _close(got.state, last)


def test_a_rule_without_decay_differs(plain):
    arrays, out, _ = plain
    q, k, v, g, beta = arrays
    _differs(chunked(q, k, v, 0 * g, beta).out, out)


def test_steps_of_one_token(plain):
    arrays, out, last = plain
    step, state = jax.jit(delta_rule_step), StepState.of(jnp.zeros(last.shape, jnp.float32))
    for at in range(8):
        got, state = step(*(x[:, at] for x in arrays), state)
        _close(got, out[:, at])
    rest, state = recurrent(*(x[:, 8:] for x in arrays), state=state.formed())
    _close(rest, out[:, 8:])
    _close(state, last)


def test_left_padding(plain):
    """The padded row of 100 tokens is its last 70 alone, whatever q, k and v are at padding."""
    arrays = plain[0]
    g, beta = (np.where(np.arange(100)[:, None] < 30, 0, x).astype(np.float32) for x in arrays[3:])
    got = chunked(*arrays[:3], g, beta)
    out, last = _written_out(*(x[:, 30:] for x in arrays))
    _close(got.out[:, 30:], out)
    _close(got.state, last)


def test_bfloat16_inputs_keep_a_float32_state(plain):
    arrays = plain[0]
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays[:3])
    got = chunked(q, k, v, *arrays[3:])
    assert got.out.dtype == jnp.bfloat16 and got.state.dtype == jnp.float32
    out, last = _written_out(*(np.asarray(x, np.float32) for x in (q, k, v)), *arrays[3:])
    _close(got.state, last)
    _close(np.asarray(got.out, np.float32), out, 1e-2)


def _near_equal_keys():
    """A flat patch of an image: the same key at every token, up to a hundredth."""
    q, k, v, g, beta = _arrays(100, seed=3)
    return q, k[:, :1] + 0.01 * k, v, 0.001 * g, np.full_like(beta, 0.98)


def _neumann(a):
    """(I + a)^-1 as (I - a)(I + a^2)(I + a^4)..: exact on paper."""
    eye = jnp.eye(a.shape[-1])
    out, power = eye - a, a
    for _ in range(int(np.log2(a.shape[-1]))):
        power = power @ power
        out = out @ (eye + power)
    return out


def test_near_equal_keys():
    arrays = _near_equal_keys()
    out, last = _written_out(*arrays)
    got = chunked(*arrays)
    _close(got.out, out)
    _close(got.state, last)


def test_a_neumann_inverse_fails_on_near_equal_keys(monkeypatch):
    arrays = [x[:1] for x in _near_equal_keys()]  # a shape that jax has not traced with the right inverse
    monkeypatch.setattr(module, "_inverse", _neumann)
    _differs(jax.jit(lambda *x: chunked_delta_rule(*x).out)(*arrays), _written_out(*arrays)[0])


def _weights_of(arrays):
    rng = np.random.default_rng(4)
    return rng.standard_normal(arrays[2].shape, np.float32), rng.standard_normal((2, N, HV, H), np.float32)


def _slopes(function, arrays):
    """Gradients of all inputs, of a sum that weighs every output and the last state."""
    weigh, weigh_state = _weights_of(arrays)

    def loss(arrays):
        out, last = function(*arrays)[:2]
        return jnp.sum(out * weigh) + jnp.sum(last * weigh_state)

    return jax.jit(jax.grad(loss))(arrays)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, CHUNK])
@pytest.mark.parametrize("make", [lambda: _arrays(100), _near_equal_keys], ids=["random", "near-equal keys"])
def test_gradients(make, chunk):
    arrays = make()
    ours = functools.partial(chunked_delta_rule, chunk=chunk)
    _relative(_slopes(ours, arrays), _slopes(recurrent_delta_rule, arrays))


def _torch(arrays, requires_grad=False):
    return [torch.tensor(x, requires_grad=requires_grad) for x in arrays]


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_transformers(plain, name):
    arrays = plain[0]
    want, want_state = getattr(theirs, name)(*_torch(arrays), **OPTIONS)
    got = chunked(*arrays)
    _close(got.out, want.numpy())
    _close(got.state, want_state.mT.numpy())


def test_gradients_of_transformers(plain):
    arrays = plain[0]
    tensors = _torch(arrays, requires_grad=True)
    out, last = theirs.torch_chunk_gated_delta_rule(*tensors, **OPTIONS)
    weigh, weigh_state = _torch(_weights_of(arrays))
    want = torch.autograd.grad((out * weigh).sum() + (last.mT * weigh_state).sum(), tensors)
    _relative(_slopes(chunked, arrays), [x.numpy() for x in want])


# Packed rows: of each row the tokens of [prefix, branch, branch, ..], and padding before the prefix.
LAYOUTS = (((50, 70, 1, 30), 0), ((64, 2, 128), 3), ((2, 64, 40), 5))
T = 320


def _align(n):
    return -(-n // CHUNK) * CHUNK


def _places():
    """For each row (slice of each segment), and the segment ids."""
    ids, rows = np.zeros((len(LAYOUTS), T), np.int32), []
    for row, (lengths, before) in enumerate(LAYOUTS):
        at, places = before, []
        for segment, n in enumerate(lengths, 1):
            places.append(slice(at, at + n))
            ids[row, at : at + n] = segment
            at = _align(at + n)
        rows.append(places)
    return rows, ids


PLACES, SEGMENT_IDS = _places()


@pytest.fixture(scope="module")
def layer():
    """Inputs (u, g, beta) of a packed batch and the convolution's weights."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    b = len(LAYOUTS)
    return draw(b, T, F), -0.05 * np.abs(draw(b, T, N)), 1 / (1 + np.exp(-draw(b, T, N))), draw(F, WIDTH)


def _split(c):
    q, k, v = jnp.split(c, [K * H, 2 * K * H], -1)
    heads = lambda x, n: x.reshape(*x.shape[:2], n, -1)  # noqa: E731
    return heads(q, K), heads(k, K), heads(v, N)


def _packed(u, g, beta, w, conv_ids=SEGMENT_IDS, ids=SEGMENT_IDS):
    return chunked_delta_rule(*_split(causal_conv(u, w, conv_ids)), g, beta, segment_ids=ids)


# Each prefix alone, then each branch behind its prefix: (row, where its tokens lie in the row, how many to skip).
SEQUENCES = [
    sequence
    for row, (prefix, *branches) in enumerate(PLACES)
    for sequence in [
        (row, np.r_[prefix], 0),
        *((row, np.r_[prefix, branch], prefix.stop - prefix.start) for branch in branches),
    ]
]
PREFIXES = [i for i, (_, _, skip) in enumerate(SEQUENCES) if not skip]


def _alone(u, g, beta, w):
    """Each of SEQUENCES alone: outputs put where they lie in the packed batch, and all last states."""
    longest = max(len(at) for _, at, _ in SEQUENCES)
    rows = np.array([row for row, _, _ in SEQUENCES])[:, None]
    at = np.stack([np.pad(at, (0, longest - len(at))) for _, at, _ in SEQUENCES])
    there = np.stack([np.arange(longest) < len(at) for _, at, _ in SEQUENCES])
    u, g, beta = (jnp.where(there[..., None], x[rows, at], 0) for x in (u, g, beta))
    padded = jnp.pad(u, ((0, 0), (WIDTH - 1, 0), (0, 0)))
    conv = sum(w[:, i] * padded[:, i : i + longest] for i in range(WIDTH))
    got, states = recurrent_delta_rule(*_split(conv), g, beta)
    out = jnp.zeros((len(LAYOUTS), T, N, HV))
    for i, (row, at, skip) in enumerate(SEQUENCES):
        out = out.at[row, at[skip:]].set(got[i, skip : len(at)])
    return out, states


@pytest.fixture(scope="module")
def alone(layer):
    """Outputs and last states of `_alone`, and the gradients of the layer."""

    def loss(layer):
        out, states = _alone(*layer)
        return jnp.sum(out * _weights()), (out, states)

    slopes, (out, states) = jax.jit(jax.grad(loss, has_aux=True))(layer)
    return out, states, slopes


def _weights():
    return np.random.default_rng(6).standard_normal((len(LAYOUTS), T, N, HV), np.float32)


def _at_tokens(out):
    return np.where(SEGMENT_IDS[:, :, None, None] > 0, out, 0)


def test_packed_branches_are_each_alone(layer, alone):
    got = jax.jit(_packed)(*layer)
    _close(_at_tokens(got.out), alone[0])
    _close(got.prefix_state, alone[1][np.array(PREFIXES)])
    _close(got.state, alone[1][np.array([*PREFIXES[1:], len(SEQUENCES)]) - 1])


def test_gradients_of_packed_branches(layer, alone):
    weigh = _at_tokens(_weights())
    got = jax.jit(jax.grad(lambda layer: jnp.sum(_packed(*layer).out * weigh)))(layer)
    for a, b in zip(got, alone[2], strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_packed_branches_without_restarts_differ(layer, alone):
    u, g, beta, w = layer
    g, beta = (np.where(SEGMENT_IDS[..., None] > 0, x, 0).astype(np.float32) for x in (g, beta))
    got = jax.jit(lambda *x: _packed(*x, ids=None))(u, g, beta, w)
    _differs(_at_tokens(got.out), alone[0], 0.01)


def test_a_convolution_of_array_neighbours_differs(layer, alone):
    u, *rest = layer
    u = np.where(SEGMENT_IDS[..., None] > 0, u, 0)
    got = jax.jit(lambda *x: _packed(*x, conv_ids=None))(u, *rest)
    _differs(_at_tokens(got.out), alone[0], 0.01)


def test_convolution_is_torchs(layer):
    u, w = layer[0], layer[3]
    want = torch.nn.functional.conv1d(torch.tensor(u).mT, torch.tensor(w)[:, None], padding=WIDTH - 1, groups=F)[
        ..., :T
    ].mT
    _close(causal_conv(u, w), want)
    _close(causal_conv(u, w, np.ones(u.shape[:2], np.int32)), want)
    assert not np.any(np.where(SEGMENT_IDS[..., None] > 0, 0, causal_conv(u, w, SEGMENT_IDS)))


def test_steps_of_the_convolution(layer):
    u, w = layer[0], layer[3]
    want = causal_conv(u, w)
    for start in (0, 2, 10):  # fewer tokens than taps before the first step, too
        tokens = np.broadcast_to(np.arange(T) < start, u.shape[:2])
        cache = conv_cache(u, tokens, width=WIDTH)
        for at in range(start, start + 5):
            got, cache = causal_conv_step(u[:, at], w, cache)
            _close(got, want[:, at])


@pytest.mark.slow
def test_heads_over_a_mesh_axis(plain):
    """Heads split over devices, forward and backward: the same numbers and no array sent between them."""
    arrays = plain[0]
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    split = tuple(jax.device_put(x, NamedSharding(mesh, P(None, None, "tensor"))) for x in arrays)
    weigh = _weights_of(arrays)[0]

    def outputs_and_slopes(arrays):
        out, pull = jax.vjp(lambda *x: chunked_delta_rule(*x, segment_ids=np.ones((2, 100), np.int32)).out, *arrays)
        return out, pull(weigh)

    program = jax.jit(outputs_and_slopes).lower(split).compile()
    text = program.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
    out, slopes = program(split)
    want, pull = jax.vjp(lambda *x: recurrent_delta_rule(*x)[0], *arrays)
    _close(out, want)
    _relative(slopes, pull(weigh))
