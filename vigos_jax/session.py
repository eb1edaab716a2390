"""From a config to everything a mode needs: mesh, model, processor, frozen base and trained weights."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vigos_jax.data.processor import Processor
from vigos_jax.data.sources import load_source
from vigos_jax.demo.source import DemoSource
from vigos_jax.demo.world import WORLDS
from vigos_jax.errors import InputError
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.packing import Buckets, pack_scores
from vigos_jax.method.roles import TeacherRole, role_table, views_of
from vigos_jax.method.rows import Rollout, Row
from vigos_jax.method.scoring import TeacherModel
from vigos_jax.models.attention import choose, has_fused
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.layers import LoraSpec
from vigos_jax.models.quantization import quantised_shapes
from vigos_jax.models.variables import Variables, cast_floats, student_variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables, init_variables
from vigos_jax.runtime import distributed, hub
from vigos_jax.runtime.paths import absolute
from vigos_jax.runtime.progress import say
from vigos_jax.runtime.sharding import batch_sharding, make_mesh, own_rows, tree_shardings
from vigos_jax.weights import adapters, reading

_JAX_CONFIG: Any = jax.config  # its options are not among its annotations
_DEMOS = ", ".join(WORLDS)
_USERS_PRECISION = _JAX_CONFIG.jax_default_matmul_precision  # what the environment says, if anything


@dataclasses.dataclass(frozen=True)
class Session:
    """A model ready to run, with what a run does with it.

    Attributes:
      name: what to call the base model elsewhere: the config's hub id, or the folder's absolute path.
      folder: the base model's local folder.
      base: the frozen parameters, in the config's dtype or quantised.
      trained: `{"lora": ...}` or `{"params": ...}` in float32, or `{}`: the base is its own student.
      others: the models that roles name, by name, once `teachers.with_teachers` has read them.
    """

    name: str
    folder: pathlib.Path
    config: ModelConfig
    model: VisionLanguageModel
    processor: Processor
    objective: ObjectiveConfig
    buckets: Buckets
    span_rule: str
    mesh: Mesh
    base: Any
    trained: Variables
    others: dict[str, TeacherModel] = dataclasses.field(default_factory=dict)

    @property
    def roles(self) -> tuple[TeacherRole, ...]:
        """The role table."""
        return self.objective.roles

    def student(self, trained: Variables | None = None) -> Variables:
        """The variables the student is applied with; `trained` instead of what was loaded, `{}` for the base."""
        return student_variables(self.base, self.trained if trained is None else trained)

    def whole_batch(self, size: int) -> int:
        """`size` rounded up to a number of rows that the mesh can split."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-size // shards) * shards

    def own_rows(self, size: int) -> list[int]:
        """Which rows of a global batch of `size` this process reads and puts on the mesh."""
        return own_rows(self.mesh, size)

    def pack_scores(
        self, rows: Sequence[Row], rollouts: Sequence[Rollout | None], *, with_images: bool = True
    ) -> ScoreBatch:
        """See `packing.pack_scores`; host arrays."""
        options = {"roles": self.roles, "config": self.config, "buckets": self.buckets}
        return pack_scores(rows, rollouts, **options, with_images=with_images)

    def put_batch(self, batch: Any) -> Any:
        """Host arrays of this process's rows to the mesh, rows over its data axes."""
        return put_batch(batch, self.mesh)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places this process's rows of a batch; all processes' rows together are the global batch."""
    sharding = batch_sharding(mesh)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):  # it is there
            return x
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(put, batch)


def resolve_model(path: str, *, weights: bool = True, field: str = "config.model.path") -> pathlib.Path:
    """A local folder for a folder, a hub id or a world of the demo.

    Args:
      weights: fetch them too, where the hub has them.
      field: what errors call the path.

    Raises:
      InputError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if path in WORLDS:
        return WORLDS[path].base
    folder = pathlib.Path(path).expanduser()
    if path and folder.is_dir():
        return pathlib.Path(absolute(folder))
    if folder.is_absolute() or not hub.REPOSITORY.fullmatch(path):
        raise InputError(f"{field}={path!r} is not a folder; choices: a folder, owner/name on the hub, {_DEMOS}")
    import huggingface_hub

    try:
        patterns = ["*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*", "NOTICE*"]
        patterns += ["*.safetensors"] if weights else []
        return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except Exception as e:
        raise InputError(
            f"{field}={path!r} is not a folder and cannot be fetched from the hub: {hub.reason(e)}; "
            f"choices: a model folder, owner/name on the hub, {_DEMOS}"
        ) from e


