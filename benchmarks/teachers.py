"""All teachers in one packed pass against three padded ones, and the whole step against the released shape of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models, released
from benchmarks.harness import Result, compiled, flops, race, tera
from vigos_jax.method.batch import ScoreBatch
from vigos_jax.method.losses import ObjectiveConfig
from vigos_jax.method.packing import pack_scores
from vigos_jax.models.config import ModelConfig
from vigos_jax.models.variables import teacher_variables
from vigos_jax.models.vlm import VisionLanguageModel, abstract_variables

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Batches:
    """The same rows, packed, and in the released shape."""

    packed: ScoreBatch
    each: list[ScoreBatch]
    starts: list[Array]
    masks: Array
    length: int


def make_batches(
    config: ModelConfig, sizes: models.Sizes, *, rows: int, invalid: int = 0, roles=models.ROLES
) -> Batches:
    data, rollouts = models.samples(config, sizes, rows=rows, invalid=invalid)
    options = {"config": config, "buckets": models.exact_buckets(config)}
    packed = pack_scores(data, rollouts, roles=roles, **options)
    turns = [[row.student, *row.teachers] for row in data]
    masks = np.zeros((len(roles), rows, sizes.completion), bool)
    for i in range(rows):
        used = packed.supervised.role[i] >= 0
        masks[packed.supervised.role[i][used], i, packed.supervised.position[i][used]] = True
    return Batches(
        packed=packed,
        each=released.pack_each(data, rollouts, **options),
        starts=[np.array([len(t[k].ids) for t in turns], np.int32) for k in range(len(turns[0]))],
        masks=masks,
        length=sizes.completion,
    )


def packed_teachers(model: VisionLanguageModel, base: Any, batch: ScoreBatch) -> Array:
    variables = teacher_variables(base, {})
    images = model.apply(variables, batch.vision, method="encode_images")
    hidden = model.apply(variables, batch.teacher, images)[0]
    states = jnp.take_along_axis(hidden, batch.supervised.teacher_at[:, :, None], 1)
    return model.apply(variables, states, method="logits")


def our_loss(model: VisionLanguageModel, base: Any, trained: Any, batch: ScoreBatch) -> Array:
    chunk = batch.supervised.role.shape[1]  # one chunk: loops would be counted once
    return models.loss(model, base, trained, batch, ObjectiveConfig(models.ROLES, chunk))


def at_depth(count, config: ModelConfig, **options: Any) -> float:
    """`count(model)` for the whole depth, from compilations of one and two layers: it is linear in both depths."""

    def small(layers: int, blocks: int) -> float:
        vision = dataclasses.replace(config.vision, depth=blocks, full_attention_blocks=())
        return count(models.model(dataclasses.replace(config, num_layers=layers, vision=vision), **options))

    one, layer, block = small(1, 1), small(2, 1), small(1, 2)
    return one + (config.num_layers - 1) * (layer - one) + (config.vision.depth - 1) * (block - one)


def shapes(model: VisionLanguageModel) -> tuple[Any, Any]:
    variables = abstract_variables(model)
    return variables["params"], {"lora": variables["lora"]}


def teachers() -> Result:
    config = models.QWEN_3B
    b = make_batches(config, models.TYPICAL, rows=1)

    def packed(model):
        return flops(compiled(functools.partial(packed_teachers, model), shapes(model)[0], b.packed))

    def padded(model):
        function = functools.partial(released.teacher_pass, model)
        return flops(compiled(function, shapes(model)[0], b.each, b.starts, b.length, static=(3,)))

    ours, theirs = at_depth(packed, config), at_depth(padded, config)
    lengths = [x.student.ids.shape[1] for x in b.each[1:]]
    used = int(np.sum(b.packed.teacher.segment_ids > 0))
    detail = (
        ("three padded passes, a vision pass each", f"{tera(theirs)} a row, {sum(lengths)} tokens"),
        ("one packed pass, one vision pass", f"{tera(ours)} a row, {used} tokens"),
    )
    what = "FLOPs of all teachers, vision and heads included, 3B shapes, typical sample"
    # Tokens alone are 2.75 to 1; the rest is attention, whose pairs depend on the sample.
    return Result("teachers", what, theirs / ours, 2.7, None, detail)


def teachers_wall() -> Result:
    config = models.MID_SIZE
    b = make_batches(config, models.THIRD, rows=2)
    base = models.weights(config)["params"]
    model = models.model(config)
    packed = jax.jit(functools.partial(packed_teachers, model))
    padded = jax.jit(functools.partial(released.teacher_pass, model), static_argnums=3)
    r = race(lambda: padded(base, b.each, b.starts, b.length), lambda: packed(base, b.packed))
    detail = (("three padded passes", f"{r.baseline:.2f} s"), ("one packed pass", f"{r.ours:.2f} s, 2 rows"))
    return Result("teachers_wall", "the same by the clock, 100 M parameters", r.ratio, 2.2, r.spread, detail)


def step() -> Result:
    config = models.QWEN_3B
    b = make_batches(config, models.TYPICAL, rows=1)

    def ours(model, remat=True):
        base, trained = shapes(model)
        gradient = jax.grad(functools.partial(our_loss, model), argnums=1)
        return flops(compiled(gradient, base, trained, b.packed))

    def theirs(model):
        base, trained = shapes(model)

        def loss(base, trained, batches, starts, masks):
            return released.loss(model, base, trained, batches, starts, masks, b.length, 0.05)

        return flops(compiled(jax.grad(loss, argnums=1), base, trained, b.each, b.starts, b.masks))

    full = at_depth(ours, config, remat="full")
    kept = at_depth(ours, config, remat="none")
    released_shape = at_depth(theirs, config, remat="full")
    detail = (
        ("released shape, recomputing layers", f"{tera(released_shape)} a row"),
        ("ours, recomputing layers", f"{tera(full)} a row"),
        ("ours, keeping them", f"{tera(kept)} a row"),
    )
    what = "FLOPs of scoring and backward pass, 3B shapes, typical sample"
    return Result("step", what, released_shape / full, 1.6, None, detail)
