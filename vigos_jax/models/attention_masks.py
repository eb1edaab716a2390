"""Attention masks described by a few integers instead of a boolean [B, T, S] array.

`of` computes some rows of a mask, so that no kernel needs all of it; `dense` computes the whole, for tests and
drawings. The output of a query that attends to nothing (padding, an empty slot) is finite but meaningless.
"""

import flax.struct
import jax.numpy as jnp

from vigos_jax.models.shapes import AnyArray, Array, Bool, Int


class Causal(flax.struct.PyTreeNode):
    """Each row is one sequence, then padding: a query attends to itself and what comes before it.

    Attributes:
      lengths: int32 [B], tokens of each row; a row of none counts as one of a single token.
    """

    lengths: Int[AnyArray, "B"]

    def of(self, at: Int[Array, "t"], slots: int) -> Bool[Array, "B t {slots}"]:
        """The mask's rows `at`: queries by number."""
        key = jnp.arange(slots)
        return (at[:, None] >= key) & (key < jnp.maximum(self.lengths, 1)[:, None, None])

    def dense(self, length: int) -> Bool[Array, "B {length} {length}"]:
        """The whole mask."""
        return self.of(jnp.arange(length), length)


class Branches(flax.struct.PyTreeNode):
    """Packed rows, a prefix and branches after it: causal, within the own branch or the prefix, never padding.

    For segment_ids `1 1 2 2 3` (a prefix of two, branches of two and one):

        1 . . . .
        1 1 . . .
        1 1 1 . .
        1 1 1 1 .
        1 1 . . 1

    Attributes:
      segment_ids: int32 [B, T]; 1 the prefix, 2.. the branches, 0 padding.
      most: no row has more branches, and each row is its prefix, its branches in ascending order, then padding. None:
        neither is known, the mask may be any, and only XLA computes it.
      has_gaps: whether padding may stand in front of a branch, as layers that carry a state need it.
    """

    segment_ids: Int[AnyArray, "B T"]
    most: int | None = flax.struct.field(pytree_node=False, default=None)
    has_gaps: bool = flax.struct.field(pytree_node=False, default=True)

    def of(self, at: Int[Array, "t"], slots: int) -> Bool[Array, "B t {slots}"]:
        """The mask's rows `at`: queries by number, the last one again for numbers beyond it."""
        q = jnp.take(self.segment_ids, at, axis=1, mode="clip")[:, :, None]
        k = jnp.asarray(self.segment_ids)[:, None, :]
        return (at[:, None] >= jnp.arange(slots)) & (k > 0) & ((k == 1) | (k == q))

    def dense(self, length: int) -> Bool[Array, "B {length} {length}"]:
        """The whole mask; length: T."""
        return self.of(jnp.arange(length), length)


class Images(flax.struct.PyTreeNode):
    """Patch slots of several images in one row: a patch attends to all patches of its own image.

    Attributes:
      ids: int32 [B, S], image number from 1, 0 for an empty slot.
      most: no number is larger.
    """

    ids: Int[AnyArray, "B S"]
    most: int = flax.struct.field(pytree_node=False)

    def of(self, at: Int[Array, "t"], slots: int) -> Bool[Array, "B t {slots}"]:
        """The mask's rows `at`: queries by number, the last one again for numbers beyond it."""
        q, k = jnp.take(self.ids, at, axis=1, mode="clip")[:, :, None], jnp.asarray(self.ids)[:, None, :]
        return (q == k) & (k > 0) & (jnp.arange(slots) >= 0)

    def dense(self, length: int) -> Bool[Array, "B {length} {length}"]:
        """The whole mask; length: S."""
        return self.of(jnp.arange(length), length)


class Windows(flax.struct.PyTreeNode):
    """As `Images`, within windows: a patch attends to the patches of its image that lie in its window.

    Attributes:
      ids, most: see `Images`.
      window: slots of a window, a divisor of S.
    """

    ids: Int[AnyArray, "B S"]
    most: int = flax.struct.field(pytree_node=False)
    window: int = flax.struct.field(pytree_node=False)

    def numbers(self) -> Int[Array, "B S"]:
        """Pairs of window and image by number, from 1; 0 for an empty slot."""
        window = jnp.arange(self.ids.shape[1]) // self.window
        return jnp.where(jnp.asarray(self.ids) > 0, self.ids + window * self.most, 0)

    def of(self, at: Int[Array, "t"], slots: int) -> Bool[Array, "B t {slots}"]:
        """The mask's rows `at`: queries by number."""
        near = at[:, None] // self.window == jnp.arange(slots) // self.window
        return Images(self.ids, self.most).of(at, slots) & near

    def dense(self, length: int) -> Bool[Array, "B {length} {length}"]:
        """The whole mask; length: S."""
        return self.of(jnp.arange(length), length)


Described = Causal | Branches | Images | Windows


def visible(
    mask: Described | Bool[Array, "B T {slots}"], at: Int[Array, "t"], slots: int
) -> Bool[Array, "B t {slots}"]:
    """Rows `at` of a mask, described or dense."""
    if isinstance(mask, Described):
        return mask.of(at, slots)
    return mask if len(at) == mask.shape[1] else jnp.take(mask, at, axis=1, mode="clip")
