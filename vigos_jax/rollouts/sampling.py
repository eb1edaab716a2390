"""How the next token is drawn: penalties, temperature, top-k, top-p, min-p."""

import dataclasses

import jax
import jax.numpy as jnp

from vigos_jax.models.shapes import AnyArray, Array, Bool, Float, Int, Key

_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Penalties first, then temperature, top-k, top-p, min-p.

    Attributes:
      max_tokens: longest completion.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens with at least this mass; 1 keeps all.
      min_p: keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or completion; 1 is off.
      presence_penalty: subtracted from the logits of tokens in the completion; 0 is off.
      micro_batch: most rows whose images and prompts are computed at once; 0: what a sixteenth of the memory holds.
      decode_batch: most rows that are decoded at once; 0: all.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    micro_batch: int = 0
    decode_batch: int = 0


def penalise(
    logits: Float[AnyArray, "B V"],
    in_prompt: Bool[AnyArray, "B _"],
    in_completion: Bool[AnyArray, "B _"],
    sampling: Sampling,
) -> Float[AnyArray, "B V"]:
    """Applies the repetition penalty (prompt and completion) and the presence penalty (completion).

    Args:
      in_prompt, in_completion: [B, V], or [B, 0] where no penalty reads them.
    """
    if sampling.repetition_penalty != 1.0:
        p = sampling.repetition_penalty
        logits = jnp.where(in_prompt | in_completion, jnp.where(logits > 0, logits / p, logits * p), logits)
    if sampling.presence_penalty != 0.0:
        logits = logits - sampling.presence_penalty * in_completion
    return logits


def draw(keys: Key[AnyArray, "B"], logits: Float[AnyArray, "B V"], sampling: Sampling) -> Int[Array, "B"]:
    """Draws one token per row from penalised logits."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    index = None
    if sampling.top_k or sampling.top_p < 1.0:
        # Sorted survivors: all later filters work on the few that top-k leaves.
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        logits, index = top_k(logits, k)  # [B, k], descending
        if sampling.top_p < 1.0:
            probs = jax.nn.softmax(logits)
            mass_before = jnp.cumsum(probs, -1) - probs
            logits = jnp.where(mass_before < sampling.top_p, logits, _MASKED)
    if sampling.min_p > 0.0:
        best = jnp.max(logits, -1, keepdims=True)
        logits = jnp.where(logits >= best + jnp.log(sampling.min_p), logits, _MASKED)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    choice = jnp.argmax(logits + gumbel, -1)
    if index is not None:
        choice = jnp.take_along_axis(index, choice[:, None], -1)[:, 0]
    return choice.astype(jnp.int32)


_CHUNK = 128


def top_k(logits: Float[AnyArray, "B V"], k: int) -> tuple[Float[Array, "B {k}"], Int[Array, "B {k}"]]:
    """The k largest of each row and where they are, equal to `jax.lax.top_k`, ties included, and faster over many.

    The k largest lie in the k chunks with the largest maxima: of each of those k chunks at least one element comes
    before any element of another chunk. So two small selections replace one over the whole row.
    """
    b, v = logits.shape
    n = -(-v // _CHUNK)
    if n <= 2 * k:
        return tuple(jax.lax.top_k(logits, k))
    chunks = jnp.pad(logits, ((0, 0), (0, n * _CHUNK - v)), constant_values=-jnp.inf).reshape(b, n, _CHUNK)
    _, best = jax.lax.top_k(jnp.max(chunks, -1), k)
    best = jnp.sort(best, -1)  # in the row's order, so that the first of equal elements still comes first
    candidates = jnp.take_along_axis(chunks, best[:, :, None], 1).reshape(b, k * _CHUNK)
    values, at = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(best, at // _CHUNK, -1) * _CHUNK + at % _CHUNK
