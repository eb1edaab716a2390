"""The student's weights as the decoding loop reads them: in place, without a copy per token.

On GPUs and CPUs each layer has separate arrays, copied out of the stack once a rollout; the compiler then merges
matrix products that read the same states. On TPUs static slices of the stack are read in place.
"""

from typing import Any

import flax.struct
from jax.sharding import Mesh

from vigos_jax.models.decoder import join_adapters
from vigos_jax.models.families import FAMILIES
from vigos_jax.models.variables import Variables
from vigos_jax.models.vlm import VisionLanguageModel


class DecodeWeights(flax.struct.PyTreeNode):
    """What a decoding loop reads.

    Attributes:
      outer: embedding, last norm and head.
      layers: the variables of each layer; or, stacked, of all of them.
      is_stacked: static, which of the two.
    """

    outer: Variables
    layers: Any
    is_stacked: bool = flax.struct.field(pytree_node=False, default=False)


def reads_stack(mesh: Mesh | None) -> bool:
    """Whether the compiler for these devices reads slices of stacked weights in place."""
    return mesh is not None and mesh.devices.flat[0].platform == "tpu"


def own_layers(model: VisionLanguageModel, variables: Variables, *, stacked: bool) -> Any:
    """What decoding holds beside the student's variables: adapters cast, scaled and joined, and the layers' copies.

    Returns:
      The adapters of the whole stack if `stacked`, {} if there are none; else the variables of each layer.
    """
    layers, lora = {"params": variables["params"]["layers"]}, {}
    if adapters := variables.get("lora", {}).get("layers"):
        assert model.lora is not None  # adapters are made by its shape
        lora = {"lora": join_adapters(adapters, scale=model.lora.scale, dtype=model.dtype)}
    return lora if stacked else unstacked(model, {**layers, **lora})


def decode_weights(variables: Variables, own: Any, *, stacked: bool) -> DecodeWeights:
    """A student's variables together with `own_layers` of them."""
    params = variables["params"]
    outer = {name: x for name, x in params.items() if name not in ("layers", "visual")}
    return DecodeWeights(outer, {"params": params["layers"], **own} if stacked else own, stacked)


def unstacked(model: VisionLanguageModel, layers: Variables) -> tuple[Variables, ...]:
    """Stacked variables, layer by layer."""
    of = FAMILIES[model.config.family].layer_of
    return tuple({name: of(x, i, model.config) for name, x in layers.items()} for i in range(model.config.num_layers))
