"""Batched rollouts: one prefill, then a `while_loop` of single-token steps that ends when every row has stopped.

The cache starts small. When its slots are used up, the loop is left, the cache padded to the next declared size, and
the loop entered again: short completions never pay for the attention and the memory of the longest one.

The student decodes with its adapter beside the frozen weights, never merged into them. Each row has its own random
key, so its tokens do not depend on the mesh or on the other rows of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.method.batch import PromptBatch
from vigos_jax.models.decoder import KVCache, empty_cache
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.shapes import Array, Bool, Float, Int, Key
from vigos_jax.models.variables import Variables, cast_floats
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.rollouts.sampling import Sampling, draw, penalise
from vigos_jax.runtime.sharding import read_rows


class DecodeState(flax.struct.PyTreeNode):
    """The loop's state. B rows, C = max_tokens, S cache slots, V vocabulary.

    Attributes:
      prompt_slots: static, cache slots of the prompt; the rest are for the completion.
      cache: keys and values of prompt and completion so far.
      visible: cache slots that hold a real prompt token; completion slots become visible as written.
      logits: float32, for the next token.
      next_position: M-RoPE position of the next token.
      keys: one random key per row.
      tokens: those sampled so far, then zeros.
      logps: log-probability at temperature 1, unfiltered and unpenalised.
      lengths: tokens so far, the end-of-sequence token included.
      is_done: rows that have ended.
      step: tokens taken by the loop.
      in_prompt, in_completion: token sets for the penalties, [B, 0] when those are off.
    """

    prompt_slots: int = flax.struct.field(pytree_node=False)
    cache: KVCache
    visible: Bool[Array, "B S"]
    logits: Float[Array, "B V"]
    next_position: Int[Array, "B"]
    keys: Key[Array, "B"]
    tokens: Int[Array, "B C"]
    logps: Float[Array, "B C"]
    lengths: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    step: Int[Array, ""]
    in_prompt: Bool[Array, "B V"]
    in_completion: Bool[Array, "B V"]


@dataclasses.dataclass(frozen=True)
class Completions:
    """Sampled completions on the host: per row the token ids (with the end token, if sampled) and their logps."""

    ids: tuple[tuple[int, ...], ...]
    logps: tuple[tuple[float, ...], ...]


def _prefill(
    model: VisionLanguageModel,
    sampling: Sampling,
    capacity: int,
    variables: Variables,
    prompts: PromptBatch,
    images: Float[Array, "B M W"],
    keys: Key[Array, "B"],
) -> DecodeState:
    text, c = prompts.text, model.config
    apply: Any = functools.partial(model.apply, variables)  # which returns what its method does
    b, t = text.ids.shape
    length = t + capacity
    cache = empty_cache(c, batch=b, length=length, dtype=model.dtype)
    visible = jnp.pad(text.segment_ids > 0, ((0, 0), (0, capacity)))  # [B, S]
    causal = jnp.arange(t)[:, None] >= jnp.arange(length)[None, :]
    hidden, cache = apply(text, images, mask=visible[:, None] & causal, cache=cache)
    logits = apply(hidden[:, -1], method="logits")  # left-padded: the last slot is the last token
    rows = jnp.arange(b)[:, None]
    wants_sets = sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0
    sets = jnp.zeros((b, c.vocab_size if wants_sets else 0), bool)
    return DecodeState(
        prompt_slots=t,
        cache=cache,
        visible=visible,
        logits=logits,
        next_position=text.positions[:, 0, -1] + 1,  # the last token is text
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
    model: VisionLanguageModel,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    variables: Variables,
    state: DecodeState,
    until: Int[Array, ""],
) -> DecodeState:
    b = state.tokens.shape[0]
    no_images = jnp.zeros((b, 0, model.config.hidden_size), model.dtype)
    slots = jnp.arange(state.visible.shape[1])

    def unfinished(s: DecodeState) -> Bool[Array, ""]:
        return (s.step < until) & ~jnp.all(s.is_done)

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
        written = (slots >= state.prompt_slots) & (slots <= s.cache.write_at)
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


def _grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with `slots` more cache slots."""
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, slots), (0, 0), (0, 0)])  # noqa: E731
    cache = state.cache.replace(k=pad(state.cache.k), v=pad(state.cache.v))
    return state.replace(cache=cache, visible=jnp.pad(state.visible, ((0, 0), (0, slots))))


