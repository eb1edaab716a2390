"""Bytes of device memory that one instruction of a compiled program reads and writes.

A fusion is one kernel: its intermediate values cost nothing, and it reads only the operand elements that its results
need. They are found by walking back from the results: a slice needs as many operand elements as it has itself, an
in-place update needs only the update, and any other instruction needs as many as are needed of it.
"""

import dataclasses
import re

from vigos_jax.plan.hlo import (
    Computation,
    Computations,
    Instruction,
    arrays,
    called,
    elements,
    parameters,
    root_of,
    stored,
    through,
)

# Number of elements needed of an array, by region: the whole array, or a named slice. Equal names are the same
# elements, which a kernel reads once. `_IN_PLACE` marks a result of which only the update is written.
Need = dict[str, float]
_WHOLE, _IN_PLACE = "", "="

_RESHAPES = ("bitcast", "convert", "reshape")  # leave every element where it is, or would in a 16-bit device's program
_SLICES = ("dynamic-slice", "slice", "gather")
_CONTRACTIONS = frozenset(("dot", "convolution", "sort", "custom-call", "fft", "triangular-solve", "cholesky", "while"))
# Custom calls that only mark something.
_MARKERS = ("AllocateBuffer", "Sharding", "annotate_device_placement", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True)
class Touched:
    """What one execution of an instruction moves.

    Attributes:
      read, written: bytes of the device's memory.
      new: (bytes, shape) of each array that it makes; an update in place makes none.
    """

    read: float
    written: float
    new: tuple[tuple[float, str], ...] = ()

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written


