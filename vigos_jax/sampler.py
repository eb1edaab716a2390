"""Batched rollouts: one prefill, then a `while_loop` of single-token steps that ends when every row has stopped.

The student decodes with its adapter beside the frozen weights, never merged into them. Each row has its own random
key, so its tokens do not depend on the mesh or on the other rows of the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.inputs import PromptBatch, TextInputs
from vigos_jax.models.qwen2_5_vl import KVCache, Qwen2_5VL, empty_cache
from vigos_jax.models.variables import Variables, cast_floats

Array = jax.Array
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Penalties first, then temperature, top-k, top-p, min-p.

    Attributes:
      max_tokens: longest completion.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of likeliest tokens with at least this mass; 1 keeps all.
      min_p: keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or completion; 1 is off.
      presence_penalty: subtracted from the logits of tokens in the completion; 0 is off.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self):
        for field, is_good, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number (1 is off)"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "a finite number (0 is off)"),
        ):
            if not is_good:
                raise InputError(f"sampling.{field}={getattr(self, field)} must be {rule}")


@flax.struct.dataclass
class DecodeState:
    """The loop's state. B rows, C = max_tokens, S cache slots, V vocabulary.

    Attributes:
      cache: keys and values of prompt and completion so far.
      visible: bool [B, S], cache slots that hold a real prompt token; completion slots become visible as written.
      logits: float32 [B, V] for the next token.
      next_position: int32 [B], M-RoPE position of the next token.
      keys: random keys [B].
      tokens: int32 [B, C].
      logps: float32 [B, C], log-probability at temperature 1, unfiltered and unpenalised.
      lengths: int32 [B], tokens so far, the end-of-sequence token included.
      is_done: bool [B].
      step: int32 scalar, tokens taken by the loop.
      in_prompt, in_completion: bool [B, V] token sets for the penalties, [B, 0] when those are off.
    """

    cache: KVCache
    visible: Array
    logits: Array
    next_position: Array
    keys: Array
    tokens: Array
    logps: Array
    lengths: Array
    is_done: Array
    step: Array
    in_prompt: Array
    in_completion: Array


@dataclasses.dataclass(frozen=True)
class Completions:
    """Sampled completions on the host: per row the token ids (with the end token, if sampled) and their logps."""

    ids: tuple[tuple[int, ...], ...]
    logps: tuple[tuple[float, ...], ...]


def penalise(logits: Array, in_prompt: Array, in_completion: Array, sampling: Sampling) -> Array:
    """Applies the repetition penalty (prompt and completion) and the presence penalty (completion). All [B, V]."""
    if sampling.repetition_penalty != 1.0:
        p = sampling.repetition_penalty
        logits = jnp.where(in_prompt | in_completion, jnp.where(logits > 0, logits / p, logits * p), logits)
    if sampling.presence_penalty != 0.0:
        logits = logits - sampling.presence_penalty * in_completion
    return logits


def draw(keys: Array, logits: Array, sampling: Sampling) -> Array:
    """Draws one token per row from penalised logits. keys [B], logits [B, V] -> int32 [B]."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    index = None
    if sampling.top_k or sampling.top_p < 1.0:
        # Sorted survivors: all later filters work on the few that top-k leaves.
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        logits, index = jax.lax.top_k(logits, k)  # [B, k], descending
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


def _prefill(model: Qwen2_5VL, sampling: Sampling, variables: Variables, prompts: PromptBatch, keys: Array):
    text, c = prompts.text, model.config
    b, t = text.ids.shape
    length = t + sampling.max_tokens
    images = model.apply(variables, prompts.vision, method="encode_images")
    cache = empty_cache(c, batch=b, length=length, dtype=model.dtype)
    visible = jnp.pad(text.segment_ids > 0, ((0, 0), (0, sampling.max_tokens)))  # [B, S]
    causal = jnp.arange(t)[:, None] >= jnp.arange(length)[None, :]
    hidden, cache = model.apply(variables, text, images, mask=visible[:, None] & causal, cache=cache)
    logits = model.apply(variables, hidden[:, -1], method="logits")  # left-padded: the last slot is the last token
    rows = jnp.arange(b)[:, None]
    wants_sets = sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0
    sets = jnp.zeros((b, c.vocab_size if wants_sets else 0), bool)
    return DecodeState(
        cache=cache,
        visible=visible,
        logits=logits,
        next_position=jnp.max(text.positions, (1, 2)) + 1,
        keys=keys,
        tokens=jnp.zeros((b, sampling.max_tokens), jnp.int32),
        logps=jnp.zeros((b, sampling.max_tokens), jnp.float32),
        lengths=jnp.zeros((b,), jnp.int32),
        is_done=~prompts.is_active,
        step=jnp.zeros((), jnp.int32),
        in_prompt=sets.at[rows, text.ids].max(text.segment_ids > 0) if wants_sets else sets,
        in_completion=sets,
    )


