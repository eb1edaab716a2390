"""A config's run as shapes with shardings, on devices that need not be here: what `--mode plan` compiles."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vigos_jax.demo.world import WORLDS
from vigos_jax.errors import InputError
from vigos_jax.method.batch import PrefixBatch, PromptBatch, ScoreBatch, SupervisedTokens
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.roles import (
    OWN,
    Prefix,
    TeacherRole,
    branches_per_rollout,
    models_of,
    prefixes_of,
    roles_per_token,
)
from vigos_jax.method.scoring import TeacherModel
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.published_configs import published_config
from vigos_jax.models.variables import cast_floats, shares_vision, student_variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables
from vigos_jax.plan.devices import Topology
from vigos_jax.runtime.sharding import batch_sharding, check_batch, make_mesh, replicated, tree_shardings
from vigos_jax.session import buckets_of, check_quantization, model_of, objective_of, placed
from vigos_jax.teachers import check_dimensions
from vigos_jax.training.step import TrainState, make_optimizer
from vigos_jax.weights.reading import load_config


def model_config_of(path: str) -> ModelConfig:
    """The model config of `config.model.path`, without network access: the folder's own, else the published one."""
    folder = WORLDS[path].base if path in WORLDS else pathlib.Path(path).expanduser()
    return load_config(folder) if folder.is_dir() else ModelConfig.from_hf(published_config(path))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Planned array sizes per row: patch slots, and visual, prompt, completion, student and teacher tokens.

    Attributes:
      teachers: (prefix, patch slots, tokens) per prefix of the roles; 0 slots for a prefix without images.
    """

    patches: int
    visual: int
    prompt: int
    completion: int
    student: int
    teachers: tuple[tuple[Prefix, int, int], ...]

    def json(self) -> dict[str, int]:
        """The teachers' tokens summed over their prefixes."""
        sizes = {name: getattr(self, name) for name in ("patches", "visual", "prompt", "completion", "student")}
        return sizes | {"teacher": sum(tokens for *_, tokens in self.teachers)}


