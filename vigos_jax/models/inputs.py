"""The arrays that cross from host to device. B batch, S patch slots, M visual tokens, T tokens, E entries per row."""

import flax.struct
import jax

Array = jax.Array


@flax.struct.dataclass
class VisionInputs:
    """The images of each row, laid out in window slots (see `geometry.VisionLayout`).

    Attributes:
      patches: float [B, S, patch_dim], zeros in empty slots.
      image_ids: int32 [B, S], frame number from 1, 0 in empty slots.
      hw: int32 [B, S, 2], patch row and column.
      grid: int32 [B, S, 2], rows and columns of the patch's image.
      token_unit: int32 [B, M], the slot group of each visual token in reading order (0 past the row's last).
    """

    patches: Array
    image_ids: Array
    hw: Array
    grid: Array
    token_unit: Array


@flax.struct.dataclass
class TextInputs:
    """Token sequences, one per row; several branches may share one row behind a common prefix.

    Attributes:
      ids: int32 [B, T].
      positions: int32 [B, 3, T], M-RoPE positions.
      segment_ids: int32 [B, T]; 0 padding, 1 the shared prefix (or the whole sequence), 2.. the branches behind it.
      image_index: int32 [B, T], which visual token of the row stands here, -1 for text.
    """

    ids: Array
    positions: Array
    segment_ids: Array
    image_index: Array


@flax.struct.dataclass
class Entries:
    """The supervised entries: which student state is compared with which teacher state, under which role.

    Attributes:
      role: int32 [B, E], index into the role table, -1 for an unused slot.
      student_at: int32 [B, E], token of the student sequence whose output predicts the supervised token.
      teacher_at: int32 [B, E], the same in the packed teacher sequence.
      position: int32 [B, E], the supervised token's place in the completion.
      token: int32 [B, E], the supervised token's id.
      sampled_logp: float32 [B, E], log-probability under the sampler, NaN where the rollout came from elsewhere.
      clip: float32 [B, E], largest divergence the entry contributes, infinity for no clip.
    """

    role: Array
    student_at: Array
    teacher_at: Array
    position: Array
    token: Array
    sampled_logp: Array
    clip: Array


@flax.struct.dataclass
class ScoreBatch:
    """Everything the objective needs: images, the student's sequences, the teachers' branches, the entries.

    Attributes:
      vision: None where `image_embeds` serve student and teachers.
      image_embeds: [B, M, D], visual tokens that are known already; else None.
    """

    vision: VisionInputs | None
    student: TextInputs
    teacher: TextInputs
    entries: Entries
    image_embeds: Array | None = None


@flax.struct.dataclass
class PromptBatch:
    """What the sampler needs: images and left-padded prompts.

    Attributes:
      is_active: bool [B]; false rows (bad data) produce no tokens.
    """

    vision: VisionInputs
    text: TextInputs
    is_active: Array
