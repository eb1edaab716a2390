"""What a study consists of: bases of worlds, leak strengths and seeds, the methods run on them, and their config."""

import dataclasses
import pathlib
from collections import Counter
from typing import Any

import ml_collections

from vigos_jax.demo.world import WORLDS
from vigos_jax.errors import InputError
from vigos_jax.miniature import tables

BASES = ("base", "base_free_form")  # in the place of a method, for what a base does itself


@dataclasses.dataclass(frozen=True)
class Unit:
    """A base and the methods that are run on it."""

    world: str
    leak: float
    seed: int
    methods: tuple[str, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What its records have in common."""
        return {"world": self.world, "leak_strength": self.leak, "seed": self.seed}

    def folder(self, workdir: pathlib.Path, method: str = "base") -> pathlib.Path:
        """Where its base or a run lies."""
        return workdir / f"{method}-{self.world}-{self.leak}-{self.seed}"

    def captions_file(self, workdir: pathlib.Path) -> pathlib.Path:
        """What its base shares with those of other leak strengths: its params before the responses are trained."""
        return workdir / f"captions-{self.world}-{self.seed}.npz"


def units(config: ml_collections.ConfigDict) -> list[Unit]:
    """The whole study, in the order in which it is done: the strongest leak first."""
    groups = sorted(config.groups.values(), key=lambda group: -group.leak)
    return [Unit(w, g.leak, seed, tuple(g.methods)) for g in groups for seed in g.seeds for w in config.worlds]


FIELDS = {"worlds", "methods", "free_form", "groups", "questions", "palr_rows", "workers", "known"}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for a config that is not a study's, or has something twice or a method that is not there."""
    if missing := sorted(FIELDS - set(config)):
        raise InputError(f"this config is not a study: it lacks {', '.join(missing)}; see configs/miniature/study.py")
    for field, least in (("questions", 1), ("palr_rows", 2), ("workers", 1)):
        if type(config[field]) is not int or config[field] < least:
            raise InputError(f"config.{field}={config[field]!r}: must be a whole number of at least {least}")
    for method, options in config.methods.items():
        if method in BASES:
            raise InputError(f"config.methods.{method}: the name is taken; choose another than {', '.join(BASES)}")
        if not is_list_of(options, str):
            raise InputError(
                f"config.methods.{method}={options!r}: must be a tuple of options, like ('--config=FILE',)"
            )
    _check_names("config.worlds", tuple(config.worlds), tuple(WORLDS))
    _check_names("config.free_form", config.free_form, tuple(config.methods))
    for name, group in config.groups.items():
        _check_group(f"config.groups.{name}", group, tuple(config.methods))
    if not any(group.leak == tables.LEAKY for group in config.groups.values()):
        raise InputError(f"config.groups: one must have leak={tables.LEAKY}, which the tables are of")
    _check_unique(units(config))


def _check_unique(all_units: list[Unit]) -> None:
    cells = Counter((*u.key.values(), method) for u in all_units for method in ("its base", *u.methods))
    for (world, leak, seed, method), times in cells.items():
        if times > 1:
            where = f"{world}, leak {leak}, seed {seed}, {method}"
            raise InputError(f"config.groups: {where} is there {times} times; it must be there once")


def _check_group(field: str, group: ml_collections.ConfigDict, methods: tuple[str, ...]) -> None:
    if lacks := {"leak", "seeds", "methods"} - set(group):
        raise InputError(f"{field} lacks {', '.join(sorted(lacks))}; see configs/miniature/study.py")
    if type(group.leak) not in (int, float) or not 0 <= group.leak <= 1:
        raise InputError(f"{field}.leak={group.leak!r}: must be a number from 0 to 1")
    if not is_list_of(group.seeds, int) or min(group.seeds, default=0) < 0:
        raise InputError(f"{field}.seeds={group.seeds!r}: must be a tuple of whole numbers of at least 0")
    _check_names(f"{field}.methods", group.methods, methods)


def _check_names(field: str, names: Any, choices: tuple[str, ...]) -> None:
    if not is_list_of(names, str):
        raise InputError(f"{field}={names!r}: must be a tuple of names; choices: {', '.join(choices)}")
    if unknown := sorted(set(names) - set(choices)):
        raise InputError(f"{field}: {unknown[0]!r} is unknown; choices: {', '.join(choices)}")


def is_list_of(value: Any, kind: type) -> bool:
    """Whether it is a tuple or list of nothing but `kind`."""
    return isinstance(value, tuple | list) and all(type(x) is kind for x in value)
