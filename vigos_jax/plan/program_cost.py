"""What a program costs, read from the program: floating-point operations, memory traffic, and what devices exchange.

XLA's own cost analysis counts the body of a loop once, and a model's layers are a loop. Here every count is
multiplied by the trip counts of the loops around it. Operations are counted in the traced program, the same for all
platforms; traffic and collectives in the compiled one, after the compiler has placed and fused everything.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# -- operations -------------------------------------------------------------------------------------------------


def flops(jaxpr: ClosedJaxpr | Jaxpr, *, trip_count: int = 1) -> float:
    """Multiplications and additions of all matrix products, on all devices together; 2 for each pair.

    Everything else of such a model is below a percent. A branch counts as its most expensive side.

    Args:
      trip_count: of every loop whose length is not in the program (`while_loop`).
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


# -- the compiled program ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: of KINDS.
      shapes: what it works on, like "bf16[1,2048,11008]": the whole of a gather, the whole input of a reduction.
      moved: bytes that each device receives in one execution, by the ring algorithm.
      executions: in one run of the program, loops included.
      depth: loops around it.
      source: name of the operation in the model that it serves.
    """

    kind: str
    shapes: tuple[str, ...]
    moved: float
    executions: float
    depth: int
    source: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a compiled program moves on one device.

    Attributes:
      memory: bytes read and written in the device's memory.
      collectives: all exchanges.
      unknown_loops: names of loops whose trip count could not be read; they count with what `read_traffic` was given.
    """

    memory: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]

    def moved(self) -> dict[str, float]:
        """Bytes that each device receives, by kind."""
        out = dict.fromkeys(KINDS, 0.0)
        for c in self.collectives:
            out[c.kind] += c.moved * c.executions
        return {kind: n for kind, n in out.items() if n}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # attributes; for a constant or parameter its value or number stands first
    is_root: bool


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OP = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota", "domain")
)
_CALLERS = frozenset(("while", "conditional", "call", "async-start", "async-update", "async-done"))


def read_traffic(text: str, *, devices: int, trip_count: int = 1, emulates_16_bits: bool = False) -> Traffic:
    """Reads the text of a compiled program.

    A loop's trip count is what the compiler noted, else the constant that its counter is compared with, divided by what
    the counter grows by. Of a branch the side that moves more memory counts, and the exchanges of both. An exchange
    that the compiler spread over several fusions is one. What a fusion slices out of an array is read, not the array;
    what stays in on-chip memory is free.

    Args:
      devices: that run the program.
      trip_count: of loops whose length is not in the program: those of `while_loop`.
      emulates_16_bits: of a CPU, which computes 16-bit floats in 32 bits: these count as 16, conversions as nothing.
    """
    parsed = _parse(text.replace("f32[", "bf16[") if emulates_16_bits else text)
    found: list[Collective] = []
    unknown: list[str] = []

    def visit(name: str, times: float, depth: int, seen: set[str], is_fused: bool) -> float:
        memory = 0.0
        for i in parsed[name].values():
            if kind := _kind(i, name):
                channel = re.search(r"channel_id=(\d+)", i.rest)
                if channel is None or channel[1] not in seen:
                    seen.add(channel[1] if channel else i.name)
                    found.append(_collective(kind, i, devices=devices, times=times, depth=depth))
            elif i.op == "while":
                n = _trips(i, parsed)
                if n is None:
                    unknown.append(_source(i) or i.name)
                runs = times * (trip_count if n is None else n)
                memory += visit(_called(i, "body")[0], runs, depth + 1, set(), False)
            else:
                is_fusion = i.op == "fusion"
                parts = [visit(t, times, depth, seen if is_fusion else set(), is_fusion) for t in _called(i)]
                memory += max(parts, default=0.0) if i.op == "conditional" else sum(parts)
            if not is_fused and i.op not in _FREE | _CALLERS and not (emulates_16_bits and _converts(i, parsed)):
                memory += times * _touched(i, parsed[name], parsed)
        return memory

    memory = visit(next(name for name in parsed if parsed[name] is parsed["ENTRY"]), 1.0, 0, set(), False)
    return Traffic(memory, tuple(found), tuple(unknown))