def sizes_of(config, model: ModelConfig, roles: tuple[TeacherRole, ...]) -> Sizes:
    """Bucket sizes for a row of `config.plan`, assuming every role's prompt has as much text as the student's.

    An upper bound for completions of that length: the teachers' sequence holds all of it for every role that may score.
    """
    p = config.plan
    buckets = buckets_of(config)
    v = model.vision

    patches = math.ceil(buckets.fit("patches", p.patches) / v.window_patches) * v.window_patches
    visual = p.patches // v.merge_unit
    if p.prompt < visual:
        raise InputError(
            f"config.plan.prompt={p.prompt} must hold the {visual} visual tokens of config.plan.patches={p.patches}"
        )
    if p.completion > config.sampling.max_tokens:
        raise InputError(
            f"config.plan.completion={p.completion} must be at most config.sampling.max_tokens="
            f"{config.sampling.max_tokens}"
        )
    branch = p.prompt - visual + p.completion

    def teachers(prefix: Prefix) -> tuple[Prefix, int, int]:
        view = prefix.view
        seen = p.patches if view.kind != "none" else 0
        if view.pixels:  # limits the tokens only; the slots are those of the row's own images
            seen = min(seen, max(v.merge_unit, view.pixels // v.patch_size**2))
        branches = branches_per_rollout(prefix, roles)
        parts = (seen // v.merge_unit, *[branch] * (branches - 1))
        aligned = sum(math.ceil(n / model.chunk) * model.chunk for n in parts)
        return prefix, patches if seen else 0, buckets.fit("sequence", aligned + branch)

    planned = [teachers(prefix) for prefix in prefixes_of(roles)]
    longest = max(tokens for *_, tokens in planned)  # as `pack_scores` has one length for all
    return Sizes(
        patches=patches,
        visual=patches // v.merge_unit,
        prompt=buckets.fit("prompt", p.prompt),
        completion=buckets.fit("completion", p.completion),
        student=buckets.fit("sequence", p.prompt + p.completion),
        teachers=tuple((prefix, used, longest) for prefix, used, _ in planned),
    )


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A config's run as shapes with shardings; no array is allocated.

    Attributes:
      state: TrainState.
      student: variables as the sampler reads them.
      others: the models that roles name.
    """

    config: Any
    model: VisionLanguageModel
    objective: ObjectiveConfig
    sizes: Sizes
    tx: Any
    base: Any
    state: TrainState
    student: Any
    others: dict[str, TeacherModel]

    @property
    def mesh(self) -> Mesh:
        """The mesh over the planned devices."""
        assert self.model.mesh is not None  # `describe` gives it one
        return self.model.mesh

    def rows(self, dtype: Any, *shape: int) -> Any:
        """A ShapeDtypeStruct in place of an array of a batch, rows over the mesh."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(self.mesh))

    def whole(self, dtype: Any, *shape: int) -> Any:
        """A ShapeDtypeStruct in place of an array that every device holds whole."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def text(self, rows: int, length: int, *, branches: int | None = None) -> TextInputs:
        """Sequences of `length` tokens. branches: see `TextInputs`."""
        int32 = functools.partial(self.rows, jnp.int32, rows)
        return TextInputs(int32(length), int32(3, length), int32(length), int32(length), branches)

    def vision(self, rows: int, slots: int = 0) -> VisionInputs:
        """The rows' images. slots: of a role's view; 0 for the rows' own."""
        int32, s, v = (
            functools.partial(self.rows, jnp.int32, rows),
            slots or self.sizes.patches,
            self.model.config.vision,
        )
        patches = self.rows(jnp.float32, rows, s, v.patch_dim)
        return VisionInputs(patches, int32(s), int32(s, 2), int32(s, 2), int32(s // v.merge_unit))

    def images(self, rows: int) -> Any:
        """The rows' visual tokens, DeepStack's features beside them: [B, M, (1 + n) D]."""
        c = self.model.config
        width = (1 + len(c.vision.deepstack_blocks)) * c.hidden_size
        return self.rows(self.model.dtype, rows, self.sizes.visual, width)

    def prompts(self, rows: int) -> PromptBatch:
        """What the sampler starts from."""
        return PromptBatch(self.vision(rows), self.text(rows, self.sizes.prompt), self.rows(jnp.bool_, rows))

    def scores(self, rows: int) -> ScoreBatch:
        """One micro-batch, with visual tokens or images as training has them."""
        e = self.sizes.completion * roles_per_token(self.objective.roles)
        int32, float32 = self.rows(jnp.int32, rows, e), self.rows(jnp.float32, rows, e)
        is_known = shares_vision(self.state.trained)
        control = int32 if any(role.has_control for role in self.objective.roles) else None
        own, others = None, []
        for prefix, slots, tokens in self.sizes.teachers:
            text = self.text(rows, tokens, branches=branches_per_rollout(prefix, self.objective.roles))
            if prefix == OWN:
                own = text
            else:
                others.append(PrefixBatch(self.vision(rows, slots) if slots else None, text, prefix.model))
        return ScoreBatch(
            vision=None if is_known else self.vision(rows),
            student=self.text(rows, self.sizes.student, branches=0),
            teacher=own,
            others=tuple(others),
            supervised=SupervisedTokens(int32, int32, int32, int32, int32, float32, float32, control),
            image_embeds=self.images(rows) if is_known else None,
        )


def describe(config, target: Topology) -> AbstractRun:
    """The run on these devices.

    Raises:
      InputError: the mesh does not divide the devices, the model or the batch, or a size is beyond its buckets.
    """
    mesh = make_mesh(
        data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor, devices=list(target.devices)
    )
    check_batch(mesh, batch_size=config.batch_size, micro_batches=config.gradient_accumulation_steps)
    objective = objective_of(config)
    model_config = model_config_of(config.model.path)
    if not target.has_fused_attention and config.model.attention not in ("auto", "xla"):
        raise InputError(
            f"config.model.attention={config.model.attention!r} does not run on {target.name}; choices: auto, xla"
        )
    # A CPU's choice is XLA's attention.
    model = model_of(config, model_config, mesh, platform=target.platform, is_served=target.has_fused_attention)
    place = functools.partial(_placed, mesh=mesh, rules=config.mesh.rules)
    check_quantization(config, model.lora, for_training=True)
    base, abstract = _frozen(config, model), abstract_variables(model)
    part = "params" if model.lora is None else "lora"
    trained = place({part: abstract[part]}, dtype=jnp.float32)
    tx, _ = make_optimizer(config.optimizer, steps=config.steps)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    opt_state = place(jax.eval_shape(tx.init, trained))
    state = TrainState(step, trained, opt_state, trained if config.teacher.weights == "ema" else {})
    student = student_variables(base, trained)
    student = {**student, "params": place({"params": student["params"]}, dtype=model.dtype)["params"]}
    sizes = sizes_of(config, model_config, objective.roles)
    others = {path: _teacher(config, model, path, name) for path, name in models_of(objective.roles).items()}
    return AbstractRun(config, model, objective, sizes, tx, base, state, student, others)


def _frozen(config, model: VisionLanguageModel) -> Any:
    """A base as a run holds it on its mesh, in the model's dtype or quantised."""
    shapes, _ = placed(config, model)
    base = {"params": shapes["params"]}
    return _placed(base, mesh=model.mesh, rules=config.mesh.rules, dtype=model.dtype)["params"]


def _teacher(config, student: VisionLanguageModel, path: str, role: str) -> TeacherModel:
    model_config = model_config_of(path)
    check_dimensions(f"config.roles.{role}.model={path!r}", model_config, student.config)
    model = student.clone(config=model_config, lora=None)
    return TeacherModel(model, _frozen(config, model))


def _placed(tree: Any, *, mesh: Any, rules: Any, dtype: Any = None) -> Any:
    """Shapes with their shardings, in another dtype if asked."""
    if dtype is not None:
        tree = jax.eval_shape(functools.partial(cast_floats, dtype=dtype), tree)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, tree, tree_shardings(tree, mesh, rules))


def device_bytes(tree: Any) -> int:
    """Bytes on one device of shapes with shardings."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    return sum(size(x) for x in jax.tree.leaves(tree))
