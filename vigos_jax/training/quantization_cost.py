"""What quantising the base cost: KL(original || quantised) on a run's own prompts, when the run begins.

Both models run side by side, layer by layer: the original's layer is read from its files when it is its turn, so that
the devices hold one layer of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.method.batch import PromptBatch
from vigos_jax.method.packing import pack_prompts
from vigos_jax.method.rows import Row
from vigos_jax.models.families import tensor_table
from vigos_jax.models.quantization import is_quantised
from vigos_jax.models.shapes import Array, Bool, Float, Int
from vigos_jax.models.tensor_names import Tensor
from vigos_jax.models.vlm import VisionLanguageModel
from vigos_jax.runtime.progress import say
from vigos_jax.runtime.sharding import tree_shardings
from vigos_jax.session import Session
from vigos_jax.weights.weight_files import WeightFiles, open_weights, read_leaf

ROWS = 4  # prompts that are compared, at least
_POSITIONS = 16  # whose logits exist at a time


def quantization_cost(session: Session, config, rows: Sequence[Row]) -> dict[str, Any]:
    """Compares the quantised base with the model it came from, on the text tokens of the first prompts.

    Args:
      rows: this process's of a global batch of `config.batch_size`. All processes call this.

    Returns:
      `quantization`, `tokens`, and `kl_mean` and `kl_max` of KL(original || quantised) in nats per token.
    """
    size = min(config.batch_size, session.whole_batch(ROWS))
    own = rows[: len(session.own_rows(size))]
    prompts = session.put_batch(pack_prompts(own, config=session.config, buckets=session.buckets))
    original, quantised = _last_states(session, config.mesh.rules, prompts)
    text = prompts.text
    is_text = (text.segment_ids > 0) & (text.image_index < 0) & prompts.is_active[:, None]
    run = jax.jit(functools.partial(_divergence, session.model))
    tokens, mean, worst = (float(x) for x in run(_without_layers(session.base), original, quantised, is_text))
    kind = config.model.quantization
    say(
        f"{kind} base: KL(original || quantised) is {mean:.2g} nats per token (largest {worst:.2g}) over "
        f"{int(tokens)} tokens of this run's prompts"
    )
    return {"quantization": kind, "tokens": int(tokens), "kl_mean": mean, "kl_max": worst}


def _last_states(session: Session, rules: Any, prompts: PromptBatch) -> tuple[Array, Array]:
    """States [B, T, D] after the last layer, of the original and of the quantised base."""
    model, base = session.model, session.base
    one_layer = model.clone(config=dataclasses.replace(session.config, num_layers=len(session.config.layer_pattern)))
    start, step = jax.jit(functools.partial(_start, model)), jax.jit(functools.partial(_layer, one_layer))
    outside = _without_layers(base)
    x, inputs = start(outside, prompts)
    original = quantised = x
    read = _original_layers(session, rules)
    take = jax.jit(lambda layers, i: jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), layers))
    for i in range(session.config.groups):
        layer, number = take(base["layers"], i), jnp.array([i])
        quantised = step(outside, layer, number, quantised, inputs)
        original = step(outside, read(i, layer), number, original, inputs)
    return original, quantised


def _without_layers(base: Any) -> Any:
    return {name: tree for name, tree in base.items() if name != "layers"}


def _start(model: VisionLanguageModel, outside: Any, prompts: PromptBatch) -> Any:
    apply: Any = functools.partial(model.apply, {"params": outside})
    images = apply(prompts.vision, method="encode_images")
    return apply(prompts.text, images, method="enter")


def _layer(
    model: VisionLanguageModel, outside: Any, layer: Any, number: Int[Array, "1"], x: Float[Array, "B T D"], inputs: Any
) -> Float[Array, "B T D"]:
    run = lambda module: module.layers(x, number, inputs, True)[0]  # noqa: E731
    apply: Any = model.apply
    return apply({"params": {**outside, "layers": layer}}, method=run)


def _original_layers(session: Session, rules: Any) -> Callable[[int, Any], Any]:
    """A function of (number, quantised layer) that gives the layer with the kernels of the model's files."""
    files = open_weights(session.folder)
    kernels = {row.path: row for row in tensor_table(session.config) if row.path[0] == "layers"}

    def read(number: int, layer: Any) -> Any:
        def of(path: Any, leaf: Any) -> Any:
            if not is_quantised(leaf):
                return leaf
            keys = ("layers", *(k.key for k in path))
            return _read_kernel(files, kernels[keys], number, leaf.kernel_shape, session, rules)

        return jax.tree_util.tree_map_with_path(of, layer, is_leaf=is_quantised)

    return read


def _read_kernel(
    files: WeightFiles, row: Tensor, number: int, shape: tuple[int, ...], session: Session, rules: Any
) -> Array:
    """The kernel [1, in, out] of one layer, on the mesh."""
    leaf = jax.ShapeDtypeStruct(shape, session.model.dtype)
    tree: Any = leaf
    for key in reversed(("params", *row.path)):
        tree = {key: tree}
    (sharding,) = jax.tree.leaves(tree_shardings(tree, session.mesh, rules))
    own = dataclasses.replace(row, name=row.names()[number], stacked=1)
    return read_leaf(files, own, shape, dtype=session.model.dtype, sharding=sharding)


def _divergence(
    model: VisionLanguageModel,
    outside: Any,
    original: Float[Array, "B T D"],
    quantised: Float[Array, "B T D"],
    is_text: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Tokens, and mean and largest KL(original || quantised), a few positions at a time."""
    apply: Any = functools.partial(model.apply, {"params": outside})

    def at(states: tuple[Array, Array]) -> Array:  # of one position, [B, D] each
        p, q = (
            jax.nn.log_softmax(apply(x[:, None], method=lambda module, x: module.logits(module.norm(x)))[:, 0])
            for x in states
        )
        return jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), -1), 0.0)  # rounding may make a zero negative

    by_position = tuple(jnp.swapaxes(x, 0, 1) for x in (original, quantised))
    kl = jax.lax.map(at, by_position, batch_size=_POSITIONS).T  # [B, T]
    tokens = jnp.sum(is_text)
    kl = jnp.where(is_text, kl, 0.0)
    return tokens.astype(jnp.float32), jnp.sum(kl) / jnp.maximum(tokens, 1), jnp.max(kl)
