"""The arrays of the method, from host to device. B batch, T tokens, M visual tokens, D model, E supervised tokens."""

import flax.struct
import jax

from vigos_jax.models.inputs import TextInputs, VisionInputs

Array = jax.Array


@flax.struct.dataclass
class SupervisedTokens:
    """Which student state is compared with which teacher state, under which role; int32 [B, E] unless stated.

    A token that several roles score stands here once per role.

    Attributes:
      role: index into the role table, -1 for an unused slot.
      student_at: place in the student's sequence whose output predicts the token.
      teacher_at: the same in the packed teacher sequence.
      position: the token's place in the completion.
      token: its id.
      sampled_logp: float32, log-probability under the sampler, NaN where the rollout came from elsewhere.
      clip: float32, largest divergence the token contributes, infinity for no clip.
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
    """Everything the objective needs: images, the student's sequences, the teachers' branches, the supervised tokens.

    Attributes:
      vision: None where `image_embeds` serve student and teachers.
      image_embeds: [B, M, D], visual tokens that are known already; else None.
    """

    vision: VisionInputs | None
    student: TextInputs
    teacher: TextInputs
    supervised: SupervisedTokens
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