def _parse(text: str) -> dict[str, dict[str, _Instruction]]:
    """Computations by name, each its instructions by name; the one that is run first also as "ENTRY"."""
    out: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and (head := _HEAD.match(line)):
            current = out.setdefault(head[2], {})
            if head[1]:
                out["ENTRY"] = current
        elif (match := _LINE.match(line)) and (op := _OP.search(" " + match[3])):
            body = " " + match[3]
            end = _closing(body, op.end() - 1)
            inside = body[op.end() : end]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            rest = inside + " " + body[end + 1 :]
            current[match[2]] = _Instruction(match[2], body[: op.start()], op[1], operands, rest, bool(match[1]))
    return out


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    level = 0
    for i in range(at, len(text)):
        level += {"(": 1, ")": -1}.get(text[i], 0)
        if level == 0:
            return i
    return len(text)


def _arrays(shape: str) -> list[tuple[str, float]]:
    """("bf16[2,3]", bytes in the device's memory) of each array of a shape."""
    out = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = _BITS[dtype] if dtype in _BITS else int((re.search(r"\d+", dtype) or ["0"])[0])
        size = bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
        out.append((f"{dtype}[{dims}]", 0.0 if "S(1)" in layout else size))
    return out


def _size(shape: str) -> float:
    """Bytes, wherever they are."""
    return sum(size for _, size in _arrays(shape.replace("S(1)", "")))


def _called(i: _Instruction, *names: str) -> list[str]:
    """Computations that an instruction runs, but for those that combine two numbers."""
    if i.op in ("reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter"):
        return []
    wanted = names or ("body", "condition", "calls", "to_apply", "true_computation", "false_computation")
    out = [m for n in wanted for m in re.findall(rf"\b{n}=%?([\w.\-]+)", i.rest)]
    if not names and (branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest)):
        out += [b.strip().lstrip("%") for b in branches[1].split(",")]
    return out


def _kind(i: _Instruction, computation: str) -> str | None:
    op = i.op.removesuffix("-start")
    if op not in KINDS:
        return None
    # A TPU's way of writing it: the sum, of which the same fusion then keeps the device's part.
    return "reduce-scatter" if op == "all-reduce" and "all-reduce-scatter" in computation else op


def _collective(kind: str, i: _Instruction, *, devices: int, times: float, depth: int) -> Collective:
    arrays = [(name, _size(name)) for name, _ in _arrays(i.shape)]
    if i.op in ("all-gather-start", "collective-permute-start"):  # (operand, result, ...)
        arrays = arrays[1:2]
    n = _group_size(i.rest, devices)
    size = sum(size for _, size in arrays)
    if kind == "reduce-scatter" and i.op != "all-reduce":
        size, arrays = size * n, [(f"{n} x {name}", 0.0) for name, _ in arrays]
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    return Collective(kind, tuple(name for name, _ in arrays), size * share, times, depth, _source(i))