def touched(i: Instruction, around: Computation, parsed: Computations) -> Touched:
    """Memory traffic of an instruction in the computation `around`, which is not a fusion's."""
    if i.op.endswith(("-done", "-update")) or is_marker(i):
        return Touched(0.0, 0.0)
    results = arrays(i.shape)
    new = tuple((a.bytes, a.name) for a in results)
    written = sum(a.bytes for a in results)
    if i.op == "fusion" and called(i):
        return _fusion(i, around, parsed)
    operands = [stored(around[name].shape) if name in around else 0.0 for name in i.operands]
    if i.op in _SLICES:
        return Touched(min(operands[0], stored(i.shape)), written, new)
    if i.op == "dynamic-update-slice":
        return Touched(operands[1], min(operands[0], operands[1]))
    if i.op == "scatter":  # operands: n arrays, indices, n updates; old values are read to combine
        updates = sum(operands[len(operands) // 2 + 1 :])
        return Touched(2 * updates + operands[len(operands) // 2], updates)
    return Touched(sum(dict(zip(i.operands, operands, strict=True)).values()), written, new)


def is_marker(i: Instruction) -> bool:
    """Whether a custom call does nothing when the program runs."""
    return i.op == "custom-call" and any(f'custom_call_target="{name}"' in i.rest for name in _MARKERS)


def _fusion(i: Instruction, around: Computation, parsed: Computations) -> Touched:
    inner = parsed[called(i)[0]]
    root = root_of(inner)
    outputs = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    outputs = [x for x in outputs for _ in arrays(x.shape)]  # a reduction may have several results
    written, new = 0.0, []
    for result, output in zip(arrays(i.shape), outputs, strict=False):
        update = _update(output, inner, parsed)
        if update is None:
            new.append((result.bytes, result.name))
            written += result.bytes
        else:
            written += result.bytes * min(1.0, update / max(1, result.elements))
    read = 0.0
    for number, need in _needs(called(i)[0], parsed, None).items():
        if number < len(i.operands) and i.operands[number] in around:
            shape = around[i.operands[number]].shape
            read += stored(shape) * min(1.0, sum(need.values()) / max(1, elements(shape)))
    return Touched(read, written, tuple(new))


def _update(i: Instruction, inner: Computation, parsed: Computations) -> float | None:
    """Number of elements that a result updates in place in a fusion parameter; None for a new array."""
    total = 0.0
    while True:
        i = through(i, inner, _RESHAPES)
        if i.op == "parameter":
            return total or None
        if i.op == "dynamic-update-slice":
            total += elements(inner[i.operands[1]].shape)
            i = inner[i.operands[0]]
        elif i.op == "scatter" and len(i.operands) == 3:
            total += elements(inner[i.operands[2]].shape)
            i = inner[i.operands[0]]
        elif i.op == "fusion":
            nested = parsed[called(i)[0]]
            update = _update(root_of(nested), nested, parsed)
            number = _updated_parameter(root_of(nested), nested, parsed) if update else None
            if update is None or number is None:
                return None
            total += update
            i = inner[i.operands[number]]
        else:
            return None


def _updated_parameter(i: Instruction, inner: Computation, parsed: Computations) -> int | None:
    """Number of the parameter into which `i` is written."""
    while i.op != "parameter":
        i = through(i, inner, _RESHAPES)
        if i.op in ("dynamic-update-slice", "scatter"):
            i = inner[i.operands[0]]
        elif i.op == "fusion":
            nested = parsed[called(i)[0]]
            number = _updated_parameter(root_of(nested), nested, parsed)
            if number is None:
                return None
            i = inner[i.operands[number]]
        elif i.op != "parameter":
            return None
    return int(i.rest.split()[0])


def _needs(name: str, parsed: Computations, wanted: Need | None) -> dict[int, Need]:
    """Elements that a fused computation needs of each parameter, by parameter number.

    Args:
      wanted: elements needed of its result; None for the whole result, with updates written in place.
    """
    inner = parsed[name]
    root = root_of(inner)
    needs: dict[str, Need] = {}
    if wanted is not None and root.op != "tuple":
        needs[root.name] = dict(wanted)
    else:
        for output in [inner[o] for o in root.operands] if root.op == "tuple" else [root]:
            is_update = wanted is None and _update(output, inner, parsed) is not None
            _add(needs, output.name, {_IN_PLACE: 0.0} if is_update else {_WHOLE: elements(output.shape)})
    for i in reversed(list(inner.values())):
        if i.name in needs and i.op != "parameter":
            for operand, need in _operand_needs(i, needs[i.name], inner, parsed):
                _add(needs, operand, need)
    return {number: needs[p.name] for number, p in parameters(inner) if p.name in needs}


def _add(needs: dict[str, Need], name: str, need: Need) -> None:
    mine = needs.setdefault(name, {})
    for region, n in need.items():
        mine[region] = max(mine.get(region, 0.0), n)


def _operand_needs(i: Instruction, need: Need, inner: Computation, parsed: Computations) -> list[tuple[str, Need]]:
    """Elements that an instruction in a fusion needs of its operands if `need` is needed of it."""
    size = lambda name: elements(inner[name].shape)  # noqa: E731
    everything = [(name, {_WHOLE: float(size(name))}) for name in i.operands if name in inner]
    if not everything or i.op in _CONTRACTIONS or i.op == "get-tuple-element":
        return everything
    first, *others = everything
    if i.op in _SLICES:
        if _WHOLE not in need:
            return [(first[0], need), *others]
        return [(first[0], {_region(i): float(elements(i.shape))}), *others]
    if i.op == "dynamic-update-slice":
        kept = {k: max(0.0, n - size(i.operands[1])) if k == _WHOLE else n for k, n in need.items()}
        return [(first[0], kept), *others]
    if i.op == "scatter":
        updates = float(sum(size(name) for name in i.operands[len(i.operands) // 2 + 1 :]))
        if _WHOLE not in need:
            return [(first[0], {**need, f"scatter {i.name}": updates}), *others]
        return everything
    if i.op == "fusion" or i.op == "call":
        passed = None if _IN_PLACE in need and len(need) == 1 else need
        inside = _needs(called(i)[0], parsed, passed)
        return [(i.operands[number], n) for number, n in inside.items() if number < len(i.operands)]
    out = elements(i.shape)
    return [(name, {k: _carried(n, out, size(name)) for k, n in need.items()}) for name, _ in everything]


def _carried(n: float, out: int, operand: int) -> float:
    """Elements of an operand for `n` of `out` elements: of a reduction several for each."""
    return min(float(operand), n * max(1.0, operand / max(1, out)))


def _region(i: Instruction) -> str:
    """A name for what a slice takes: the same for slices of the same place and size."""
    at = re.search(r"\bslice=\{[^}]*\}", i.rest)
    return f"{i.op} {arrays(i.shape)[0].name} {' '.join(i.operands[1:])} {at[0] if at else ''}"


def converts(i: Instruction, parsed: Computations) -> bool:
    """Whether an instruction only converts an array, or a slice of it, to another dtype."""
    if i.op == "convert":
        return True
    if i.op != "fusion":
        return False
    inner = [x for x in parsed[called(i)[0]].values() if not re.search(r"\[\]", x.shape)]
    allowed = ("parameter", "constant", "convert", "bitcast", "dynamic-slice", "copy")
    return any(x.op == "convert" for x in inner) and all(x.op in allowed for x in inner)
