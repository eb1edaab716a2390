"""The gated delta rule: token by token, in chunks, and the short convolution in front of it.

Per value head, with the state S [H, Hv] in float32 (rows: key features, columns: value features), which is held as its
transpose [Hv, H], so that a token's sums over key features read it in order:

    S~_t = exp(g_t) S_{t-1}     e_t = beta_t (v_t - S~_t^T k_t)     S_t = S~_t + k_t e_t^T     o_t = S_t^T q_t

k is divided by sqrt(sum of squares + 1e-6), q as well and then by sqrt(H). Value head j uses key head j // (N / K).

A packed row is [prefix | branch | branch ..]: every branch continues the state and the convolution of the prefix, not
those of the branch before it in the array. `segment_ids` describes it: 0 padding, 1 prefix, 2, 3, .. branches, which
ascend along the row. A branch starts at a multiple of `CHUNK`; the prefix may end anywhere, with padding after it.

Letters as in models/shapes.py; N value heads of size Hv, K key heads of size H, F features of the convolution.
Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024 (arXiv:2412.06464).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vigos_jax.models.delta_config import CHUNK
from vigos_jax.models.shapes import Array, Bool, Float, Int

_BLOCK = 8  # diagonal blocks that are inverted row by row
_EPS = 1e-6
_PREFIX = 1

# Errors of a chunk's products reach all later tokens; the default of GPUs and TPUs rounds their inputs.
_einsum: Any = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Delta(NamedTuple):
    """Result of a pass.

    Attributes:
      out: in v's dtype. Finite and meaningless at padding.
      state: float32, after the last token.
      prefix_state: float32, after the prefix's last token; without segment ids the same as `state`.
    """

    out: Float[Array, "B T N Hv"]
    state: Float[Array, "B N Hv H"]
    prefix_state: Float[Array, "B N Hv H"]


def _normalized(q: Float[Array, "*X H"], k: Float[Array, "*X H"]) -> tuple[Float[Array, "*X H"], Float[Array, "*X H"]]:
    """Queries and keys as the rule uses them, float32."""
    q, k = (x.astype(jnp.float32) for x in (q, k))
    q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + _EPS) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def _zeros(k: Float[Array, "B T K H"], v: Float[Array, "B T N Hv"]) -> Float[Array, "B N Hv H"]:
    return jnp.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), jnp.float32)


class StepState(NamedTuple):
    """The state after a token, S = decay * before + key error^T, evaluated only when the next token reads it.

    Evaluating it at once would take a second pass, since the error depends on all of `before`.

    Attributes:
      before: S after the previous token.
      decay, key, error: of this token; 1, 0 and 0 if S equals `before`. All are float32.
    """

    before: Float[Array, "B N Hv H"]
    decay: Float[Array, "B N"]
    key: Float[Array, "B N H"]
    error: Float[Array, "B N Hv"]

    @classmethod
    def of(cls, state: Float[Array, "B N Hv H"]) -> "StepState":
        """Wraps an evaluated state."""
        return cls(
            state, jnp.ones_like(state[..., 0, 0]), jnp.zeros_like(state[..., 0, :]), jnp.zeros_like(state[..., 0])
        )

    def formed(self) -> Float[Array, "B N Hv H"]:
        """S."""
        return self.decay[..., None, None] * self.before + self.error[..., None] * self.key[:, :, None]


def delta_rule_step(
    q: Float[Array, "B K H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B N Hv"],
    g: Float[Array, "B N"],
    beta: Float[Array, "B N"],
    state: StepState,
) -> tuple[Float[Array, "B N Hv"], StepState]:
    """One token: its output in v's dtype, and the state after it.

    One pass forms the state and takes S^T k and S^T q from it; o is exp(g) S^T q + e (k^T q). Sums of elementwise
    products: a matrix product with two rows is no faster, and these are exact float32 everywhere.

    Args:
      q, k: before their normalization.
      g: logarithm of the decay, at most 0. Padding has g = beta = 0, which leaves the state alone.
    """
    q, k = (jnp.repeat(x, v.shape[1] // k.shape[1], axis=1) for x in _normalized(q, k))  # [B, N, H]
    decay = jnp.exp(g.astype(jnp.float32))
    before = state.formed()
    of_k, of_q = _sums(before * k[:, :, None], before * q[:, :, None])  # [B, N, Hv]
    error = beta.astype(jnp.float32)[..., None] * (v.astype(jnp.float32) - decay[..., None] * of_k)
    out = decay[..., None] * of_q + error * jnp.sum(k * q, -1, keepdims=True)
    return out.astype(v.dtype), StepState(before, decay, k, error)


def _sums(a: Float[Array, "*X H"], b: Float[Array, "*X H"]) -> tuple[Float[Array, "*X"], Float[Array, "*X"]]:
    """Both sums over the last axis by one reduction: of two, each would read the state anew."""
    zero = jnp.float32(0)
    return jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (a.ndim - 1,))


def recurrent_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N Hv"],
    g: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    state: Float[Array, "B N Hv H"] | None = None,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N Hv H"]]:
    """One sequence a row, a token at a time: `delta_rule_step` along T. Returns outputs and the last state."""

    def step(state, token):
        q, k, v, g, beta = token
        out, state = delta_rule_step(q, k, v, g, beta, state)
        return state, out

    first = StepState.of(_zeros(k, v) if state is None else state)
    last, out = jax.lax.scan(step, first, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)))
    return jnp.moveaxis(out, 0, 1), last.formed()


def _inverse(a: Float[Array, "*X C C"]) -> Float[Array, "*X C C"]:
    """The inverse of I + a, a strictly lower triangular, C a power of two.

    Diagonal blocks by forward substitution, pairs of them joined until one is left. Every step is a substitution, so
    errors stay at rounding. A product of (I + a^(2^i)) does not: with equal keys its factors grow beyond float32.
    """
    c = a.shape[-1]
    size = min(_BLOCK, c)

    def blocks(size: int, step: int, below: int):  # one in `step` along the diagonal, `below` rows under it
        return jnp.stack([a[..., i + below : i + below + size, i : i + size] for i in range(0, c, step)], -3)

    diagonal = blocks(size, size, 0)
    out = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), diagonal.shape)
    for j in range(size - 1):
        out = out - diagonal[..., :, j : j + 1] * out[..., j : j + 1, :]
    while size < c:
        first, second = out[..., 0::2, :, :], out[..., 1::2, :, :]
        corner = -_einsum(
            "...ij,...jk->...ik", second, _einsum("...ij,...jk->...ik", blocks(size, 2 * size, size), first)
        )
        rows = jnp.concatenate([first, jnp.zeros_like(first)], -1), jnp.concatenate([corner, second], -1)
        out = jnp.concatenate(rows, -2)
        size *= 2
    return out[..., 0, :, :]


@jax.custom_vjp
def _solve(a: Float[Array, "*X C C"], right: Float[Array, "*X C Hv"]) -> Float[Array, "*X C Hv"]:
    """x of (I + a) x = right, a strictly lower triangular."""
    return _solve_forward(a, right)[0]


def _solve_forward(a, right):
    inverse = _inverse(a)
    x = _einsum("...ij,...jv->...iv", inverse, right)
    return x, (inverse, x)


def _solve_backward(residuals, d_x):
    inverse, x = residuals
    d_right = _einsum("...ji,...jv->...iv", inverse, d_x)
    return jnp.tril(-_einsum("...iv,...jv->...ij", d_right, x), -1), d_right


_solve.defvjp(_solve_forward, _solve_backward)


def _chunk(state, q, k, v, g, beta):
    """C tokens from the state before them: outputs [B, C, N, H] and the state after them."""
    c, dtype = q.shape[1], v.dtype
    q, k = (jnp.repeat(x, v.shape[2] // k.shape[2], axis=2) for x in _normalized(q, k))
    q, k, v, g, beta = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (q, k, v, g, beta))  # heads first
    total = jnp.cumsum(g, -1)[..., None]  # [B, N, C, 1], log of the decay since the chunk's start
    beta = beta[..., None]
    at = jnp.arange(c)
    # Above the diagonal the difference is positive: masked before exp, whose overflow would be NaN in the gradient.
    decay = jnp.exp(jnp.where(at[:, None] >= at, total - jnp.swapaxes(total, -1, -2), -jnp.inf))
    both = jnp.concatenate([k, q], -2)
    inside = _einsum("bnid,bnjd->bnij", both, k)
    before = _einsum("bnid,bnvd->bniv", both, state)
    since = jnp.exp(total)
    error = _solve(jnp.tril(beta * decay * inside[..., :c, :], -1), beta * (v - since * before[..., :c, :]))
    out = since * before[..., c:, :] + _einsum("bnij,bnjv->bniv", decay * inside[..., c:, :], error)
    last = total[..., -1:, :]
    state = jnp.exp(last) * state + _einsum("bncv,bncd->bnvd", error, k * jnp.exp(last - total))
    return state, jnp.swapaxes(out, 1, 2).astype(dtype)


def _pick(flag: Bool[Array, "B"] | None, chosen, other):
    """Per row `chosen` where the flag is true, else `other`; without flags `other`."""
    return other if flag is None else jnp.where(flag[:, None, None, None], chosen, other)


def _cut(arrays, at, size: int):
    return tuple(jax.lax.dynamic_slice_in_dim(x, at, size, 1) for x in arrays)


def _put(arrays, parts, at):
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, y, at, 1) for x, y in zip(arrays, parts, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(size: int, flags, tokens):
    """Applies `_chunk` along T: outputs, the last state and, with flags, the state after the prefix.

    Chunks are sliced from the arrays in place: a scan over an array of chunks would first copy every input into
    another layout. The gradient is written by hand, as autodiff would add each slice to a full-length gradient.

    Args:
      flags: (chunk starts a branch, chunk is of the prefix), bool [chunks, B] each, or (None, None).
      tokens: q, k, v, g, beta of a multiple of `size` tokens.
    """
    return _chunks_forward(size, flags, tokens)[0]


def _chunks_forward(size, flags, tokens):
    def step(carry, x):
        state, kept, out = carry
        at, (starts, in_prefix) = x
        state = _pick(starts, kept, state)
        after, part = _chunk(state, *_cut(tokens, at, size))
        return (after, _pick(in_prefix, after, kept), *_put((out,), (part,), at)), state

    _, k, v, *_ = tokens
    state = _zeros(k, v)
    kept = None if flags[0] is None else state
    (state, kept, out), states = jax.lax.scan(
        step, (state, kept, jnp.zeros_like(v)), (jnp.arange(0, v.shape[1], size), flags)
    )
    return (out, state, kept), (flags, tokens, states)


def _chunks_backward(size, residuals, slopes):
    """From the last chunk to the first: each is computed anew from the state before it."""
    flags, tokens, states = residuals
    d_out, d_state, d_kept = slopes

    def step(carry, x):
        d_state, d_kept, d_tokens = carry
        at, (starts, in_prefix), state = x
        if starts is not None:
            d_state, d_kept = _pick(in_prefix, d_state + d_kept, d_state), _pick(in_prefix, 0.0, d_kept)
        _, pull = jax.vjp(_chunk, state, *_cut(tokens, at, size))
        d_state, *parts = pull((d_state, *_cut((d_out,), at, size)))
        if starts is not None:
            d_state, d_kept = _pick(starts, 0.0, d_state), _pick(starts, d_state + d_kept, d_kept)
        return (d_state, d_kept, _put(d_tokens, parts, at)), None

    carry = d_state, d_kept, tuple(jnp.zeros_like(x) for x in tokens)
    places = jnp.arange(0, d_out.shape[1], size)
    (_, _, d_tokens), _ = jax.lax.scan(step, carry, (places, flags, states), reverse=True)
    return None, d_tokens


_chunks.defvjp(_chunks_forward, _chunks_backward)


def chunk_for(platform: str) -> int:
    """The fastest chunk on "cpu", "gpu" or "tpu": large products do not help a CPU, few steps help a GPU."""
    return 32 if platform == "cpu" else CHUNK


def chunked_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N Hv"],
    g: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk: int = CHUNK,
) -> Delta:
    """`recurrent_delta_rule` from an empty state in matrix products over chunks of tokens, for packed rows as well.

    A chunk's tokens solve one triangular system for the errors e; the state goes from chunk to chunk. The backward
    pass keeps the state before each chunk and computes everything else of it anew.

    Args:
      segment_ids: of packed rows; g and beta are taken as 0 at padding. None: one sequence a row, whose padding, on
        whichever side, has g = beta = 0 already.
      chunk: tokens computed together, a power of two that divides `CHUNK`; see `chunk_for`.
    """
    t = q.shape[1]

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, -t % chunk)] + [(0, 0)] * (x.ndim - 2))

    flags = None, None
    if segment_ids is not None:
        g, beta = (jnp.where((segment_ids > 0)[..., None], x, 0) for x in (g, beta))
        segment = pad(segment_ids).reshape(len(segment_ids), -1, chunk).max(-1).T  # [chunks, B]
        before = jnp.pad(jax.lax.cummax(segment, axis=0), ((1, 0), (0, 0)))[:-1]
        flags = (segment > _PREFIX) & (segment > before), segment == _PREFIX
    out, state, kept = _chunks(chunk, flags, tuple(pad(x) for x in (q, k, v, g, beta)))
    return Delta(out[:, :t], state, state if kept is None else kept)


def conv_cache(u: Float[Array, "B T F"], tokens: Bool[Array, "B T"], *, width: int) -> Float[Array, "B W F"]:
    """Inputs of the last W = width - 1 true tokens of each row, zeros before the first.

    True tokens stand side by side. What a branch reads of its prefix, and what `causal_conv_step` starts from.
    """
    end = jnp.max(jnp.where(tokens, jnp.arange(1, u.shape[1] + 1), 0), axis=1, keepdims=True)
    at = end + jnp.arange(1 - width, 0)  # [B, W]
    there = (at >= 0) & jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1)
    return jnp.where(there[..., None], jnp.take_along_axis(u, jnp.maximum(at, 0)[..., None], axis=1), 0)


def causal_conv(
    u: Float[Array, "B T F"], w: Float[Array, "F Width"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T F"]:
    """Depthwise causal convolution, sum_i w[:, Width - 1 - i] u_{t - i}, in u's dtype; sums are float32.

    Args:
      w: the last column meets the token itself.
      segment_ids: of packed rows. The first tokens of a branch read the prefix's last ones, those of the prefix zeros;
        padding gives zeros. None: one sequence a row, whose padding before it has u = 0.
    """
    t, width = u.shape[1], w.shape[1]
    taps = w.astype(jnp.float32).T[::-1]  # taps[i] meets u_{t-i}

    def shifted(x, i: int):
        return jnp.pad(x, [(0, 0), (i, 0)] + [(0, 0)] * (x.ndim - 2))[:, :t]

    if segment_ids is None:
        return jnp.asarray(sum(taps[i] * shifted(u, i) for i in range(width))).astype(u.dtype)
    before = [shifted(segment_ids, i) for i in range(width)]
    same = [(segment_ids > 0) & (x == segment_ids) for x in before]
    out = jnp.asarray(sum(jnp.where(same[i][..., None], taps[i] * shifted(u, i), 0) for i in range(width)))
    # Token p of a branch lacks taps p + 1 .. width - 1: they meet the prefix's last tokens.
    prefix = conv_cache(u, segment_ids == _PREFIX, width=width).astype(jnp.float32)
    starts = (segment_ids > _PREFIX) & ~same[1]
    for p in range(width - 1):
        lacking = jnp.einsum("bwf,wf->bf", prefix[:, p:], taps[p + 1 :][::-1], precision=jax.lax.Precision.HIGHEST)
        out += jnp.where((shifted(starts, p) & same[p])[..., None], lacking[:, None], 0)
    return out.astype(u.dtype)


def causal_conv_step(
    u: Float[Array, "B F"], w: Float[Array, "F Width"], cache: Float[Array, "B W F"]
) -> tuple[Float[Array, "B F"], Float[Array, "B W F"]]:
    """One token of `causal_conv`: its output, and the cache with the token in it.

    Args:
      cache: inputs of the W = Width - 1 tokens before, oldest first; `conv_cache`.
    """
    taps = w.astype(jnp.float32).T
    out = jnp.sum(cache.astype(jnp.float32) * taps[:-1], 1) + u.astype(jnp.float32) * taps[-1]
    return out.astype(u.dtype), jnp.concatenate([cache[:, 1:], u[:, None].astype(cache.dtype)], 1)
