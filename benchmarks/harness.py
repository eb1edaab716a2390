"""How things are measured: interleaved in one process, warm-up left out, medians, and what the compiler says."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      name, what: short name, and what is compared in words.
      ratio: baseline / ours; above 1 is better. None where nothing is compared.
      gate: what the ratio must reach, None where it is only reported.
      spread: smallest and largest ratio of a single round, where clocks were used.
      is_right: false where what was measured is wrong, however fast.
      detail: numbers behind the ratio and the floor they stand against, (name, text) pairs.
    """

    name: str
    what: str
    ratio: float | None
    gate: float | None
    spread: tuple[float, float] | None = None
    detail: tuple[tuple[str, str], ...] = ()
    is_right: bool = True

    @property
    def holds(self) -> bool:
        return self.is_right and (self.gate is None or (self.ratio is not None and self.ratio >= self.gate))

    def line(self) -> str:
        """For a terminal."""
        text = f"{'ok   ' if self.holds else 'FAILS'} {self.name:14}"
        if self.ratio is not None:
            text += f" {self.ratio:6.2f}"
        if self.spread:
            text += f"  ({self.spread[0]:.2f} - {self.spread[1]:.2f})"
        if self.gate is not None:
            text += f"  must reach {self.gate:g}"
        return "\n".join([text + f"   {self.what}", *(f"        {k}: {v}" for k, v in self.detail)])

    def json(self) -> dict[str, Any]:
        out = {"name": self.name, "ratio": self.ratio, "gate": self.gate, "holds": self.holds}
        return out | {"spread": self.spread, "what": self.what, "detail": dict(self.detail)}


@dataclasses.dataclass(frozen=True)
class Race:
    """Medians in seconds, their ratio, and the ratios of single rounds."""

    baseline: float
    ours: float
    ratio: float
    spread: tuple[float, float]


def race(baseline: Callable[[], Any], ours: Callable[[], Any], *, rounds: int = 5, warm_up: int = 1) -> Race:
    """Times both in turn; what they return is waited for."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(function())
        return time.perf_counter() - start

    for _ in range(warm_up):
        seconds(baseline), seconds(ours)
    return race_of([(seconds(baseline), seconds(ours)) for _ in range(rounds)])


def race_of(times: Sequence[tuple[float, float]]) -> Race:
    """The race of (baseline, ours) seconds, a pair a round."""
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [x / y for x, y in times]
    return Race(a, b, a / b, (min(ratios), max(ratios)))


def product_rate(size: int, dtype: Any) -> float:
    """FLOP/s of a plain product of two matrices, now, on this device."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)  # zeros and ones multiply faster
    return 2 * size**3 * _per_second(lambda x, y: (x @ y) * size**-0.5, x, x)


def copy_rate(bytes_copied: int) -> float:
    """Bytes/s of a plain copy, read and written, now, on this device."""
    x = jnp.zeros((bytes_copied // 2,), jnp.bfloat16)
    return 2 * x.nbytes * _per_second(lambda one, x: x + one, jnp.bfloat16(1), x)


def _per_second(function: Callable[[Any, Any], Any], x: Any, y: Any, *, times: int = 20, rounds: int = 3) -> float:
    """How often y becomes function(x, y) in a second. Many in one program: a launch's time is not the device's."""
    program = jax.jit(lambda x, y: jax.lax.fori_loop(0, times, lambda _, y: function(x, y), y))
    jax.block_until_ready(program(x, y))
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(program(x, y))
        spent.append(time.perf_counter() - start)
    return times / statistics.median(spent)


def compiled(function: Callable, *args: Any, static: Sequence[int] = ()) -> Any:
    """The compiled program for these arguments, which may be shapes."""
    return jax.jit(function, static_argnums=tuple(static)).lower(*args).compile()


def flops(program: Any) -> float:
    """Floating point operations of a compiled program. Loops count once: unroll them to count them."""
    cost = program.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def temporary_bytes(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def abstract(tree: Any) -> Any:
    """Shapes and types of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def tera(x: float) -> str:
    return f"{x / 1e12:.2f} TFLOP"
