"""The benchmarks by name, in the order of the paper's tables."""

from vigos_jax.errors import InputError
from vigos_jax.evaluation.tasks import (
    cv_bench,
    demo,
    mathverse,
    mathvista,
    mm_vet,
    mmmu,
    mmsi,
    realworldqa,
    vilp,
    vlind,
)
from vigos_jax.evaluation.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        mm_vet.TASK,
        mmmu.MMMU,
        mmmu.MMMU_PRO,
        mmmu.MMMU_PRO_VISION,
        mathverse.TASK,
        mathvista.TASK,
        mmsi.TASK,
        realworldqa.TASK,
        cv_bench.TASK,
        vilp.VILP_F,
        vilp.VILP_P,
        vlind.TASK,
        demo.TASK,
    )
}


def find_task(name: str) -> Task:
    """The task of this name; InputError with the choices if there is none."""
    if name not in TASKS:
        raise InputError(f"config.eval.tasks: {name!r} is unknown; choices: {', '.join(TASKS)}")
    return TASKS[name]
