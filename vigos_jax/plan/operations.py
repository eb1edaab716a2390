"""FLOPs of a traced program: the same on every platform, with loop bodies multiplied by their trip counts."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(jaxpr: ClosedJaxpr | Jaxpr, *, trip_count: int = 1) -> float:
    """FLOPs of all matrix products on all devices together; a multiply-add counts as 2.

    Everything else in such a model is below one percent. A conditional counts as its most expensive branch.

    Args:
      trip_count: assumed for every loop whose length is not in the program (`while_loop`).
    """
    inner = functools.partial(flops, trip_count=trip_count)
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            operand: Any = equation.invars[0].aval
            result: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(operand.shape[i] for i in contracted) * math.prod(result.shape)
        elif name == "scan":
            total += params["length"] * inner(params["jaxpr"])
        elif name == "while":
            total += trip_count * inner(params["body_jaxpr"])
        elif name == "cond":
            total += max(inner(branch) for branch in params["branches"])
        elif name == "pallas_call":  # skipped blocks of a mask count too
            total += math.prod(params["grid_mapping"].grid) * inner(params["jaxpr"])
        elif name == "shard_map":  # its program is one device's
            total += params["mesh"].size * inner(params["jaxpr"])
        else:
            total += sum(inner(program) for program in _programs_in(params))
    return total


def _programs_in(params: Mapping[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    if "fwd_jaxpr_thunk" in params or "jvp_jaxpr_fun" in params:  # of a custom derivative the function itself
        params = {k: v for k, v in params.items() if k in ("call_jaxpr", "fun_jaxpr")}
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def traced_flops(function: Callable, *args: Any, trip_count: int = 1) -> float:
    """`flops` of a jitted function for abstract or real arguments."""
    return flops(jax.jit(function).trace(*args).jaxpr, trip_count=trip_count)
