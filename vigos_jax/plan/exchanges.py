"""Exchanges between devices in a compiled program: their kind, what they move, and how often."""

import dataclasses
import math
import re

from vigos_jax.plan.hlo import Instruction, arrays, source

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of KINDS.
      shapes: full arrays, like "bf16[1,2048,11008]": the output of a gather, the input of a reduction.
      moved: bytes that each device receives in one execution, by the ring algorithm.
      executions: in one run of the program, loops included.
      depth: number of enclosing loops.
      source: name of the model operation it belongs to.
    """

    kind: str
    shapes: tuple[str, ...]
    moved: float
    executions: float
    depth: int
    source: str


def kind_of(i: Instruction, computation: str) -> str | None:
    """The kind of collective that an instruction of a computation is; None if it is not one."""
    if i.op not in KINDS:
        return None
    # TPUs express a reduce-scatter as an all-reduce in a fusion that keeps only the device's part.
    return "reduce-scatter" if i.op == "all-reduce" and "all-reduce-scatter" in computation else i.op


def collective(kind: str, i: Instruction, *, devices: int, times: float, depth: int) -> Collective:
    """Of an instruction that is an exchange of that kind.

    Args:
      devices: that run the program.
      times, depth: how often it runs, in how many loops.
    """
    results = arrays(i.shape)
    n = _group_size(i.rest, devices)
    size, names = sum(a.size for a in results), [a.name for a in results]
    if kind == "reduce-scatter" and i.op != "all-reduce":
        size, names = size * n, [f"{n} x {name}" for name in names]
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
    return Collective(kind, tuple(names), size * share, times, depth, source(i))


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
