"""The results of a plan: as numbers, as JSON and as a text table."""

import dataclasses
from typing import Any

from vigos_jax.plan.devices import Rates
from vigos_jax.plan.program_cost import Array

_GB, _TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a step; bytes and operations are of one execution on one device.

    Attributes:
      runs: executions in a step.
      arguments, outputs, temporaries, aliased: as the compiler assigns them; aliased outputs reuse arguments' memory.
      beside: everything else that stays resident on the device meanwhile.
      flops: of matrix products, recomputation included; the work of all devices divided by their number.
      traffic: bytes read from and written to memory.
      moved: bytes received from other devices, by kind of collective.
      kernels: launched per execution.
      split_sums: of these, sums of the partial results of a split matrix product; see `program_cost.Traffic`.
      largest: the largest array it allocates, arguments and in-place updates excluded.
      floor: lower bound on the traffic of `decode`; 0 if unknown.
      tokens: decoded per execution; 1 for programs that decode none.
      layers: number of model layers it runs; 0 for programs that run none.
      compile_seconds: of tracing, lowering and compiling, on this machine.
      unknown_loops: loops whose body was counted as often as a completion has tokens.
      refused: why the compiler refused it; else empty.
    """

    name: str
    runs: int
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    aliased: int = 0
    beside: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    moved: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: float = 0.0
    split_sums: float = 0.0
    largest: Array | None = None
    floor: float = 0.0
    tokens: int = 1
    layers: int = 0
    compile_seconds: float = 0.0
    unknown_loops: tuple[str, ...] = ()
    refused: str = ""

    @property
    def peak(self) -> int:
        """Bytes on one device while the program runs."""
        return self.arguments + self.outputs + self.temporaries - self.aliased + self.beside

    @property
    def kernels_per_token(self) -> float:
        """Kernels per decoded token, or per execution of a program that decodes none."""
        return self.kernels / self.tokens

    @property
    def kernels_per_layer(self) -> float:
        """`kernels_per_token` divided by `layers`, kernels outside the layers included; 0 without layers."""
        return self.kernels_per_token / self.layers if self.layers else 0.0

    @property
    def traffic_per_token(self) -> float:
        """Bytes read and written for a decoded token; of a program that decodes none, in an execution."""
        return self.traffic / self.tokens

    def counts(self) -> dict[str, float]:
        """What follows from the other numbers, for JSON."""
        out = {"peak": self.peak, "kernels_per_token": self.kernels_per_token}
        out |= {"kernels_per_layer": self.kernels_per_layer, "traffic_per_token": self.traffic_per_token}
        return out | {"floor_per_token": self.floor / self.tokens}

    def times(self, rates: Rates) -> dict[str, float]:
        """Seconds of one execution by each of the three resources, at its full rate."""
        return {
            "arithmetic": self.flops / (rates.tflops * _TERA),
            "memory": self.traffic / (rates.bandwidth_gbs * _GB),
            "interconnect": sum(self.moved.values()) / (rates.interconnect_gbs * _GB),
        }

    def bound(self, rates: Rates) -> tuple[str, float]:
        """The resource that takes longest, and its seconds."""
        return max(self.times(rates).items(), key=lambda item: item[1])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on given devices.

    Attributes:
      parameters, trained: counts.
      base_bytes, trained_bytes, opt_state_bytes, cache_bytes: on one device.
      advice: the first change that made everything fit; None where none of `tried` did, or none was tried.
      tried: changes that were compiled, with the peak that each has.
      notes: facts of the devices without which the numbers mislead.
    """

    model: str
    topology: str
    devices: int
    rates: Rates
    mesh: dict[str, int]
    sizes: dict[str, int]
    batch_size: int
    gradient_accumulation_steps: int
    remat: str
    attention: str
    dtype: str
    parameters: int
    trained: int
    base_bytes: int
    trained_bytes: int
    opt_state_bytes: int
    cache_bytes: int
    programs: tuple[Program, ...]
    advice: str | None = None
    tried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether every program could be compiled."""
        return not any(p.refused for p in self.programs)

    @property
    def peak(self) -> int:
        """Bytes on one device at the worst moment of a step."""
        return max(p.peak for p in self.programs)

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return sum(p.runs * p.bound(self.rates)[1] for p in self.programs)

    @property
    def flops(self) -> float:
        """Of a step, on all devices."""
        return self.devices * sum(p.runs * p.flops for p in self.programs)

    @property
    def fits(self) -> bool:
        """Whether every program has the memory it needs."""
        return all(self.holds(p) for p in self.programs)

    def holds(self, program: Program) -> bool:
        """Whether a device has the memory for a program."""
        return not program.refused and program.peak <= self.rates.memory_gb * _GB

    def moved(self) -> dict[str, float]:
        """Bytes that one device receives in a step, by kind."""
        out: dict[str, float] = {}
        for p in self.programs:
            for kind, n in p.moved.items():
                out[kind] = out.get(kind, 0.0) + p.runs * n
        return out

    def to_json(self) -> dict[str, Any]:
        """All numbers; bytes, operations, seconds."""
        out = dataclasses.asdict(self)
        for program, entry in zip(self.programs, out["programs"], strict=True):
            entry |= {**program.counts(), "seconds": program.times(self.rates)}
        totals = {"fits": self.fits, "is_whole": self.is_whole, "peak": self.peak}
        return out | totals | {"flops": self.flops, "seconds": self.seconds, "moved": self.moved()}


_COLUMNS = ("program", "runs", "arguments", "temporaries", "outputs", "beside", "peak GB")
_COLUMNS += ("TFLOP", "memory GB", "received GB", "seconds", "bound by")
_COUNTS = ("program", "kernels", "a layer", "split sums", "compile s", "largest GB", "largest array")


def report(plan: Plan) -> str:
    """The plan as text."""
    s, rates, memory = plan.sizes, plan.rates, plan.rates.memory_gb
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    micro = plan.batch_size // plan.gradient_accumulation_steps
    lines = [
        f"{plan.model} on {plan.topology}: {plan.devices} devices of {memory:g} GB, {mesh}, {plan.dtype}, "
        f"remat={plan.remat}, attention={plan.attention}",
        f"at {rates.tflops:g} TFLOP/s, {rates.bandwidth_gbs:g} GB/s of memory, {rates.interconnect_gbs:g} GB/s between "
        "devices, each",
        f"a step: {plan.batch_size} rows of {s['patches']} patches, {s['prompt']} prompt and {s['completion']} "
        f"completion tokens; {plan.gradient_accumulation_steps} micro-batches of {micro} rows, student {s['student']} "
        f"and teachers {s['teacher']} tokens",
        "",
        f"parameters {plan.parameters:,}, trained {plan.trained:,}",
        f"on each device: base {_gb(plan.base_bytes)} GB, trained {_gb(plan.trained_bytes)} GB, optimizer state "
        f"{_gb(plan.opt_state_bytes)} GB, KV cache {_gb(plan.cache_bytes)} GB",
        "",
        _table([_COLUMNS, *(_row(plan, p) for p in plan.programs)]),
        "",
        _table([_COUNTS, *(_counts_row(p) for p in plan.programs if not p.refused)]),
        "",
        *_decoding(plan.programs),
        f"received in a step by each device: {_moved(plan.moved())}",
        f"a step: {plan.flops / 1e15:.2f} PFLOP on all devices, at least {plan.seconds:.1f} s; peak "
        f"{_gb(plan.peak)} of {memory:g} GB on each",
    ]
    if unknown := sorted({loop for p in plan.programs for loop in p.unknown_loops}):
        lines.append(f"loops of unknown length, counted {s['completion']} times: {', '.join(unknown)}")
    return "\n".join([*lines, *plan.notes, *_verdict(plan)])


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return ["fits"]
    worst = [f"{p.name} {p.refused or f'needs {_gb(p.peak)} GB'}" for p in plan.programs if not plan.holds(p)]
    out = [f"does not fit: {', '.join(worst)}"]
    if plan.advice:
        out.append(f"fits with {plan.advice}")
    elif plan.tried:
        out.append("none of the changes tried makes it fit: it needs more devices, or more memory on each")
    return [*out, *(f"  tried {change}" for change in plan.tried)]


def _row(plan: Plan, p: Program) -> tuple[str, ...]:
    if p.refused:
        return (p.name, str(p.runs), *["-"] * 4, "refused", f"{p.flops / _TERA:.1f}", *["-"] * 4)
    kind, seconds = p.bound(plan.rates)
    sizes = (p.arguments, p.temporaries, p.outputs - p.aliased, p.beside, p.peak)
    per_step = (p.traffic, sum(p.moved.values()))
    return (
        *(p.name, str(p.runs), *map(_gb, sizes), f"{p.flops * p.runs / _TERA:.1f}"),
        *(f"{n * p.runs / _GB:.1f}" for n in per_step),
        *(f"{seconds * p.runs:.2f}", kind),
    )


def _counts_row(p: Program) -> tuple[str, ...]:
    """Kernels of one execution, or of one token where tokens are decoded."""
    largest = (_gb(p.largest.bytes), p.largest.shape) if p.largest else ("-", "-")
    layer = f"{p.kernels_per_layer:.1f}" if p.layers else "-"
    kernels = (f"{p.kernels_per_token:.0f}", layer, f"{p.split_sums / p.tokens:.0f}")
    return (p.name, *kernels, f"{p.compile_seconds:.1f}", *largest)


def _decoding(programs: tuple[Program, ...]) -> list[str]:
    """What a decoded token moves, and the least it could."""
    return [
        f"{p.name}: {_gb(p.traffic_per_token)} GB a token, {p.traffic / p.floor:.2f} times weights + adapters + cache "
        f"({_gb(p.floor / p.tokens)} GB); its kernels are those of a token"
        for p in programs
        if p.floor and not p.refused
    ]


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i in (0, len(widths) - 1) else cell.rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def _gb(n: float) -> str:
    return f"{n / _GB:.{2 if n >= 0.05 * _GB else 5}f}"


def _moved(by_kind: dict[str, float]) -> str:
    return ", ".join(f"{kind} {n / _GB:.2f} GB" for kind, n in by_kind.items()) or "nothing"