@dataclasses.dataclass(frozen=True)
class SamplerPrograms:
    """The jitted programs of a rollout.

    Attributes:
      encode: (variables, vision) -> images [B, M, D].
      prefill: (variables, prompts, images, keys) -> DecodeState with the smallest cache.
      decode: (variables, state, until) -> state; the state is donated.
      grow: (state, slots) -> state with so many more cache slots.
    """

    encode: Callable
    prefill: Callable
    decode: Callable
    grow: Callable


class Sampler:
    """Compiled prefill and decode for one model and one way of sampling. Holds no weights.

    Attributes:
      programs: what is compiled.
      eos_ids: any of these ends a row; it is kept as the completion's last token.
      capacities: sizes of the cache's completion part, ascending, the last one `sampling.max_tokens`.
    """

    def __init__(
        self, model: VisionLanguageModel, sampling: Sampling, *, eos_ids: Sequence[int], cache_sizes: Sequence[int] = ()
    ):
        self.sampling = sampling
        self.capacities = (*(n for n in cache_sizes if n < sampling.max_tokens), sampling.max_tokens)
        # Float32 master weights of full fine-tuning are cast once, not at every token.
        self._cast = jax.jit(functools.partial(cast_floats, dtype=model.dtype))
        self._dtype = model.dtype
        self._mesh = model.mesh
        self.programs = SamplerPrograms(
            encode=jax.jit(functools.partial(model.apply, method="encode_images")),
            prefill=jax.jit(functools.partial(_prefill, model, sampling, self.capacities[0])),
            decode=jax.jit(functools.partial(_decode, model, sampling, tuple(eos_ids)), donate_argnums=(1,)),
            grow=jax.jit(_grow, static_argnums=1),
        )

    def ready(self, variables: Variables) -> Variables:
        """The variables as decoding reads them; do it once where several batches are sampled."""
        if all(x.dtype == self._dtype for x in jax.tree.leaves(variables["params"])):
            return variables
        return {**variables, "params": self._cast(variables["params"])}

    def encode(self, variables: Variables, vision: VisionInputs) -> Float[Array, "B M W"]:
        """Visual tokens of each row: for `start`, and for whoever else needs them."""
        return self.programs.encode(variables, vision)

    def start(
        self,
        variables: Variables,
        prompts: PromptBatch,
        keys: Key[Array, "B"],
        images: Float[Array, "B M W"] | None = None,
    ) -> DecodeState:
        """Runs the prompts. variables: from `ready`; keys: one random key per row; images: from `encode`, if known."""
        if images is None:
            images = self.encode(variables, prompts.vision)
        return self.programs.prefill(variables, prompts, images, keys)

    def advance(self, variables: Variables, state: DecodeState, until: int) -> DecodeState:
        """Decodes until every row has `until` tokens or has stopped; may be called again to go on."""
        until = min(until, self.sampling.max_tokens)
        while True:
            capacity = state.visible.shape[1] - state.prompt_slots
            state = self.programs.decode(variables, state, jnp.int32(min(until, capacity)))
            if until <= capacity or bool(jnp.all(state.is_done)):
                return state
            larger = next(n for n in self.capacities if n > capacity)
            state = self.programs.grow(state, larger - capacity)

    def __call__(
        self,
        variables: Variables,
        prompts: PromptBatch,
        keys: Key[Array, "B"],
        images: Float[Array, "B M W"] | None = None,
    ) -> Completions:
        """Samples a completion for every row; returns those of this process's rows."""
        variables = self.ready(variables)
        state = self.advance(variables, self.start(variables, prompts, keys, images), self.sampling.max_tokens)
        return completions(state, self._mesh)


def completions(state: DecodeState, mesh: Mesh | None = None) -> Completions:
    """Copies the tokens sampled so far to the host.

    Args:
      mesh: where the rows lie, to copy this process's own; None copies all, which one process alone can.
    """
    arrays = state.tokens, state.logps, state.lengths
    tokens, logps, lengths = jax.device_get(arrays) if mesh is None else (read_rows(x, mesh) for x in arrays)
    return Completions(
        ids=tuple(tuple(int(t) for t in row[:n]) for row, n in zip(tokens, lengths, strict=True)),
        logps=tuple(tuple(float(p) for p in row[:n]) for row, n in zip(logps, lengths, strict=True)),
    )


def row_keys(seed: int, step: int, rows: int, *, first_row: int = 0) -> Key[Array, "{rows}"]:
    """One key per row of the global batch: the same rollouts whatever the mesh."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))
