"""How often a loop of a compiled program runs."""

import dataclasses
import math
import re

from vigos_jax.plan.hlo import Computation, Computations, Instruction, called, root_of


def trip_count(loop: Instruction, parsed: Computations) -> int | None:
    """The trip count that the compiler annotated, else the constant limit of the loop's counter divided by its step.

    Returns:
      None if the program contains neither, as for a `while_loop`.
    """
    if match := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(match[1])
    condition, body = (parsed[called(loop, part)[0]] for part in ("condition", "body"))
    compare = root_of(condition)
    if compare.op == "fusion":
        inner = root_of(parsed[called(compare)[0]])
        if inner.op != "compare":
            return None
        compare = dataclasses.replace(compare, op="compare", rest=inner.rest)
    if compare.op != "compare" or "direction=LT" not in compare.rest or len(compare.operands) != 2:
        return None
    counter, limit = (condition.get(name) for name in compare.operands)
    index = re.search(r"index=(\d+)", counter.rest) if counter and counter.op == "get-tuple-element" else None
    if index is None or limit is None or limit.op != "constant":
        return None
    root = root_of(body)
    step = _growth(body.get(root.operands[int(index[1])]), body, parsed) if root.op == "tuple" else None
    return math.ceil(int(limit.rest.split()[0]) / (step or 1))


def _growth(i: Instruction | None, body: Computation, parsed: Computations) -> int | None:
    """The constants that are added up to `i` in a loop's body, through copies and small fusions."""
    total = 0
    for _ in range(8):  # as deep as such a chain is
        if i is None:
            return None
        if i.op == "fusion":
            inner = parsed[called(i)[0]]
            root = root_of(inner)
            constants = [int(x.rest.split()[0]) for x in inner.values() if x.op == "constant" and "[]" in x.shape]
            if root.op != "add" or len(constants) != 1:
                return None
            total, i = total + constants[0], body.get(i.operands[0])
        elif i.op == "add":
            parts = [body.get(name) for name in i.operands]
            constant = next((p for p in parts if p is not None and p.op == "constant"), None)
            if constant is None:
                return None
            total, i = total + int(constant.rest.split()[0]), next((p for p in parts if p is not constant), None)
        elif i.op in ("copy", "bitcast"):
            i = body.get(i.operands[0])
        else:
            return total or None
    return None
