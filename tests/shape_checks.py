"""The checker that the import hook of conftest.py puts around every function of the annotated modules."""

from collections.abc import Callable

import beartype

# Modules whose annotations are checked at every call.
CHECKED = (
    *(
        "vigos_jax.method.divergences",
        "vigos_jax.method.losses",
        "vigos_jax.method.scoring",
        "vigos_jax.method.packing",
    ),
    *(
        "vigos_jax.models.attention",
        "vigos_jax.models.attention_masks",
        "vigos_jax.models.attention_rows",
        "vigos_jax.models.cudnn_attention",
        "vigos_jax.models.masked_attention",
        "vigos_jax.models.splash_attention",
        "vigos_jax.models.decoder",
        "vigos_jax.models.delta_rule",
        "vigos_jax.models.layers",
        "vigos_jax.models.positions",
    ),
    *("vigos_jax.models.qwen2_5_vl", "vigos_jax.models.qwen3_vl", "vigos_jax.models.vlm"),
    *("vigos_jax.rollouts.sampler", "vigos_jax.rollouts.sampling"),
)


def checked(function: Callable) -> Callable:
    """The function, raising where an argument or a result has not the annotated type, dtype or shape.

    Structs are also built of ShapeDtypeStruct, shardings, None and jax's placeholders: their fields are not checked.
    """
    return function if function.__name__ == "__init__" else beartype.beartype(function)
