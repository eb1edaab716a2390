"""The text of a compiled program, parsed: its computations, their instructions, and the arrays that these name."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shape: of the result, with its layout.
      operands: names of instructions of the same computation.
      rest: attributes; for a constant or parameter its value or number stands first.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


Computation = Mapping[str, Instruction]
Computations = Mapping[str, Computation]

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OP = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Of these the computation only combines two numbers.
_COMBINERS = frozenset(("reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter"))
_CALLS = ("body", "condition", "calls", "to_apply", "true_computation", "false_computation")


def parse(text: str) -> tuple[Computations, str]:
    """Returns (computations by name, name of the entry computation); instructions are in execution order.

    The start of an asynchronous operation becomes that operation; its end ("-done") stays a separate instruction.
    """
    out: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (head := _HEAD.match(line)):
            current = out.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif (match := _LINE.match(line)) and (op := _OP.search(" " + match[3])):
            body = " " + match[3]
            end = _closing(body, op.end() - 1)
            inside = body[op.end() : end]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = inside + " " + body[end + 1 :]
            i = Instruction(match[2], body[: op.start()], op[1], operands, rest, bool(match[1]))
            current[match[2]] = _synchronous(i)
    return out, entry


def _synchronous(i: Instruction) -> Instruction:
    """Turns an asynchronous start into its synchronous operation, with only the result's shape.

    A start's shape is (operands, results, contexts), a copy-start's (result, operand, context), an all-reduce-start's
    the result alone. `async-start` is unchanged: its operations are in the computation that it calls.
    """
    if not i.op.endswith("-start") or i.op == "async-start":
        return i
    found = [match[0] for match in _ARRAY.finditer(i.shape)]
    if i.op == "copy-start":
        found = found[:1]
    elif i.op != "all-reduce-start":
        after = found[len(i.operands) :]
        found = [x for x in after if "[]" not in x] or after[:1]  # contexts are scalars
    return dataclasses.replace(i, op=i.op.removesuffix("-start"), shape=" ".join(found))


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    level = 0
    for i in range(at, len(text)):
        level += {"(": 1, ")": -1}.get(text[i], 0)
        if level == 0:
            return i
    return len(text)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a result.

    Attributes:
      name: like "bf16[2,3]".
      elements: their number.
      size: in bytes, wherever it is stored.
      is_on_chip: whether it is in on-chip memory rather than device memory.
    """

    name: str
    elements: int
    size: float
    is_on_chip: bool

    @property
    def bytes(self) -> float:
        """In the device's memory."""
        return 0.0 if self.is_on_chip else self.size


def arrays(shape: str) -> list[Shape]:
    """The arrays of a shape, tuples flattened."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _BITS[dtype] if dtype in _BITS else int((re.search(r"\d+", dtype) or ["0"])[0])
        elements = math.prod(int(d) for d in dims.split(",") if d)
        out.append(Shape(f"{dtype}[{dims}]", elements, bits / 8 * elements, "S(1)" in layout))
    return out


def stored(shape: str) -> float:
    """Bytes in the device's memory; on-chip memory is not part of it."""
    return sum(a.bytes for a in arrays(shape))


def elements(shape: str) -> int:
    """Of the first array: the others of a variadic operation have as many. 0 for an empty tuple."""
    return next((a.elements for a in arrays(shape)), 0)


def called(i: Instruction, *names: str) -> list[str]:
    """Computations that an instruction runs, but for those that combine two numbers.

    Args:
      names: of the attributes to look at; none for all.
    """
    if i.op in _COMBINERS:
        return []
    out = [m for n in names or _CALLS for m in re.findall(rf"\b{n}=%?([\w.\-]+)", i.rest)]
    if not names and (branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest)):
        out += [b.strip().lstrip("%") for b in branches[1].split(",")]
    return out


def root_of(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(i for i in computation.values() if i.is_root)


def parameters(computation: Computation) -> Iterator[tuple[int, Instruction]]:
    """(number, instruction) of a computation's parameters."""
    return ((int(i.rest.split()[0]), i) for i in computation.values() if i.op == "parameter")


def source(i: Instruction) -> str:
    """Name of the operation in the model that an instruction serves; "" where none is noted."""
    match = re.search(r'op_name="([^"]*)"', i.rest)
    return match[1] if match else ""


def through(i: Instruction, computation: Computation, ops: tuple[str, ...]) -> Instruction:
    """Follows first operands back from `i`, through `ops`, to the first other instruction."""
    while i.op in ops and i.operands and i.operands[0] in computation:
        i = computation[i.operands[0]]
    return i
