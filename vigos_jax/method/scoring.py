"""Student and teacher hidden states of a packed batch, and the scores of its supervised tokens."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax.numpy as jnp

from vigos_jax.method.batch import PrefixBatch, ScoreBatch, SupervisedStates, TeacherStates, TokenScores
from vigos_jax.method.losses import ObjectiveConfig, score_tokens, token_logps
from vigos_jax.method.token_weights import token_weights
from vigos_jax.models.shapes import AnyArray, Array, Float, Int, Key
from vigos_jax.models.variables import Variables, shares_vision, student_variables, teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel


class TeacherModel(flax.struct.PyTreeNode):
    """Frozen weights that some roles have in place of the student's base.

    Attributes:
      params: as the base is, in the model's dtype or quantised.
    """

    model: VisionLanguageModel = flax.struct.field(pytree_node=False)
    params: Any


NO_OTHERS: Mapping[str, TeacherModel] = MappingProxyType({})


def supervised_states(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    *,
    teacher_params: Variables | None = None,
    others: Mapping[str, TeacherModel] = NO_OTHERS,
    dropout_key: Key[AnyArray, ""] | None = None,
) -> SupervisedStates:
    """Runs the student sequences and all packed branches; returns the states that predict each supervised token.

    Gradients flow to `trained` only, not to the teachers or a shared vision tower. Heads with different numbers of rows
    are truncated to the smallest: all contain the tokenizer's ids, the rest is padding.

    Args:
      base: frozen parameters of the student and of the teachers that name no other model.
      trained: `{"lora": ...}`, `{"params": ...}`, or `{}` if the student is the base.
      teacher_params: parameters that replace or adapt the base for the teachers, from `teacher_params_of`, or None.
      others: the models that roles name, keyed by `TeacherRole.model`.
      dropout_key: applies the adapter's dropout to the student; None for none.
    """
    apply: Any = model.apply  # which returns what its method does
    teacher, student = teacher_variables(base, teacher_params or {}), student_variables(base, trained)
    rest: dict[str, Any] = {"deterministic": dropout_key is None}
    if dropout_key is not None:
        rest["rngs"] = {"dropout": dropout_key}
    images = batch.image_embeds
    if images is None and (batch.teacher is not None or shares_vision(trained)):
        images = apply(teacher, batch.vision, method="encode_images")
    # Adapters never cover the head: the student's differs only in full fine-tuning.
    teachers = _teachers(model, teacher, batch, images, others, has_head="params" in trained)
    student_images = images
    if not shares_vision(trained):
        student_images = apply(student, batch.vision, method="encode_images", **rest)
    student_hidden, _ = apply(student, batch.student, student_images, **rest)
    return SupervisedStates(
        student=_pick(student_hidden, batch.supervised.student_at),
        student_head=apply(student, method="head")[: _common_rows(model, others)],
        teachers=teachers,
    )


def score_batch(
    model: VisionLanguageModel,
    base: Any,
    trained: Variables,
    batch: ScoreBatch,
    objective: ObjectiveConfig,
    *,
    teacher_params: Variables | None = None,
    others: Mapping[str, TeacherModel] = NO_OTHERS,
) -> TokenScores:
    """Scores every supervised token, without a gradient. The other arguments: see `supervised_states`."""
    states = supervised_states(model, base, trained, batch, teacher_params=teacher_params, others=others)
    scores = score_tokens(states, batch.supervised, objective)
    return scores.replace(weight=token_weights(states, batch.supervised, objective))


def teacher_logps(
    model: VisionLanguageModel,
    base: Any,
    batch: ScoreBatch,
    objective: ObjectiveConfig,
    *,
    teacher_params: Variables,
    others: Mapping[str, TeacherModel] = NO_OTHERS,
) -> Float[Array, "B E"]:
    """Log-probability of every supervised token under its role alone; no student runs."""
    apply: Any = model.apply
    teacher = teacher_variables(base, teacher_params)
    images = None if batch.teacher is None else apply(teacher, batch.vision, method="encode_images")
    teachers = _teachers(model, teacher, batch, images, others, has_head=True)
    return token_logps(teachers, batch.supervised, objective)


def _common_rows(model: VisionLanguageModel, others: Mapping[str, TeacherModel]) -> int:
    """The least number of rows that a head has."""
    return min(m.config.vocab_size for m in (model, *(other.model for other in others.values())))


def _teachers(
    model: VisionLanguageModel,
    teacher: Variables,
    batch: ScoreBatch,
    images: Float[AnyArray, "B M W"] | None,
    others: Mapping[str, TeacherModel],
    *,
    has_head: bool,
) -> dict[str, TeacherStates]:
    """Each teacher model's states for the supervised tokens.

    Args:
      teacher: the variables of the roles that name no model.
      images: visual tokens of the rows' own images, for `batch.teacher`.
      has_head: whether to return those roles' head too; false if it is the student's.
    """
    supervised, rows, out = batch.supervised, _common_rows(model, others), {}
    models: dict[str, tuple[Any, Variables]] = {"": (model.apply, teacher)}
    models |= {name: (other.model.apply, teacher_variables(other.params, {})) for name, other in others.items()}
    hidden = {} if batch.teacher is None else {"": [models[""][0](teacher, batch.teacher, images)[0]]}
    for branches in batch.others:
        hidden.setdefault(branches.model, []).append(_hidden(*models[branches.model], branches))
    for name, parts in hidden.items():
        run, variables = models[name]
        states = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)  # what `teacher_at` counts
        out[name] = TeacherStates(
            hidden=_pick(states, supervised.teacher_at),
            head=run(variables, method="head")[:rows] if name or has_head else None,
            control=None if supervised.control_at is None else _pick(states, supervised.control_at),
        )
    return out


def _hidden(run: Any, variables: Variables, branches: PrefixBatch) -> Float[Array, "B T W"]:
    """The states of one prefix's branches."""
    if branches.vision is None:
        seen = jnp.zeros((branches.text.ids.shape[0], 0, 0))  # no visual token at all
    else:
        seen = run(variables, branches.vision, method="encode_images")
    return run(variables, branches.text, seen)[0]


def _pick(hidden: Float[AnyArray, "B T W"], at: Int[AnyArray, "B E"]) -> Float[Array, "B E W"]:
    return jnp.take_along_axis(hidden, at[:, :, None], axis=1)  # NaN beyond the end: a token of another model