def _group_size(rest: str, devices: int) -> int:
    """Devices of one group: of `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['x'=2,'y'=4] {'y'}`, or all."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{,]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return devices


def _source(i: _Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', i.rest)
    return match[1] if match else ""


def _trips(loop: _Instruction, parsed: Mapping[str, dict[str, _Instruction]]) -> float | None:
    if match := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(match[1])
    condition, body = (parsed[_called(loop, part)[0]] for part in ("condition", "body"))
    compare = next(i for i in condition.values() if i.is_root)
    if compare.op == "fusion":
        inner = next(i for i in parsed[_called(compare)[0]].values() if i.is_root)
        if inner.op != "compare":
            return None
        compare = dataclasses.replace(compare, op="compare", rest=inner.rest)
    if compare.op != "compare" or "direction=LT" not in compare.rest or len(compare.operands) != 2:
        return None
    counter, limit = (condition.get(name) for name in compare.operands)
    index = re.search(r"index=(\d+)", counter.rest) if counter and counter.op == "get-tuple-element" else None
    if index is None or limit is None or limit.op != "constant":
        return None
    root = next(i for i in body.values() if i.is_root)
    step = _growth(body.get(root.operands[int(index[1])]), body, parsed) if root.op == "tuple" else None
    return math.ceil(int(limit.rest.split()[0]) / (step or 1))


def _growth(i: _Instruction | None, body: Mapping[str, _Instruction], parsed: Any) -> int | None:
    """The constants that are added up to `i` in a loop's body, through copies and small fusions."""
    total = 0
    for _ in range(8):  # as deep as such a chain is
        if i is None:
            return None
        if i.op == "fusion":
            inner = parsed[_called(i)[0]]
            root = next(x for x in inner.values() if x.is_root)
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


def _touched(i: _Instruction, around: Mapping[str, _Instruction], parsed: Any) -> float:
    """Bytes of the device's memory that an instruction reads and writes."""
    stored = lambda shape: sum(size for _, size in _arrays(shape))  # noqa: E731
    if i.op.endswith(("-done", "-update")):
        return 0.0
    operands = [stored(around[name].shape) if name in around else 0.0 for name in i.operands]
    if i.op in ("dynamic-slice", "gather", "slice"):
        return 2 * stored(i.shape)
    if i.op == "dynamic-update-slice":
        return 2 * operands[1]
    written = stored(i.shape)
    targets = _called(i)
    if i.op != "fusion" or not targets:
        return written + sum(operands)
    inner = parsed[targets[0]]
    for x in inner.values():
        if x.op != "parameter":
            continue
        number, users = int(x.rest.split()[0]), list(_users(x.name, inner, parsed))
        if users and all(u.op in ("dynamic-slice", "gather", "slice") for u in users):
            operands[number] = min(operands[number], sum(_size(u.shape) for u in users))
        elif users and all(u.op == "dynamic-update-slice" for u in users):
            updated = sum(_size(u.shape) for u in users)
            written = max(0.0, written - operands[number]) + min(operands[number], updated)
            operands[number] = 0.0
    return written + sum(operands)


def _users(name: str, inner: Mapping[str, _Instruction], parsed: Any) -> Iterator[_Instruction]:
    """What a fusion does with a whole array first, seen through fusions in it and changes of type and shape.

    The shape of an update is that of what it writes. What merely names the array as an index reads all of it.
    """
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.op in ("convert", "bitcast") and not user.is_root:
            yield from _users(user.name, inner, parsed)
        elif user.op == "fusion":
            nested, number = parsed[_called(user)[0]], str(user.operands.index(name))
            same = next(x for x in nested.values() if x.op == "parameter" and x.rest.split()[0] == number)
            yield from _users(same.name, nested, parsed)
        elif user.operands[0] != name:
            yield dataclasses.replace(user, op="read")
        elif user.op == "dynamic-update-slice":
            yield dataclasses.replace(user, shape=inner[user.operands[1]].shape)
        else:
            yield user


def _converts(i: _Instruction, parsed: Any) -> bool:
    """Whether an instruction gives an array another type, and does nothing else but choose which."""
    if i.op == "convert":
        return True
    if i.op != "fusion":
        return False
    inner = [x for x in parsed[_called(i)[0]].values() if not re.search(r"\[\]", x.shape)]
    allowed = ("parameter", "constant", "convert", "bitcast", "dynamic-slice", "copy")
    return any(x.op == "convert" for x in inner) and all(x.op in allowed for x in inner)


def traced_flops(function: Callable, *args: Any, trip_count: int = 1) -> float:
    """`flops` of a jitted function for abstract or real arguments."""
    return flops(jax.jit(function).trace(*args).jaxpr, trip_count=trip_count)
