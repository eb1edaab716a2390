"""The one place that decides which variables a role is applied with.

The frozen `base` lies under everything and is never written to. The student is the base overlaid with what is
trained: an adapter in a `lora` collection, or, in full fine-tuning, a `params` tree of its own. Teachers are the base
alone, unless a run says otherwise.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from vigos_jax.models.quantization import is_quantised

Variables = dict[str, Any]


def student_variables(base: Any, trained: Variables) -> Variables:
    """The base overlaid with the trained collections, `{"lora": ...}` or `{"params": ...}`."""
    return {"params": base, **trained}


def teacher_variables(base: Any, teacher_params: Variables) -> Variables:
    """The base overlaid with `teacher_params_of`, behind which no gradient flows."""
    return jax.lax.stop_gradient({"params": base, **teacher_params})


def teacher_params_of(weights: str, *, trained: Variables, average: Variables) -> Variables:
    """The teacher parameters, which `teacher_variables` puts over the base.

    Args:
      weights: "frozen" adds nothing: the base alone, even if training starts from an adapter. "ema" is the moving
        `average` of the trained weights, "live" the student's own.
    """
    return {"frozen": {}, "ema": average, "live": trained}[weights]


def shares_vision(trained: Variables) -> bool:
    """Whether the vision tower is the base's, so that it can run once for student and teachers."""
    if "params" in trained:
        return False
    return "visual" not in trained.get("lora", {})


_ISLANDS = frozenset(("A_log", "gated_norm"))  # of gated delta rule layers


def is_float32_island(path: Iterable[str]) -> bool:
    """Whether the leaf at this path is float32 whatever the dtype of the base.

    The decay of a state is an exponential of an exponential of A_log: its rounding grows along the sequence.
    """
    return not _ISLANDS.isdisjoint(path)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts all leaves but float32 islands: the master weights of full fine-tuning before a decode loop.

    Codes and scales of a quantised kernel have dtypes of their own, and keep them.
    """

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        return x if is_quantised(x) else x.astype(_dtype_of(path, dtype))

    return jax.tree_util.tree_map_with_path(cast, tree, is_leaf=is_quantised)


def has_dtype(tree: Any, dtype: Any) -> bool:
    """Whether `cast_floats` would change nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantised)
    return all(is_quantised(x) or x.dtype == _dtype_of(path, dtype) for path, x in leaves)


def _dtype_of(path: tuple[Any, ...], dtype: Any) -> Any:
    is_island = is_float32_island(str(getattr(key, "key", key)) for key in path)
    return jnp.dtype(jnp.float32 if is_island else dtype)