def lora_spec(config, model: ModelConfig) -> LoraSpec | None:
    """The adapters of a run, from the adapter folder if given, else `config.lora`; None for full fine-tuning."""
    if config.model.adapter:
        folder = pathlib.Path(config.model.adapter).expanduser()
        if not (folder / "adapter_model.safetensors").is_file():
            raise InputError(f"config.model.adapter={str(folder)!r} must be a folder with adapter_model.safetensors")
        return adapters.adapter_spec(folder, dropout=config.lora.dropout)
    if not config.lora.rank:
        return None
    family = FAMILIES[model.family]
    vision = family.vision_adapters if config.lora.scope == "official" else ()
    return LoraSpec(
        rank=config.lora.rank,
        scale=config.lora.alpha / config.lora.rank,
        dropout=config.lora.dropout,
        language=frozenset(family.language_adapters),
        vision=frozenset(vision),
    )


def view_columns(config) -> tuple[str, ...]:
    """The columns of the data that the images of roles come from."""
    views = views_of(objective_of(config).roles)
    return tuple(dict.fromkeys(view.column for view in views if view.column))


def open_source(config) -> Any:
    """The rows of `config.data`; InputError if they cannot be used, or lack a column that a role shows."""
    columns = view_columns(config)
    if config.data.source not in WORLDS:
        return load_source(config.data, columns=columns)
    if columns:
        raise InputError(
            f"config.roles has image_column={columns[0]!r}; it must be '', as the demo's rows have no such column; "
            "choices of image: original, none, blank, resized, shuffled"
        )
    if config.data.fields:
        fields = ", ".join(config.data.fields)
        raise InputError(
            f"config.data.fields names {fields}; it must be (), as the demo's rows have problem and answer only"
        )
    return DemoSource(config.data.source, seed=config.seed, blank=config.data.blank_images)


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk, in `folder` unless the environment names another; "" keeps none."""
    if folder and not _JAX_CONFIG.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def model_of(
    config, model_config: ModelConfig, mesh: Mesh, *, platform: str, is_served: bool = True
) -> VisionLanguageModel:
    """The model that a config asks for, without weights. platform, is_served: see `attention.choose`."""
    dtype = jnp.dtype(config.model.dtype)
    # By default accelerators multiply float32 at lower precision. A bfloat16 model loaded after a float32 one needs
    # the user's setting restored: TPU kernels reject "float32".
    jax.config.update("jax_default_matmul_precision", "float32" if dtype == jnp.float32 else _USERS_PRECISION)
    return VisionLanguageModel(
        model_config,
        lora=lora_spec(config, model_config),
        dtype=dtype,
        remat=config.model.remat,
        attention=choose(config.model.attention, platform=platform, dtype=dtype, is_served=is_served),
        mesh=mesh,
    )


def load(config, *, for_training: bool) -> Session:
    """Checks the config's parts against each other and loads the model onto the mesh.

    Args:
      for_training: create trainable float32 weights: a new adapter, a loaded one or, without an adapter, a full copy
        of the base. Otherwise `Session.trained` is a loaded adapter, or `{}` for the base itself.
    """
    objective = objective_of(config)
    buckets = buckets_of(config)
    use_compilation_cache(config.compilation_cache)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    folder = resolve_model(config.model.path)
    model_config = reading.load_config(folder)
    processor = Processor.load(folder, chat_template_kwargs=config.model.chat_template_kwargs.to_dict())
    check_template(config, processor, for_training=for_training)
    is_served = has_fused(mesh.devices.flat[0])
    model = model_of(config, model_config, mesh, platform=jax.default_backend(), is_served=is_served)
    dtype, spec = model.dtype, model.lora
    check_quantization(config, spec, for_training=for_training)
    abstract, shardings = placed(config, model)
    base = reading.load_params(folder, model_config, abstract["params"], dtype=dtype, shardings=shardings["params"])

    if config.model.adapter:
        assert spec is not None  # `lora_spec` reads the adapter's own
        adapter = pathlib.Path(config.model.adapter).expanduser()
        lora = adapters.load_adapter(adapter, model_config, spec, abstract["lora"], shardings=shardings["lora"])
        trained = {"lora": lora}
    elif not for_training:
        trained = {}
    elif spec is not None:
        init = jax.jit(functools.partial(_fresh_lora, model), out_shardings=shardings["lora"])
        trained = {"lora": init(jax.random.fold_in(jax.random.key(config.seed), 1))}
    else:
        copy = functools.partial(cast_floats, dtype=jnp.float32)
        trained = {"params": jax.jit(copy, out_shardings=shardings["params"])(base)}
    is_local = config.model.path in WORLDS or pathlib.Path(config.model.path).expanduser().is_dir()
    name = str(folder) if is_local else config.model.path
    return Session(
        name, folder, model_config, model, processor, objective, buckets, config.span_rule, mesh, base, trained
    )


def placed(config, model: VisionLanguageModel) -> tuple[Variables, Variables]:
    """Shapes of the model's variables, the base quantised if the config says so, and their shardings on its mesh."""
    abstract = abstract_variables(model)
    abstract = {**abstract, "params": quantised_shapes(abstract["params"], config.model.quantization)}
    assert model.mesh is not None  # `model_of` gives it one
    return abstract, tree_shardings(abstract, model.mesh, config.mesh.rules)


