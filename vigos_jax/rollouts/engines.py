"""Which engine a config asks for."""

import functools
import pathlib

from vigos_jax.rollouts.engine import EngineFactory, NativeEngine
from vigos_jax.rollouts.server_engine import ServerEngine
from vigos_jax.rollouts.server_start import check_servers
from vigos_jax.runtime.distributed import first_decides


def engine_of(config, workdir: pathlib.Path | None, *, for_evaluation: bool = False) -> EngineFactory:
    """What makes the engine of `config.rollout`; for the answers of `config.eval`, as `config.eval.engine` says.

    Args:
      workdir: of a run, where adapters for servers go; None where there is none.
    """
    if not uses_servers(config, for_evaluation=for_evaluation):
        return NativeEngine
    return functools.partial(ServerEngine, config=config, workdir=workdir)


def uses_servers(config, *, for_evaluation: bool = False) -> bool:
    """Whether servers sample: rollouts, or the answers of evaluations."""
    return config.rollout.engine != "native" and (not for_evaluation or config.eval.engine == "rollout")


def check_engine(config, *, trains: bool, for_evaluation: bool = False) -> None:
    """Raises InputError unless the engine can do what is asked of it. Before anything is loaded.

    Args:
      trains: whether it samples for a run's training.
    """
    if uses_servers(config, for_evaluation=for_evaluation):
        first_decides(lambda: check_servers(config, trains=trains))
