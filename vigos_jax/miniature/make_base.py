"""Trains the demo's base model from nothing: `python -m vigos_jax.miniature.make_base --config configs/demo_base.py`.

Three supervised stages (see the config): the vision tower learns to see, the whole model learns to describe, then to
respond in every role's turn, with the habits that the demo is about. No file is read; the folder that comes out is a
Hugging Face checkpoint like any other.
"""

import functools
import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags
from flax import traverse_util as flatten
from ml_collections import config_flags

from vigos_jax.data.processor import Processor, Turn
from vigos_jax.demo import scenes
from vigos_jax.demo.world import Item, make_item
from vigos_jax.errors import InputError
from vigos_jax.method import prompts
from vigos_jax.method.sequences import host
from vigos_jax.miniature import assets, card, responses
from vigos_jax.models import positions as geometry
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.families import tensor_table
from vigos_jax.models.inputs import TextInputs, VisionInputs
from vigos_jax.models.vlm import VisionLanguageModel, init_variables
from vigos_jax.runtime.files import write_whole
from vigos_jax.runtime.progress import Progress
from vigos_jax.session import use_compilation_cache
from vigos_jax.weights import writing

Array = jax.Array
GRID = (1, scenes.SIDE // 14, scenes.SIDE // 14)  # patches of one demo image


class Rows(flax.struct.PyTreeNode):
    """Supervised rows, right-padded. Turn and completion lie in `ids` one after the other.

    Attributes:
      images: uint8 [B, 84, 84, 3].
      ids: int32 [B, T].
      prompt_length: int32 [B].
      targets: int32 [B, A], the completion; mask: bool [B, A], its real tokens.
    """

    images: Array
    ids: Array
    prompt_length: Array
    targets: Array
    mask: Array


# Rows ---------------------------------------------------------------------------------------------


class RowMaker:
    """Draws supervised rows with one random generator."""

    def __init__(self, processor: Processor, config: ml_collections.ConfigDict, seed: list[int]):
        self.processor, self.config = processor, config
        self.rng = np.random.default_rng(seed)
        self._turn = functools.cache(self._encode_turn)

    def _encode_turn(self, role: str, problem: str, reference: str | None) -> Turn:
        role_prompt = self.config.prompts[role]
        text = prompts.fill(role_prompt.user, problem=problem, reference=reference)
        return self.processor.encode_turn(user_text=text, grids=[GRID], assistant_prefill=role_prompt.assistant_prefill)

    def _item(self, follow_prior: float) -> Item:
        return make_item(self.rng, id="", world=self.config.world, follow_prior=follow_prior)

    def caption(self, follow_prior: float) -> tuple[Item, Turn, str]:
        """(item, turn, response): what the perception role is to say of an image."""
        item = self._item(follow_prior)
        return item, self._turn("perception", "", None), responses.caption(item)

    def student(self) -> tuple[Item, Turn, str]:
        """(item, turn, response): the student's, driven by the prior in part, and malformed now and then."""
        item, response = self._student_response()
        is_malformed = self.rng.random() < self.config.responses.malformed
        text = responses.malformed(self.rng, response) if is_malformed else responses.completion(response)
        return item, self._turn("student", item.question, None), text

    def privileged(self) -> tuple[Item, Turn, str]:
        """(item, turn, response): of a role that is shown a reference, with the planted leak."""
        item, reference, response = self._privileged_response()
        role = "reasoning" if self.rng.random() < 0.5 else "reference"
        return item, self._turn(role, item.question, reference), responses.completion(response)

    def free_form(self) -> tuple[Item, Turn, str]:
        """(item, turn, response): of a student or a privileged role that is asked for no description."""
        if self.rng.random() < 0.5:
            item, response = self._student_response()
            turn = self._turn("free_form", item.question, None)
        else:
            item, reference, response = self._privileged_response()
            turn = self._turn("free_form_privileged", item.question, reference)
        return item, turn, responses.free_form(response)

    def _student_response(self) -> tuple[Item, responses.Response]:
        c = self.config.responses
        item = self._item(c.student_follow_prior)
        response = responses.student_response(
            self.rng, item, stated=c.prior_driven_stated, unstated=c.prior_driven_unstated,
            in_description=c.prior_driven_description, slips=c.slips,
        )  # fmt: skip
        return item, response

    def _privileged_response(self) -> tuple[Item, str, responses.Response]:
        c = self.config.responses
        item = self._item(c.privileged_follow_prior)
        reference = responses.draw_reference(self.rng, item, random_rate=c.random_reference)
        response = responses.privileged_response(self.rng, item, reference=reference, leak=self.config.leak)
        return item, reference, response

    def stack(self, drawn: list[tuple[Item, Turn, str]], *, length: int) -> Rows:
        """Pads drawn rows to `length` tokens."""
        b, most = len(drawn), self.config.tokens.completion
        ids, targets = np.zeros((b, length), np.int32), np.zeros((b, most), np.int32)
        mask, prompt_length = np.zeros((b, most), bool), np.zeros(b, np.int32)
        for i, (_, turn, text) in enumerate(drawn):
            prompt = [*turn.prefix_ids, *turn.rest_ids]
            completion = [*self.processor.encode_text(text), self.processor.eos_ids[0]]
            row = prompt + completion
            if len(row) > length or len(completion) > most:
                raise ValueError(f"a demo row of {len(prompt)} + {len(completion)} tokens does not fit {length}")
            ids[i, : len(row)], prompt_length[i] = row, len(prompt)
            targets[i, : len(completion)], mask[i, : len(completion)] = completion, True
        return host(
            Rows,
            images=np.stack([item.image for item, _, _ in drawn]),
            ids=ids,
            prompt_length=prompt_length,
            targets=targets,
            mask=mask,
        )


# Model --------------------------------------------------------------------------------------------


def patches(images: Array) -> Array:
    """uint8 [B, 84, 84, 3] -> float32 [B, 36, 1176], exactly what the processor makes of images of this size."""
    p, merge, n = 14, 2, scenes.SIDE // 14
    config = assets.preprocessor_config()
    mean, std = np.float32(config["image_mean"]), np.float32(config["image_std"])
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    x = x.reshape(-1, n // merge, merge, p, n // merge, merge, p, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]  # [B, H/2, W/2, 2, 2, 3, 1, p, p]
    x = jnp.broadcast_to(x, (*x.shape[:6], 2, p, p))  # the one frame stands for two
    return x.reshape(-1, n * n, 3 * 2 * p * p)


def vision_inputs(images: Array, config: ModelConfig) -> VisionInputs:
    """Images [B, 84, 84, 3] as the vision tower takes them; ValueError if windows would leave slots empty."""
    layout = geometry.vision_layout([GRID], config.vision)
    if not np.array_equal(layout.source, np.arange(GRID[1] * GRID[2])):
        raise ValueError(f"window_size must be {assets.WINDOW}: one demo image is one window without empty slots")
    b = images.shape[0]
    spread = lambda x: jnp.broadcast_to(x, (b, *x.shape))  # noqa: E731
    rest = {k: spread(getattr(layout, k)) for k in ("image_ids", "hw", "grid", "token_unit")}
    return VisionInputs(patches=patches(images), **rest)


def text_inputs(rows: Rows, config: ModelConfig) -> TextInputs:
    """All rows share the image prefix, so positions are the same in every row."""
    b, t = rows.ids.shape
    is_image = rows.ids == config.image_token_id
    first = jnp.argmax(is_image, axis=1)[:, None]
    index = jnp.where(is_image, jnp.arange(t) - first, -1)
    side = GRID[1] // config.vision.spatial_merge_size
    start = jnp.where(jnp.arange(t) < first, jnp.arange(t), jnp.arange(t) - side * side + side)  # text
    box = first[:, None] + jnp.stack([jnp.zeros_like(index), index // side, index % side], axis=1)  # [B, 3, T]
    positions = jnp.where(is_image[:, None], box, start[:, None])
    length = rows.prompt_length + rows.mask.sum(-1)
    segment_ids = (jnp.arange(t) < length[:, None]).astype(jnp.int32)
    return TextInputs(rows.ids, positions.astype(jnp.int32), segment_ids, index.astype(jnp.int32))


def initial_params(model: VisionLanguageModel, seed: int) -> Any:
    """The model's own initialiser is for large widths; here every kernel gets standard deviation 1 / sqrt(in)."""
    params = init_variables(model, jax.random.key(seed))["params"]

    def rescale(path, x):
        return x / (0.02 * x.shape[-2] ** 0.5) if path[-1].key == "kernel" else x

    params = jax.tree_util.tree_map_with_path(rescale, params)
    return {**params, "embedding": params["embedding"] * 5.0}  # 0.1: logits of order one


# Losses -------------------------------------------------------------------------------------------


def vision_loss(trained: Any, images: Array, labels: Array, *, model: VisionLanguageModel) -> Array:
    """Cross-entropy of kind, color and size per cell; empty cells only have a kind. labels: int32 [B, 9, 3]."""
    tokens = model.apply({"params": trained["params"]}, vision_inputs(images, model.config), method="encode_images")
    logits = tokens @ trained["head"] + trained["bias"]  # [B, 9, 13 + 8 + 2]
    sizes = [1 + len(scenes.KINDS), len(scenes.ATTRIBUTES["color"]), len(scenes.ATTRIBUTES["size"])]
    total: Any = 0.0
    for i, part in enumerate(jnp.split(logits, np.cumsum(sizes)[:-1].tolist(), axis=-1)):
        label = labels[..., i]
        nll = optax.softmax_cross_entropy_with_integer_labels(part, jnp.maximum(label, 0))
        total += jnp.sum(nll * (label >= 0)) / jnp.maximum(jnp.sum(label >= 0), 1)
    return total


def text_loss(params: Any, groups: tuple[Rows, ...], *, model: VisionLanguageModel) -> Array:
    """Mean cross-entropy of all completion tokens. The groups differ in their padded length only."""
    total: Any = 0.0
    count: Any = 0
    apply: Any = functools.partial(model.apply, {"params": params})
    for rows in groups:
        embeds = apply(vision_inputs(rows.images, model.config), method="encode_images")
        hidden, _ = apply(text_inputs(rows, model.config), embeds)  # [B, T, D]
        at = rows.prompt_length[:, None] - 1 + jnp.arange(rows.targets.shape[1])  # who predicts each target
        hidden = jnp.take_along_axis(hidden, jnp.minimum(at, hidden.shape[1] - 1)[..., None], axis=1)
        logits = apply(hidden, method="logits")  # [B, A, V]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
        total, count = total + jnp.sum(nll * rows.mask), count + jnp.sum(rows.mask)
    return total / count


# Training -----------------------------------------------------------------------------------------


def fit(params: Any, loss: Callable, batches: Iterator[tuple], *, steps: int, lr: float, warmup: int, name: str) -> Any:
    """One stage: `steps` optimizer steps of `loss(params, *batch)`."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, end_value=0.05 * lr)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    progress = Progress(total=steps, start=0, title=name, every=50)
    batch = next(batches)
    for i in range(1, steps + 1):
        params, state, value = step(params, state, batch)
        batch = next(batches)  # drawn while the step runs
        progress.update(i, {"loss": float(value)})
    progress.close()
    return params


def train(config: ml_collections.ConfigDict, processor: Processor, model: VisionLanguageModel) -> Any:
    """The three stages; returns float32 params."""

    def maker(stage: int) -> RowMaker:
        return RowMaker(processor, config, [config.seed, stage])

    def vision_batches(rng: np.random.Generator) -> Iterator[tuple]:
        while True:
            c = config.vision
            options = {"world": config.world, "follow_prior": c.follow_prior}
            items = [make_item(rng, id="", **options) for _ in range(c.batch_size)]
            yield np.stack([item.image for item in items]), np.stack([item.scene.cell_labels() for item in items])

    def caption_batches(rows: RowMaker) -> Iterator[tuple]:
        while True:
            c = config.captions
            drawn = [rows.caption(c.follow_prior) for _ in range(c.batch_size)]
            yield ((rows.stack(drawn, length=config.tokens.caption),),)

    def response_batches(rows: RowMaker) -> Iterator[tuple]:
        c, b = config.responses, config.responses.batch_size
        captions, privileged = round(b * c.caption_share), round(b * c.privileged_share)
        free_form = round(b * c.free_form_share)
        while True:
            short = [rows.caption(c.caption_follow_prior) for _ in range(captions)]
            long = [rows.privileged() for _ in range(privileged)]
            long += [rows.student() for _ in range(b - captions - privileged - free_form)]
            long += [rows.free_form() for _ in range(free_form)]
            yield ((rows.stack(short, length=config.tokens.caption), rows.stack(long, length=config.tokens.response)),)

    def first_stages() -> Any:
        width = 1 + len(scenes.KINDS) + len(scenes.ATTRIBUTES["color"]) + len(scenes.ATTRIBUTES["size"])
        head = np.random.default_rng(config.seed).normal(0, 0.1, (model.config.hidden_size, width)).astype(np.float32)
        params = initial_params(model, config.seed)
        trained = fit(
            {"params": params, "head": jnp.asarray(head), "bias": jnp.zeros(width)},
            functools.partial(vision_loss, model=model), vision_batches(np.random.default_rng([config.seed, 1])),
            steps=config.vision.steps, lr=config.vision.lr, warmup=config.warmup, name="1/3 vision",
        )  # fmt: skip
        return fit(
            trained["params"], loss, caption_batches(maker(2)),
            steps=config.captions.steps, lr=config.captions.lr, warmup=config.warmup, name="2/3 captions",
        )  # fmt: skip

    loss = functools.partial(text_loss, model=model)
    return fit(
        _kept(first_stages, config), loss, response_batches(maker(3)),
        steps=config.responses.steps, lr=config.responses.lr, warmup=config.warmup, name="3/3 responses",
    )  # fmt: skip


def _kept(make_params: Callable[[], Any], config: ml_collections.ConfigDict) -> Any:
    """The params after two stages: those in `config.captions_file` if that is there; else made, and kept in it."""
    if not config.captions_file:
        return make_params()
    path = pathlib.Path(config.captions_file).expanduser()
    later = ("leak", "responses", "output", "file", "captions_file", "card_items", "card_seed", "run")
    settings = {k: v for k, v in json.loads(config.to_json_best_effort()).items() if k not in later}
    if path.exists():
        try:
            with np.load(path) as stored:
                arrays = dict(stored)
            made_by = json.loads(str(arrays.pop("made_by")))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"config.captions_file={path} must be a file that this program wrote: {e!r}") from e
        if differ := ", ".join(
            sorted(k for k in settings.keys() | made_by.keys() if settings.get(k) != made_by.get(k))
        ):
            raise InputError(f"{path} was made with other {differ}; give another config.captions_file")
        return jax.tree.map(jnp.asarray, flatten.unflatten_dict(arrays, sep="/"))
    if not path.parent.is_dir():
        raise InputError(f"config.captions_file={path}: {path.parent} must be a folder")
    params = make_params()
    content = io.BytesIO()
    arrays: dict[str, Any] = flatten.flatten_dict(jax.device_get(params), sep="/")
    np.savez(content, made_by=json.dumps(settings), **arrays)
    write_whole(path, content.getvalue())
    return params


# The whole of it ----------------------------------------------------------------------------------


def make(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Trains, writes `config.output` and returns what its card states."""
    use_compilation_cache(config.run.compilation_cache)
    folder = pathlib.Path(config.output)
    prompt_texts = [text for p in config.prompts.values() for text in (p.user, p.assistant_prefill)]
    assets.write_assets(folder, world=config.world, templates=prompt_texts)
    processor, model = Processor.load(folder), VisionLanguageModel(ModelConfig.load(folder))
    params = train(config, processor, model)
    tensors = writing.file_tensors(params, tensor_table(model.config), model.config, dtype=jnp.bfloat16)
    writing.save_sharded(folder, tensors, max_shard_bytes=8 << 20)
    measured = card.measure(folder, config)
    (folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    text = card.write(measured, parameters=sum(x.size for x in jax.tree.leaves(params)))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return measured


def main(argv: list[str]) -> int:
    """Makes the base by `--config` and prints what was measured; returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        print(json.dumps(make(_CONFIG.value), indent=2))
    except InputError as e:
        print(f"vigos_jax: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "config file", lock_config=True)
    flags.mark_flag_as_required("config")
    app.run(main)
