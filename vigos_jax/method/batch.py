"""The arrays of the method, from host to device. B batch, T tokens, M visual tokens, D model, E supervised tokens."""

import flax.struct

from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.shapes import Array, Bool, Float, Int


class SupervisedTokens(flax.struct.PyTreeNode):
    """Which student state is compared with which teacher state, under which role.

    A token that several roles score stands here once per role.

    Attributes:
      role: index into the role table, -1 for an unused slot.
      student_at: place in the student's sequence whose output predicts the token.
      teacher_at: the same in the packed sequences of the role's model, those of `ScoreBatch.others` after
        `ScoreBatch.teacher`.
      position: the token's place in the completion.
      token: its id.
      sampled_logp: log-probability under the sampler, NaN where the rollout came from elsewhere.
      clip: largest divergence the token contributes, infinity for no clip.
      control_at: as `teacher_at`, of the role's control, which sees no image; None where no role has one.
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
    """The branches of roles that see other images than the student, or have other weights, after those images.

    Attributes:
      vision: None where they see none.
      model: whose weights read them, `roles.Prefix.model`.
    """

    vision: VisionInputs | None
    text: TextInputs
    model: str = flax.struct.field(pytree_node=False, default="")


class ScoreBatch(flax.struct.PyTreeNode):
    """Everything the objective needs: images, the student's sequences, the teachers' branches, the supervised tokens.

    Attributes:
      teacher: branches of the roles with the student's base and images; None if there is no such role.
      others: branches of the others, one for each further prefix of `roles.prefixes_of`.
      vision: None where `image_embeds` serve student and teachers.
      image_embeds: visual tokens that are known already; else None.
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
    """What one model says of the supervised tokens; states of tokens whose role has another model mean nothing.

    Attributes:
      hidden: the states that predict each token.
      head: None if it is the student's: then one product serves both.
      control: the states of the roles' controls; None where no role has one.
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
      loss: of token weight * normalizer term * clipped divergence.
      normalizer, tokens, clipped_tokens: of the terms, of ones, of ones where the clip per token bites.
      entropy: of the student's entropy.
      squares: of squared token weights.
    """

    loss: Float[Array, "R"]
    normalizer: Float[Array, "R"]
    tokens: Float[Array, "R"]
    clipped_tokens: Float[Array, "R"]
    entropy: Float[Array, "R"]
    squares: Float[Array, "R"]
