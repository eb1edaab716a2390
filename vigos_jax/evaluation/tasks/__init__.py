"""The benchmarks, found by name: every file here but task.py has a TASK, or several TASKS."""

import importlib
import pkgutil
from collections.abc import Iterator

from vigos_jax.errors import InputError
from vigos_jax.evaluation.tasks.task import Task


def _found() -> Iterator[Task]:
    for file in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{file}")
        yield from getattr(module, "TASKS", None) or ([module.TASK] if hasattr(module, "TASK") else [])


TASKS: dict[str, Task] = {task.name: task for task in _found()}


def find_task(name: str) -> Task:
    """The task of this name; InputError with the choices if there is none."""
    if name not in TASKS:
        raise InputError(f"config.eval.tasks: {name!r} is unknown; choices: {', '.join(TASKS)}")
    return TASKS[name]