def check_quantization(config, spec: LoraSpec | None, *, for_training: bool) -> None:
    """Raises InputError if a quantised base would be trained: codes have neither gradients nor a moving average."""
    kind = config.model.quantization
    if kind != "none" and for_training and spec is None:
        raise InputError(
            f"config.model.quantization={kind} needs an adapter to train, and config.lora.rank=0 trains all weights; "
            "choices: config.lora.rank above 0, config.model.adapter, config.model.quantization=none"
        )


def check_template(config, processor: Processor, *, for_training: bool) -> None:
    """Logs what the chat template puts in front of answers; InputError if a run's prompts do not fit it."""
    if for_training:
        for prompt in config.prompts.values():
            processor.encode_turn(user_text="", grids=(), assistant_prefill=prompt.assistant_prefill)
    behind = processor.behind_header
    if behind or processor.template_switches:
        switches = ", ".join(f"{name}={value!r}" for name, value in processor.template_switches.items())
        say(
            f"the chat template puts {repr(behind) if behind else 'nothing'} behind the assistant's header "
            f"(config.model.chat_template_kwargs: {switches or 'none'})"
        )


def _fresh_lora(model: VisionLanguageModel, key: jax.Array) -> Variables:
    return init_variables(model, key)["lora"]


def buckets_of(config) -> Buckets:
    """The declared sizes of `config.buckets`, the same one in all processes."""
    b = config.buckets
    sizes = (tuple(x) for x in (b.patches, b.prompt, b.completion, b.sequence))
    return Buckets(*sizes, agree=distributed.largest)


def objective_of(config) -> ObjectiveConfig:
    """The loss of `config.loss` over the roles of `config.roles`; InputError where a role is wrong."""
    roles = role_table(config.roles, config.prompts, data_fields=tuple(config.data.fields))
    return ObjectiveConfig(roles, config.loss.chunk, config.loss.temperature, config.loss.reduction)


def trained_shapes(session: Session, *, rules: Any) -> Variables:
    """Shapes and shardings of what a run of this model trains: what its checkpoints are restored onto."""
    abstract = abstract_variables(session.model)
    part = "params" if session.model.lora is None else "lora"
    tree = {part: abstract[part]}
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, tree, tree_shardings(tree, session.mesh, rules))
