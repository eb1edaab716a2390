"""The chunked gated delta rule against transformers' PyTorch function, and against the plain recurrence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Race, Result, compiled, race, temporary_bytes
from vigos_jax.models import delta_rule as module

ROWS, T, HEADS, HEAD_DIM = 2, 1024, 16, 128  # heads of Qwen3.5 0.8B and 2B
CHUNK = module.chunk_for("cpu")


def _arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    wide, narrow = (ROWS, T, HEADS, HEAD_DIM), (ROWS, T, HEADS)
    return draw(*wide), draw(*wide), draw(*wide), -0.2 * np.abs(draw(*narrow)), 1 / (1 + np.exp(-draw(*narrow)))


def _chunked(*arrays, chunk: int):
    return module.chunked_delta_rule(*arrays, chunk=chunk).out


def _recurrent(*arrays):
    return module.recurrent_delta_rule(*arrays)[0]


def _kept(*arrays, chunk: int):
    """The same chunks, whose intermediate arrays autodiff keeps for the backward pass."""
    parts = tuple(jnp.moveaxis(jnp.reshape(x, (ROWS, -1, chunk, *x.shape[2:])), 1, 0) for x in arrays)
    state = jnp.zeros((ROWS, HEADS, HEAD_DIM, HEAD_DIM))
    out = jax.lax.scan(lambda s, x: module._chunk(s, *x), state, parts)[1]
    return jnp.moveaxis(out, 0, 1).reshape(arrays[2].shape)


def _slopes(function):
    """Outputs, and the gradients of their sum."""

    def both(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(jnp.ones_like(out))

    return both


def _torch(arrays, *, backward: bool):
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    tensors = [torch.tensor(x, requires_grad=backward) for x in arrays]
    with torch.set_grad_enabled(backward):
        out = torch_chunk_gated_delta_rule(*tensors, use_qk_l2norm_in_kernel=True)[0]
    return (out, *torch.autograd.grad(out.sum(), tensors)) if backward else (out,)


def _race(ours, arrays, *, backward: bool) -> Race:
    """Against PyTorch with two threads, after a look at the numbers."""
    import torch

    torch.set_num_threads(2)
    got = ours(*arrays)
    for a, b in zip(got if backward else [got], _torch(arrays, backward=backward), strict=True):
        b = b.detach().numpy()
        assert np.abs(a - b).max() < 1e-4 * np.abs(b).max()
    return race(lambda: _torch(arrays, backward=backward), lambda: ours(*arrays), rounds=7)


def _detail(r: Race, recurrent: float) -> tuple[tuple[str, str], ...]:
    return (
        ("PyTorch", f"{1e3 * r.baseline:.0f} ms, chunks of 64, two threads"),
        ("ours", f"{1e3 * r.ours:.0f} ms, chunks of {CHUNK}"),
        ("a token at a time", f"{1e3 * recurrent:.0f} ms"),
    )


def _what(passes: str) -> str:
    return f"gated delta rule, {passes}, {ROWS} rows of {T} tokens, {HEADS} heads of {HEAD_DIM}, float32"


def delta_rule() -> Result:
    arrays = tuple(map(jnp.asarray, _arrays()))
    ours, plain = compiled(functools.partial(_chunked, chunk=CHUNK), *arrays), compiled(_recurrent, *arrays)
    r = _race(ours, arrays, backward=False)
    recurrent = race(lambda: plain(*arrays), lambda: ours(*arrays), rounds=3).baseline
    return Result("delta_rule", _what("forward"), r.ratio, 1.5, r.spread, _detail(r, recurrent))


def delta_rule_backward() -> Result:
    arrays = tuple(map(jnp.asarray, _arrays()))
    ours = compiled(_slopes(functools.partial(_chunked, chunk=CHUNK)), *arrays)
    plain = compiled(_slopes(_recurrent), *arrays)
    r = _race(ours, arrays, backward=True)
    recurrent = race(lambda: plain(*arrays), lambda: ours(*arrays), rounds=3).baseline
    what = _what("forward and backward")
    return Result("delta_rule_backward", what, r.ratio, 1.5, r.spread, _detail(r, recurrent))


def delta_rule_memory() -> Result:
    """By the compiler: runs no clock and none of the programs."""
    arrays = jax.eval_shape(lambda: tuple(map(jnp.asarray, _arrays())))
    size = lambda f: temporary_bytes(compiled(_slopes(f), *arrays))  # noqa: E731
    ours, kept, small = (
        size(functools.partial(f, chunk=chunk))
        for f, chunk in ((_chunked, module.CHUNK), (_kept, module.CHUNK), (_chunked, CHUNK))
    )
    detail = (
        ("intermediate arrays kept", f"{kept / 2**20:.0f} MiB"),
        ("states alone kept", f"{ours / 2**20:.0f} MiB, chunks of {module.CHUNK}"),
        (f"chunks of {CHUNK}, as on a CPU", f"{small / 2**20:.0f} MiB"),
        ("its recurrence keeps a state a token", f"{4 * ROWS * T * HEADS * HEAD_DIM**2 / 2**20:.0f} MiB"),
    )
    return Result("delta_rule_memory", "temporary memory of its backward pass", kept / ours, 3.0, None, detail)
