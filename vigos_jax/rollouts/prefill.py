"""The prompts' pass: from prompts and images to the state that the decoding loop starts from."""

import functools
from typing import Any

import flax.struct
import jax.numpy as jnp

from vigos_jax.method.batch import PromptBatch
from vigos_jax.models.attention_masks import Causal
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.kv_cache import Cache, KeyValues, key_values, slots_axis
from vigos_jax.models.shapes import Array, Bool, Float, Int, Key
from vigos_jax.models.variables import Variables
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.rollouts.sampling import Sampling


class DecodeState(flax.struct.PyTreeNode):
    """The loop's state. B rows, C = max_tokens, S cache slots, V vocabulary.

    Attributes:
      prompt_slots: static, cache slots of the prompt; the rest are for the completion.
      cache: what the layers keep of prompt and completion so far.
      visible: cache slots that hold a token of the prompt; completion slots become visible as written.
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
    cache: Cache
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


def prefill(
    model: VisionLanguageModel,
    sampling: Sampling,
    capacity: int,
    variables: Variables,
    prompts: PromptBatch,
    images: Float[Array, "B M W"],
    keys: Key[Array, "B"],
) -> DecodeState:
    """Runs the prompts.

    Args:
      capacity: cache slots for the completion.
      images: from `encode_images`.
      keys: one per row.
    """
    text, c = prompts.text, model.config
    apply: Any = functools.partial(model.apply, variables)  # which returns what its method does
    b, t = text.ids.shape
    rows, lengths = jnp.arange(b), jnp.sum(text.segment_ids > 0, -1)
    hidden, kept = apply(text, images, mask=Causal(lengths), keep=True)
    last = jnp.maximum(lengths - 1, 0)  # of a bad row, whose logits are not read
    wants_sets = sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0
    sets = jnp.zeros((b, c.vocab_size if wants_sets else 0), bool)
    return DecodeState(
        prompt_slots=t,
        cache=Cache(_entries(model, kept, capacity), jnp.int32(t)),
        visible=jnp.pad(text.segment_ids > 0, ((0, 0), (0, capacity))),
        logits=apply(hidden[rows, last], method="logits"),
        next_position=text.positions[rows, 0, last] + 1,  # the last token is text
        keys=keys,
        tokens=jnp.zeros((b, sampling.max_tokens), jnp.int32),
        logps=jnp.zeros((b, sampling.max_tokens), jnp.float32),
        lengths=jnp.zeros((b,), jnp.int32),
        is_done=~prompts.is_active,
        step=jnp.zeros((), jnp.int32),
        in_prompt=sets.at[rows[:, None], text.ids].max(text.segment_ids > 0) if wants_sets else sets,
        in_completion=sets,
    )


def _entries(model: VisionLanguageModel, kept: Any, capacity: int) -> tuple[Any, ...]:
    """Each layer's part of what the prompts' pass kept, keys and values in the cache's layout and with room."""
    c = model.config
    axis = slots_axis(model.attention, head_dim=c.head_dim, kv_heads=c.num_kv_heads, mesh=model.mesh)

    def entry(x: Any) -> Any:
        return key_values(x.k, x.v, axis=axis).padded(capacity) if isinstance(x, KeyValues) else x

    return tuple(entry(FAMILIES[c.family].layer_of(kept, i, c)) for i in range(c.num_layers))
