"""The arrays of the method, from host to device. B batch, T tokens, M visual tokens, D model, E supervised tokens."""

import flax.struct

from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.shapes import Array, Bool, Float, Int


class SupervisedTokens(flax.struct.PyTreeNode):
    """Which student state is compared with which teacher state, under which role.

    A token that several roles score has one slot per role.

    Attributes:
      role: index into the role table, -1 for an unused slot.
      student_at: index in the student's sequence of the state that predicts the token.
      teacher_at: the same in the concatenated packed sequences of the role's model: `ScoreBatch.teacher`, then
        `ScoreBatch.others`.
      position: the token's index in the completion.
      token: its id.
      sampled_logp: log-probability under the sampler, NaN if the rollout has none.
      clip: largest divergence the token contributes, infinity for no clip.
      control_at: as `teacher_at`, for the role's control, which sees no image; None if no role has one.
    """

    role: Int[Array, "B E"]
    student_at: Int[Array, "B E"]
    teacher_at: Int[Array, "B E"]
    position: Int[Array, "B E"]
    token: Int[Array, "B E"]
    sampled_logp: Float[Array, "B E"]
    clip: Float[Array, "B E"]
    control_at: Int[Array, "B E"] | None = None


class PrefixBatch(flax.struct.PyTreeNode):
    """The packed branches after one prefix whose images or weights are not the student's.

    Attributes:
      vision: None if the prefix has no images.
      model: the model that runs the branches, see `roles.Prefix`.
    """

    vision: VisionInputs | None
    text: TextInputs
    model: str = flax.struct.field(pytree_node=False, default="")


class ScoreBatch(flax.struct.PyTreeNode):
    """Everything the objective needs: images, the student's sequences, the teachers' branches, the supervised tokens.

    Attributes:
      teacher: branches of the roles with the student's base and images; None if there is no such role.
      others: branches of all other roles, one entry per further prefix of `roles.prefixes_of`.
      vision: None if `image_embeds` serves student and teachers.
      image_embeds: precomputed visual tokens, or None.
    """

    vision: VisionInputs | None
    student: TextInputs
    teacher: TextInputs | None
    supervised: SupervisedTokens
    image_embeds: Float[Array, "B M W"] | None = None
    others: tuple[PrefixBatch, ...] = ()


class PromptBatch(flax.struct.PyTreeNode):
    """What the sampler needs: images and prompts.

    Attributes:
      is_active: false rows (bad data) produce no tokens.
    """

    vision: VisionInputs
    text: TextInputs
    is_active: Bool[Array, "B"]


class TeacherStates(flax.struct.PyTreeNode):
    """One model's states for the supervised tokens; meaningless for tokens whose role has another model.

    Attributes:
      hidden: the states that predict each token.
      head: None if it is the student's; one matrix product then serves both.
      control: the states of the roles' controls; None if no role has one.
    """

    hidden: Float[Array, "B E W"]
    head: Float[Array, "V W"] | None
    control: Float[Array, "B E W"] | None = None


class SupervisedStates(flax.struct.PyTreeNode):
    """What the heads are applied to; a state's logits are its products with a head's rows.

    Attributes:
      student: the states that predict each supervised token.
      teachers: by `TeacherRole.model`.
    """

    student: Float[Array, "B E D"]
    student_head: Float[Array, "V D"]
    teachers: dict[str, TeacherStates]


class TokenScores(flax.struct.PyTreeNode):
    """Per supervised token, float32.

    Attributes:
      divergence: the role's, before the clip per token.
      student_logp, teacher_logp: log-probabilities of the observed token, at temperature 1.
      entropy: of the student's distribution, at temperature 1.
      weight: by the role's rule, `token_weights`; its mean over a role's tokens of a rollout is 1.
    """

    divergence: Float[Array, "B E"]
    student_logp: Float[Array, "B E"]
    teacher_logp: Float[Array, "B E"]
    entropy: Float[Array, "B E"]
    weight: Float[Array, "B E"]


class RoleStats(flax.struct.PyTreeNode):
    """Sums per role over supervised tokens, float32; those of several micro-batches add up.

    Attributes:
      loss: sum of token weight * normalizer term * clipped divergence.
      normalizer: sum of normalizer terms.
      tokens, clipped_tokens: number of tokens, and of those whose divergence exceeds their clip.
      entropy: sum of the student's entropy.
      squares: sum of squared token weights.
    """

    loss: Float[Array, "R"]
    normalizer: Float[Array, "R"]
    tokens: Float[Array, "R"]
    clipped_tokens: Float[Array, "R"]
    entropy: Float[Array, "R"]
    squares: Float[Array, "R"]
