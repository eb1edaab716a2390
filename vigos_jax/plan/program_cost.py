"""What a compiled program costs, read from its text: memory traffic, kernels, exchanges, its largest array.

XLA's own cost analysis counts the body of a loop once, and a model's layers are a loop. Here every count is
multiplied by the trip counts of the loops around it.
"""

import dataclasses
import re

from vigos_jax.plan.exchanges import KINDS, Collective, collective, kind_of
from vigos_jax.plan.hlo import Computation, Computations, Instruction, arrays, called, parse, root_of, source, through
from vigos_jax.plan.loops import trip_count as trips_of
from vigos_jax.plan.memory_traffic import converts, is_marker, touched

_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
) | frozenset(("iota", "domain", "opt-barrier", "add-dependency"))
_CALLERS = frozenset(("while", "conditional", "call", "async-start", "async-update", "async-done"))


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a program makes in the device's memory.

    Attributes:
      bytes: on one device.
      shape: like "f32[64,10240,1344]".
      source: name of the operation in the model that makes it.
    """

    bytes: float
    shape: str
    source: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one execution of a compiled program takes on one device.

    Attributes:
      memory: bytes read and written in the device's memory.
      kernels: number of launches: fusions, products, copies, custom calls, collectives.
      split_sums: of these, kernels that sum the partial results of a matrix product that the compiler split. Without
        a GPU for autotuning it splits by a heuristic; with one it may not.
      collectives: all of them.
      largest: the largest array allocated, arguments and in-place updates excluded; None if there is none.
      unknown_loops: names of loops of unknown trip count; they are counted with `read_traffic`'s `trip_count`.
    """

    memory: float
    kernels: float
    split_sums: float
    collectives: tuple[Collective, ...]
    largest: Array | None
    unknown_loops: tuple[str, ...]

    def moved(self) -> dict[str, float]:
        """Bytes that each device receives, by kind."""
        out = dict.fromkeys(KINDS, 0.0)
        for c in self.collectives:
            out[c.kind] += c.moved * c.executions
        return {kind: n for kind, n in out.items() if n}


def read_traffic(text: str, *, devices: int, trip_count: int = 1, emulates_16_bits: bool = False) -> Traffic:
    """Reads the text of a compiled program.

    For trip counts see `loops.trip_count`. A conditional costs its branch with the most memory traffic, and the
    collectives of both. A collective that the compiler spread over several fusions counts once. A fusion that slices
    an array reads only the slice; on-chip memory is free.

    Args:
      devices: number of devices that run the program.
      trip_count: assumed for loops whose length is not in the program (`while_loop`).
      emulates_16_bits: for a CPU, which computes 16-bit floats in float32: counts them as 16-bit, conversions as free.
    """
    parsed, entry = parse(text.replace("f32[", "bf16[") if emulates_16_bits else text)
    reader = _Reader(parsed, devices, trip_count, emulates_16_bits)
    cost = reader.visit(entry, times=1.0, depth=0, seen=set())
    return Traffic(
        memory=cost.memory,
        kernels=cost.kernels,
        split_sums=cost.split_sums,
        collectives=tuple(reader.collectives),
        largest=reader.largest,
        unknown_loops=tuple(reader.unknown_loops),
    )


@dataclasses.dataclass(frozen=True)
class _Cost:
    memory: float = 0.0
    kernels: float = 0.0
    split_sums: float = 0.0

    def __add__(self, other: "_Cost") -> "_Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return _Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclasses.dataclass
class _Reader:
    """One pass over a program: costs are returned, what is listed is collected here."""

    parsed: Computations
    devices: int
    trip_count: int
    emulates_16_bits: bool
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    largest: Array | None = None

    def visit(self, name: str, *, times: float, depth: int, seen: set[str]) -> _Cost:
        """A computation that runs `times` times, in `depth` loops.

        Args:
          seen: channels of exchanges that were counted in it.
        """
        total = _Cost()
        for i in self.parsed[name].values():
            if kind := kind_of(i, name):
                self._exchange(kind, i, times=times, depth=depth, seen=seen)
                total += self._own(i, name, times)
            elif i.op == "while":
                total += self._loop(i, times=times, depth=depth)
            elif i.op == "fusion":
                for target in called(i):  # a TPU's exchanges lie in fusions
                    self._exchanges(target, times=times, depth=depth, seen=seen)
                total += self._own(i, name, times)
            elif i.op in _CALLERS and i.op not in ("async-update", "async-done"):
                parts = [self.visit(t, times=times, depth=depth, seen=set()) for t in called(i)]
                if i.op == "conditional":
                    parts = sorted(parts, key=lambda part: part.memory)[-1:]
                total = sum(parts, total)
            elif i.op not in _FREE | _CALLERS:
                total += self._own(i, name, times)
        return total

    def _loop(self, i: Instruction, *, times: float, depth: int) -> _Cost:
        n = trips_of(i, self.parsed)
        if n is None:
            self.unknown_loops.append(source(i) or i.name)
        runs = times * (self.trip_count if n is None else n)
        condition, body = (called(i, part)[0] for part in ("condition", "body"))
        inside = self.visit(body, times=runs, depth=depth + 1, seen=set())
        return inside + self.visit(condition, times=runs, depth=depth + 1, seen=set())

    def _own(self, i: Instruction, name: str, times: float) -> _Cost:
        """Of one instruction that is a kernel, `times` times."""
        is_nothing = is_marker(i) or i.op.endswith("-done") or not sum(a.elements for a in arrays(i.shape))
        if is_nothing or (self.emulates_16_bits and converts(i, self.parsed)):
            return _Cost()
        around = self.parsed[name]
        moved = touched(i, around, self.parsed)
        for size, shape in moved.new:
            if self.largest is None or size > self.largest.bytes:
                self.largest = Array(size, shape, source(i))
        is_sum = _adds_partial_products(i, around, self.parsed)
        return _Cost(times * moved.bytes, times, times * is_sum)

    def _exchanges(self, name: str, *, times: float, depth: int, seen: set[str]) -> None:
        """Those of a fused computation."""
        for i in self.parsed[name].values():
            if kind := kind_of(i, name):
                self._exchange(kind, i, times=times, depth=depth, seen=seen)
            for target in called(i):
                self._exchanges(target, times=times, depth=depth, seen=seen)

    def _exchange(self, kind: str, i: Instruction, *, times: float, depth: int, seen: set[str]) -> None:
        channel = re.search(r"channel_id=(\d+)", i.rest)
        if channel is None or channel[1] not in seen:
            seen.add(channel[1] if channel else i.name)
            self.collectives.append(collective(kind, i, devices=self.devices, times=times, depth=depth))


_VIEWS = ("bitcast", "convert", "reshape", "transpose", "get-tuple-element")


def _adds_partial_products(i: Instruction, around: Computation, parsed: Computations) -> bool:
    """Whether a kernel sums an array over its first axis, which is a batch axis of the product that made it."""
    if i.op != "fusion":
        return False
    inner = parsed[called(i)[0]]
    for x in inner.values():
        if x.op != "reduce" or "dimensions={0}" not in x.rest:
            continue
        origin = through(inner[x.operands[0]], inner, _VIEWS)
        if origin.op == "parameter":
            maker = through(around[i.operands[int(origin.rest.split()[0])]], around, _VIEWS)
            if maker.op == "fusion":
                nested = parsed[called(maker)[0]]
                maker = through(root_of(nested), nested, _VIEWS)
            if maker.op == "dot" and "lhs_batch_dims={0" in maker.rest:
                return True
    return False
