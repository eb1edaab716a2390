"""Teachers of another size: the frozen weights that roles name, checked against the student and put on its mesh."""

import dataclasses
import pathlib
from typing import Any

from vigos_jax.data.tokenizer_files import open_image_processor, open_tokenizer
from vigos_jax.errors import InputError
from vigos_jax.method.roles import models_of
from vigos_jax.method.scoring import TeacherModel
from vigos_jax.models.config import ModelConfig
from vigos_jax.session import Session, objective_of, placed, resolve_model
from vigos_jax.weights import reading


def check_teachers(config) -> None:
    """Compares the models that roles name with the student's, without any weights.

    Raises:
      InputError: no such model, or one that reads other tokens or patches than the student.
    """
    if not (names := models_of(objective_of(config).roles)):
        return
    folder = resolve_model(config.model.path, weights=False)
    student, own = ModelConfig.load(folder), _settings(folder)
    for name, role in names.items():
        field = _field(role)
        folder = resolve_model(name, weights=False, field=field)
        check_dimensions(f"{field}={name!r}", ModelConfig.load(folder), student)
        _check_settings(f"{field}={name!r}", _settings(folder), own)


def with_teachers(session: Session, config) -> Session:
    """The session with the weights that roles name, each read once, quantised as the base is; see `check_teachers`."""
    others = {name: _load(name, role, session, config) for name, role in models_of(session.roles).items()}
    return dataclasses.replace(session, others=others)


def _field(role: str) -> str:
    return f"config.roles.{role}.model"


def _load(name: str, role: str, session: Session, config) -> TeacherModel:
    folder = resolve_model(name, field=_field(role))
    model_config = reading.load_config(folder)
    model = session.model.clone(config=model_config, lora=None)
    abstract, shardings = placed(config, model)
    options = {"dtype": model.dtype, "shardings": shardings["params"]}
    return TeacherModel(model, reading.load_params(folder, model_config, abstract["params"], **options))


def check_dimensions(where: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises InputError unless the teacher reads the student's packed tokens and patches as they are."""
    theirs, ours = _reads(teacher), _reads(student)
    _check(where, [(what, theirs[what], ours[what]) for what in ours])


def _reads(model: ModelConfig) -> dict[str, Any]:
    """The settings that packed sequences and patches depend on."""
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


def _settings(folder: pathlib.Path) -> tuple[dict[str, int], dict[str, Any]]:
    """A folder's vocabulary, and how it normalises pixels. Its chat template is not asked: turns are the student's."""
    images = open_image_processor(folder, ModelConfig.load(folder))
    pixels = {
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "rescale_factor": float(images.rescale_factor),
    }
    return open_tokenizer(folder).get_vocab(), pixels


def _check_settings(where: str, teacher: tuple[dict, dict], student: tuple[dict, dict]) -> None:
    """Raises InputError unless ids are the same tokens and patches the same pixels."""
    (theirs, their_pixels), (ours, own_pixels) = teacher, student
    if theirs != ours:
        different = {token for token, _ in theirs.items() ^ ours.items()}
        token = min(different, key=lambda t: (min(v[t] for v in (theirs, ours) if t in v), t))
        _check(where, [(f"vocabulary, and {token!r} is token", theirs.get(token, "none"), ours.get(token, "none"))])
    _check(where, [(what, their_pixels[what], own_pixels[what]) for what in own_pixels])


def _check(where: str, values: list[tuple[str, Any, Any]]) -> None:
    for what, its, own in values:
        if its != own:
            raise InputError(
                f"{where} must have the student's {what} {own!r}, and has {its!r}; choices: a model of the student's "
                "family and tokenizer, '' for the student's own base"
            )