def _decode(
    model: Qwen2_5VL,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    variables: Variables,
    state: DecodeState,
    until: Array,
) -> DecodeState:
    b = state.tokens.shape[0]
    no_images = jnp.zeros((b, 0, model.config.hidden_size), model.dtype)
    slots = jnp.arange(state.visible.shape[1])
    prompt_length = state.visible.shape[1] - sampling.max_tokens

    def unfinished(s: DecodeState) -> Array:
        return (s.step < jnp.minimum(until, sampling.max_tokens)) & ~jnp.all(s.is_done)

    def step(s: DecodeState) -> DecodeState:
        keys = jax.vmap(jax.random.fold_in, (0, None))(s.keys, s.step)
        token = draw(keys, penalise(s.logits, s.in_prompt, s.in_completion, sampling), sampling)  # [B]
        logp = jnp.take_along_axis(jax.nn.log_softmax(s.logits), token[:, None], -1)[:, 0]
        is_open = ~s.is_done
        is_end = jnp.any(token[:, None] == jnp.array(eos_ids, jnp.int32), -1)
        text = TextInputs(
            ids=token[:, None],
            positions=jnp.broadcast_to(s.next_position[:, None, None], (b, 3, 1)),
            segment_ids=jnp.ones((b, 1), jnp.int32),
            image_index=jnp.full((b, 1), -1),
        )
        written = (slots >= prompt_length) & (slots <= s.cache.write_at)
        mask = (s.visible | written)[:, None]  # [B, 1, S]
        hidden, cache = model.apply(variables, text, no_images, mask=mask, cache=s.cache)
        in_completion = s.in_completion
        if in_completion.shape[1]:
            in_completion = in_completion.at[jnp.arange(b), token].max(is_open)
        return s.replace(
            cache=cache,
            logits=model.apply(variables, hidden[:, 0], method="logits"),
            next_position=s.next_position + 1,
            tokens=s.tokens.at[:, s.step].set(jnp.where(is_open, token, 0)),
            logps=s.logps.at[:, s.step].set(jnp.where(is_open, logp, 0.0)),
            lengths=s.lengths + is_open,
            is_done=s.is_done | is_end,
            step=s.step + 1,
            in_completion=in_completion,
        )

    return jax.lax.while_loop(unfinished, step, state)


class Sampler:
    """Compiled prefill and decode for one model and one way of sampling. Holds no weights.

    Attributes:
      eos_ids: any of these ends a row; it is kept as the completion's last token.
    """

    def __init__(self, model: Qwen2_5VL, sampling: Sampling, *, eos_ids: Sequence[int]):
        self.sampling = sampling
        # Float32 master weights of full fine-tuning are cast once, not at every token.
        self._cast = jax.jit(functools.partial(cast_floats, dtype=model.dtype))
        self._dtype = model.dtype
        self._prefill = jax.jit(functools.partial(_prefill, model, sampling))
        self._decode = jax.jit(functools.partial(_decode, model, sampling, tuple(eos_ids)), donate_argnums=(1,))

    def ready(self, variables: Variables) -> Variables:
        """The variables as decoding reads them; do it once where several batches are sampled."""
        if all(x.dtype == self._dtype for x in jax.tree.leaves(variables["params"])):
            return variables
        return {**variables, "params": self._cast(variables["params"])}

    def start(self, variables: Variables, prompts: PromptBatch, keys: Array) -> DecodeState:
        """Runs the prompts. variables: from `ready`; keys: one random key per row."""
        return self._prefill(variables, prompts, keys)

    def advance(self, variables: Variables, state: DecodeState, until: int) -> DecodeState:
        """Decodes until every row has `until` tokens or has stopped; may be called again to go on."""
        return self._decode(variables, state, jnp.int32(until))

    def __call__(self, variables: Variables, prompts: PromptBatch, keys: Array) -> Completions:
        """Samples a completion for every row."""
        variables = self.ready(variables)
        state = self.advance(variables, self.start(variables, prompts, keys), self.sampling.max_tokens)
        return completions(state)


def completions(state: DecodeState) -> Completions:
    """Copies the tokens sampled so far to the host."""
    tokens, logps, lengths = (np.asarray(x) for x in jax.device_get((state.tokens, state.logps, state.lengths)))
    return Completions(
        ids=tuple(tuple(int(t) for t in row[:n]) for row, n in zip(tokens, lengths, strict=True)),
        logps=tuple(tuple(float(p) for p in row[:n]) for row, n in zip(logps, lengths, strict=True)),
    )


def row_keys(seed: int, step: int, rows: int, *, first_row: int = 0) -> Array:
    """One key per row of the global batch: the same rollouts whatever the mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))


