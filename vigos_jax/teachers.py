"""Teachers of another size: the frozen weights that roles name, checked against the student and put on its mesh."""

import dataclasses
from typing import Any

import numpy as np

from vigos_jax.data.processor import Processor
from vigos_jax.errors import InputError
from vigos_jax.method.roles import models_of
from vigos_jax.method.scoring import TeacherModel
from vigos_jax.models.config import ModelConfig
from vigos_jax.session import Session, placed, resolve_model
from vigos_jax.weights import reading


def with_teachers(session: Session, config) -> Session:
    """The session with the weights that roles name, each read once, quantised as the base is.

    Raises:
      InputError: no such model, or one that cannot read what the student reads; see `check_dimensions`.
    """
    others = {name: _load(name, session, config) for name in models_of(session.roles)}
    return dataclasses.replace(session, others=others)


def _load(name: str, session: Session, config) -> TeacherModel:
    field = f"config.roles.{models_of(session.roles)[name]}.model"
    folder = resolve_model(name, field=field)
    model_config = reading.load_config(folder)
    check_dimensions(f"{field}={name!r}", model_config, session.config)
    processor = Processor.load(folder, chat_template_kwargs=config.model.chat_template_kwargs.to_dict())
    _check_processor(f"{field}={name!r}", processor, session.processor)
    model = session.model.clone(config=model_config, lora=None)
    abstract, shardings = placed(config, model)
    options = {"dtype": model.dtype, "shardings": shardings["params"]}
    return TeacherModel(model, reading.load_params(folder, model_config, abstract["params"], **options))


def check_dimensions(where: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises InputError unless the teacher reads the student's packed tokens and patches as they are."""
    theirs, ours = _reads(teacher), _reads(student)
    _check(where, [(what, theirs[what], ours[what]) for what in ours])


def _reads(model: ModelConfig) -> dict[str, Any]:
    """What packing makes sequences and patches by."""
    v = model.vision
    return {
        "model_type": model.family,
        "image token": model.image_token_id,
        "video token": model.video_token_id,
        "patch_size": v.patch_size,
        "temporal_patch_size": v.temporal_patch_size,
        "spatial_merge_size": v.spatial_merge_size,
        "window_size": v.window_size,
        "tokens_per_second": v.tokens_per_second,
    }


def _check_processor(where: str, teacher: Processor, student: Processor) -> None:
    """Raises InputError unless ids are the same tokens and patches the same pixels."""
    theirs, ours = (p.tokenizer.get_vocab() for p in (teacher, student))
    if theirs != ours:
        different = {token for token, _ in theirs.items() ^ ours.items()}
        token = min(different, key=lambda t: (min(v[t] for v in (theirs, ours) if t in v), t))
        _check(where, [(f"vocabulary, and {token!r} is token", theirs.get(token, "none"), ours.get(token, "none"))])
    numbers = zip(teacher.normalization, student.normalization, strict=True)
    for what, (a, b) in zip(("image_mean", "image_std", "rescale_factor"), numbers, strict=True):
        _check(where, [(what, np.asarray(a).tolist(), np.asarray(b).tolist())])


def _check(where: str, values: list[tuple[str, Any, Any]]) -> None:
    for what, its, own in values:
        if its != own:
            raise InputError(
                f"{where} must have the student's {what} {own!r}, and has {its!r}; choices: a model of the student's "
                "family and tokenizer, '' for the student's own base"
            )
