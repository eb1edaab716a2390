"""A run's workdir: whose it is, whether the run may resume in it with this config, and what of it is finished."""

import os
import pathlib

import jax.numpy as jnp

from vigos_jax.config import differences, read_json, to_json, with_absolute_paths
from vigos_jax.errors import InputError
from vigos_jax.export.export import check_options
from vigos_jax.export.folder import Record, check_free
from vigos_jax.runtime import workdir as files
from vigos_jax.runtime.files import write_whole
from vigos_jax.training.step import make_optimizer

_OF_A_RUN = (files.METRICS, files.SNAPSHOTS, files.PAGE, files.EVALUATIONS, files.RESULTS, files.CHECKPOINTS)

_SHOWN = 12  # changes that an error lists
_BEFORE_THE_FIRST_STEP = (files.METRICS, files.QUANTIZATION, files.SNAPSHOTS, files.PAGE, files.EVALUATIONS)


def check_workdir(config, workdir: pathlib.Path) -> None:
    """Raises InputError unless the workdir belongs to a run of this config or to no run.

    A config that differs only in more `steps` may resume a run if the steps taken so far would have been the same. A
    run that took no step does not claim its workdir: another config may use it.
    """
    path = workdir / files.CONFIG
    if not path.exists():
        if found := [name for name in _OF_A_RUN if (workdir / name).exists()]:
            raise InputError(
                f"--workdir {workdir} has no {files.CONFIG}, but a {found[0]} that is not this run's; choose another"
            )
        return
    saved = read_json(path)
    changed = differences(saved, config)
    if _is_longer(saved, config) and len(changed) == 1:
        _check_extension(saved, config, workdir)
    elif changed and (_has_begun(workdir) or not set(config) <= set(saved)):
        shown = [*changed[:_SHOWN], *([f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else [])]
        raise InputError(f"{workdir} holds another run ({'; '.join(shown)}); choose another --workdir")


def _has_begun(workdir: pathlib.Path) -> bool:
    metrics = workdir / files.METRICS
    return _steps_taken(workdir) > 0 or (metrics.exists() and metrics.stat().st_size > 0)


def _is_longer(saved, config) -> bool:
    return type(saved.get("steps")) is int and config.steps > saved.steps


def _check_extension(saved, config, workdir: pathlib.Path) -> None:
    """Raises InputError if the steps taken would have had other learning rates in the longer run."""
    done = jnp.arange(_steps_taken(workdir))
    short, long = (make_optimizer(c.optimizer, steps=c.steps)[1] for c in (saved, config))
    if done.size and not bool(jnp.all(jnp.broadcast_to(short(done), done.shape) == long(done))):
        raise InputError(
            f"config.steps: {saved.steps} -> {config.steps}: with optimizer.schedule={config.optimizer.schedule} "
            f"the {done.size} steps taken would have had other learning rates; choices: schedule=constant from the "
            "start, or another --workdir that begins with this student (--mode export: an adapter for "
            "config.model.adapter, a merged model for config.model.path)"
        )


def _steps_taken(workdir: pathlib.Path) -> int:
    """The newest checkpoint's step; 0 where there is none."""
    folder = workdir / files.CHECKPOINTS
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def open_workdir(config, workdir: pathlib.Path) -> None:
    """Claims the workdir for this config. Call it only when the run can start: a bad config must not claim a workdir.

    If the config extends a finished run, the run's results and export are kept under names with its last step. Files
    of another config's run that took no step are deleted.
    """
    path = workdir / files.CONFIG
    try:
        if path.exists():
            saved = read_json(path)
            if not differences(saved, config):
                return
            if _has_begun(workdir):  # `check_workdir` let it pass: it is longer
                _set_aside(workdir, saved.steps)
            else:
                for name in _BEFORE_THE_FIRST_STEP:
                    (workdir / name).unlink(missing_ok=True)
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(path, (to_json(with_absolute_paths(config)) + "\n").encode())
    except OSError as e:
        raise InputError(f"cannot write to --workdir {workdir}: {e.strerror}; choose a writable folder") from e


def _set_aside(workdir: pathlib.Path, step: int) -> None:
    """Renames results and export of a run of `step` steps: results-step-N.json, export-step-N."""
    results, record = workdir / files.RESULTS, Record.of(workdir / files.EXPORTED)
    if results.exists():
        os.rename(results, results.with_stem(f"{results.stem}-step-{step}"))
    if record is not None:
        folder = pathlib.Path(record.output)
        if record.is_there(folder):
            os.rename(folder, folder.with_name(f"{folder.name}-step-{record.step}"))
        (workdir / files.EXPORTED).unlink()


def export_folder(config, workdir: pathlib.Path) -> pathlib.Path:
    """Where the run's export goes."""
    return pathlib.Path(config.export.output).expanduser() if config.export.output else workdir / files.EXPORT


def check_export(config, workdir: pathlib.Path, *, has_adapter: bool) -> None:
    """Raises InputError if the export at the end of the run is bound to fail, before the run has cost anything."""
    check_options(config.export, has_adapter=has_adapter)
    output, record = export_folder(config, workdir), Record.of(workdir / files.EXPORTED)
    is_former = record is not None and record.step < config.steps and record.is_there(output)
    if not (is_former or is_exported(config, workdir)):
        check_free(output)


def is_exported(config, workdir: pathlib.Path) -> bool:
    """Whether the folder of the run's export holds what this run exported there, as `config.export` says."""
    record = Record.of(workdir / files.EXPORTED)
    wanted = (config.export.kind, config.export.dtype, config.steps)
    is_this = record is not None and (record.kind, record.dtype, record.step) == wanted
    return record is not None and is_this and record.is_there(export_folder(config, workdir))
