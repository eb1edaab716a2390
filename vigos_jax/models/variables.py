"""The one place that decides which variables a role is applied with.

The frozen `base` is every teacher. The student is the base overlaid with what is trained: an adapter in a `lora`
collection, or, in full fine-tuning, a `params` tree of its own. The base is never written to.
"""

from typing import Any

import jax

Variables = dict[str, Any]


def teacher_variables(base: Any) -> Variables:
    """The initial parameters alone: also when training started from an adapter."""
    return {"params": base}


def student_variables(base: Any, trained: Variables) -> Variables:
    """The base overlaid with the trained collections, `{"lora": ...}` or `{"params": ...}`."""
    return {"params": base, **trained}


def shares_vision(trained: Variables) -> bool:
    """Whether student and teachers have the same vision tower, so that it can run once for both."""
    if "params" in trained:
        return False
    return "visual" not in trained.get("lora", {})


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts all leaves, for the float32 master weights of full fine-tuning before a decode loop."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)
