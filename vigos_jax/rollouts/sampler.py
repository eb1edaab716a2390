"""Batched rollouts: one prefill, then a `while_loop` of single-token steps that ends when every row has stopped.

The cache starts small. When its slots are used up, the loop is left, the cache padded to the next declared size, and
the loop entered again: short completions never pay for the attention and the memory of the longest one.

The student decodes with its adapter beside the frozen weights, never merged into them. Each row has its own random
key, so its tokens do not depend on the mesh or on the other rows of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.method.batch import PromptBatch
from vigos_jax.models.inputs import TextInputs
from vigos_jax.models.kv_cache import KeyValues
from vigos_jax.models.shapes import Array, Bool, Float, Int, Key
from vigos_jax.models.variables import Variables, cast_floats, has_dtype
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.rollouts.decode_weights import DecodeWeights, decode_weights, own_layers, reads_stack, unstacked
from vigos_jax.rollouts.prefill import DecodeState, prefill
from vigos_jax.rollouts.row_groups import group_count, put_rows, room_for, rows_for_memory, shards_of, take_rows
from vigos_jax.rollouts.sampling import Sampling, draw, penalise
from vigos_jax.runtime.sharding import read_rows


@dataclasses.dataclass(frozen=True)
class Completions:
    """Sampled completions on the host.

    Attributes:
      ids: per row the token ids, with the end token, if sampled.
      logps: their log-probabilities, of the model's own distribution: no temperature, no penalties, nothing cut off.
      failed: per row why it has no completion, None where it has one; () where all have.
    """

    ids: tuple[tuple[int, ...], ...]
    logps: tuple[tuple[float, ...], ...]
    failed: tuple[str | None, ...] = ()

    def failure(self, row: int) -> str | None:
        """Why a row has no completion."""
        return self.failed[row] if self.failed else None


def _decode(
    model: VisionLanguageModel,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    weights: DecodeWeights,
    state: DecodeState,
    until: Int[Array, ""],
) -> DecodeState:
    b = state.tokens.shape[0]
    slots = jnp.arange(state.visible.shape[1])
    apply: Any = functools.partial(model.apply, {"params": weights.outer})

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
        # Sliced in the loop: before it, the slices would be copies.
        layers = unstacked(model, weights.layers) if weights.is_stacked else weights.layers
        hidden, cache = apply(text, layers, s.cache, visible=s.visible | written, method="decode")
        in_completion = s.in_completion
        if in_completion.shape[1]:
            in_completion = in_completion.at[jnp.arange(b), token].max(is_open)
        return s.replace(
            cache=cache,
            logits=apply(hidden[:, 0], method="logits"),
            next_position=s.next_position + 1,
            tokens=s.tokens.at[:, s.step].set(jnp.where(is_open, token, 0)),
            logps=s.logps.at[:, s.step].set(jnp.where(is_open, logp, 0.0)),
            lengths=s.lengths + is_open,
            is_done=s.is_done | is_end,
            step=s.step + 1,
            in_completion=in_completion,
        )

    return jax.lax.while_loop(unfinished, step, state)


def _padded(entry: KeyValues, slots: int) -> KeyValues:
    return entry.padded(slots)


@dataclasses.dataclass(frozen=True)
class SamplerPrograms:
    """The jitted programs of a rollout.

    Attributes:
      encode: (variables, vision) -> images [B, M, W].
      prefill: (variables, prompts, images, keys) -> DecodeState with the smallest cache.
      weights: variables -> what `weights` adds to them, see `own_layers`.
      decode: (weights, state, until) -> state; the state is donated.
      grow: (one layer's keys and values, slots) -> the same with so many more slots.
      take: (arrays of a batch, group, groups) -> the rows of a group.
      room: (arrays of a group, groups) -> zeros for the whole batch.
      put: (arrays of a batch, those of a group, group, groups) -> with these; the batch's are donated.
    """

    encode: Callable
    prefill: Callable
    weights: Callable
    decode: Callable
    grow: Callable
    take: Callable
    room: Callable
    put: Callable


class Sampler:
    """Compiled prefill and decode for one model and one way of sampling. Holds no weights.

    Attributes:
      programs: what is compiled.
      capacities: sizes of the cache's completion part, ascending, the last one `sampling.max_tokens`. Each at least
        doubles: the loop is compiled for every size.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        cache_sizes: Sequence[int] = (),
        memory: float | None = None,
    ):
        """Names the programs; nothing is compiled yet.

        Args:
          memory: bytes of a device, for `sampling.micro_batch=0`; None if it does not bound a batch.
        """
        self.sampling, self.capacities = sampling, _doubling(cache_sizes, sampling.max_tokens)
        self._dtype, self._mesh, self._config, self._memory = model.dtype, model.mesh, model.config, memory
        # Float32 master weights of full fine-tuning are cast once, not at every token.
        self._cast = jax.jit(functools.partial(cast_floats, dtype=model.dtype))
        self._stacked = reads_stack(model.mesh)
        self.programs = SamplerPrograms(
            encode=jax.jit(functools.partial(model.apply, method="encode_images")),
            prefill=jax.jit(functools.partial(prefill, model, sampling, self.capacities[0])),
            weights=jax.jit(functools.partial(own_layers, model, stacked=self._stacked)),
            decode=jax.jit(functools.partial(_decode, model, sampling, tuple(eos_ids)), donate_argnums=(1,)),
            grow=jax.jit(_padded, static_argnums=1),
            take=jax.jit(functools.partial(take_rows, mesh=model.mesh), static_argnames="groups"),
            room=jax.jit(functools.partial(room_for, mesh=model.mesh), static_argnames="groups"),
            put=jax.jit(functools.partial(put_rows, mesh=model.mesh), static_argnames="groups", donate_argnums=(0,)),
        )

    def ready(self, variables: Variables) -> Variables:
        """The variables in the dtype of the computation; do it once where several batches are sampled."""
        if has_dtype(variables["params"], self._dtype):
            return variables
        return {**variables, "params": self._cast(variables["params"])}

    def weights(self, variables: Variables, own: Any = None) -> DecodeWeights:
        """The weights as the decoding loop reads them. own: from `programs.weights`, if known."""
        own = self.programs.weights(variables) if own is None else own
        return decode_weights(variables, own, stacked=self._stacked)

    def micro_groups(self, prompts: PromptBatch) -> int:
        """In how many groups of rows a batch is encoded and prefilled."""
        rows, most = prompts.text.ids.shape[0], self.sampling.micro_batch
        if not most and self._memory is not None:
            most = shards_of(self._mesh) * rows_for_memory(
                self._config,
                prompt=prompts.text.ids.shape[1],
                patches=prompts.vision.patches.shape[1],
                memory=self._memory,
                itemsize=jnp.dtype(self._dtype).itemsize,
            )
        return group_count(rows, most, mesh=self._mesh)

    def encode(self, variables: Variables, prompts: PromptBatch) -> Float[Array, "B M W"]:
        """Visual tokens of each row: for `start`, and for whoever else needs them."""
        groups = self.micro_groups(prompts)
        return self._by_groups(groups, lambda vision: self.programs.encode(variables, vision), prompts.vision)

    def start(
        self,
        variables: Variables,
        prompts: PromptBatch,
        keys: Key[Array, "B"],
        images: Float[Array, "B M W"] | None = None,
    ) -> DecodeState:
        """Runs the prompts. variables: from `ready`; keys: one random key per row; images: from `encode`, if known."""
        if images is None:
            images = self.encode(variables, prompts)
        return self._by_groups(
            self.micro_groups(prompts), lambda part: self.programs.prefill(variables, *part), (prompts, images, keys)
        )

    def _by_groups(self, groups: int, function: Callable[[Any], Any], batch: Any) -> Any:
        """function(batch), computed for one group of rows after the other."""
        if groups == 1:
            return function(batch)
        whole = None
        for group in range(groups):
            part = function(self.programs.take(batch, jnp.int32(group), groups=groups))
            whole = self.programs.room(part, groups=groups) if whole is None else whole
            whole = self.programs.put(whole, part, jnp.int32(group), groups=groups)
        return whole

    def advance(self, weights: DecodeWeights, state: DecodeState, until: int) -> DecodeState:
        """Decodes until every row has `until` tokens or has stopped; may be called again to continue.

        Args:
          weights: from `weights`.
        """
        until = min(until, self.sampling.max_tokens)
        while True:
            capacity = state.visible.shape[1] - state.prompt_slots
            state = self.programs.decode(weights, state, jnp.int32(min(until, capacity)))
            if until <= capacity or bool(jnp.all(state.is_done)):
                return state
            state = self._grown(state, next(n for n in self.capacities if n > capacity) - capacity)

    def _grown(self, state: DecodeState, slots: int) -> DecodeState:
        """With so many more cache slots: layer by layer, so that only one layer's are held twice."""
        layers = list(state.cache.layers)
        for i, entry in enumerate(layers):
            if isinstance(entry, KeyValues):
                layers[i] = jax.block_until_ready(self.programs.grow(entry, slots))
                for x in jax.tree.leaves(entry):
                    x.delete()
        visible = jnp.pad(state.visible, ((0, 0), (0, slots)))
        return state.replace(cache=state.cache.replace(layers=tuple(layers)), visible=visible)

    def stream(
        self,
        variables: Variables,
        prompts: PromptBatch,
        keys: Key[Array, "B"],
        images: Float[Array, "B M W"] | None = None,
        *,
        every: int,
    ) -> Iterator[Completions]:
        """Completions of this process's rows after every so many tokens; the last ones are whole.

        Rows are decoded in groups of `sampling.decode_batch`; those of a later group are empty until its turn.
        """
        groups = group_count(prompts.text.ids.shape[0], self.sampling.decode_batch, mesh=self._mesh)
        whole: list[Completions] = []
        for group in range(groups):
            part: Any = (prompts, keys, images)
            if groups > 1:
                part = self.programs.take(part, jnp.int32(group), groups=groups)
            # The prompts' temporaries and the layers' own copy are the largest there are: never both at once.
            state = jax.block_until_ready(self.start(variables, *part))
            weights, is_over = self.weights(variables), False
            while not is_over:
                state = self.advance(weights, state, int(state.step) + every)
                is_over = int(state.step) >= self.sampling.max_tokens or bool(jnp.all(state.is_done))
                now = completions(state, self._mesh)
                yield interleave([*whole, now], groups=groups, parts=len(now.ids) // self._rows_each(state))
            whole.append(now)
            del weights, state  # before the next group's prompts

    def _rows_each(self, state: DecodeState) -> int:
        return state.tokens.shape[0] // shards_of(self._mesh)

    def __call__(
        self,
        variables: Variables,
        prompts: PromptBatch,
        keys: Key[Array, "B"],
        images: Float[Array, "B M W"] | None = None,
    ) -> Completions:
        """Samples a completion for every row; returns those of this process's rows."""
        variables = self.ready(variables)
        *_, last = self.stream(variables, prompts, keys, images, every=self.sampling.max_tokens)
        return last


def _doubling(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    """Those of the sizes below `most` that are at least twice the one before, and `most`."""
    out: list[int] = []
    for size in sorted(sizes):
        if size < most and (not out or size >= 2 * out[-1]):
            out.append(size)
    return (*out, most)


def interleave(done: Sequence[Completions], *, groups: int, parts: int) -> Completions:
    """Merges the completions of the first groups into the batch's row order; rows of later groups are empty.

    Args:
      parts: number of row shards that this process holds; each group has the next rows of every shard.
    """
    each = len(done[0].ids) // parts
    empty = Completions(((),) * (parts * each), ((),) * (parts * each))
    every = [*done, *[empty] * (groups - len(done))]
    rows = [(g, part * each + i) for part in range(parts) for g in range(groups) for i in range(each)]
    return Completions(ids=tuple(every[g].ids[i] for g, i in rows), logps=tuple(every[g].logps[i] for g, i in rows))


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
