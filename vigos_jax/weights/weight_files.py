"""The tensors of a checkpoint's files by name, and leaves read from them shard by shard."""

import gc
import json
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from vigos_jax.errors import InputError
from vigos_jax.models.tensor_names import Tensor, canonical
from vigos_jax.weights.safetensors_file import DTYPES, MappedTensors, Stored, read_header

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The tensors of one or more safetensors files, by canonical name. Their headers are checked at once."""

    def __init__(self, paths: list[pathlib.Path]):
        self._where: dict[str, Stored] = {}
        self._mapped = MappedTensors()
        self.not_finite: set[str] = set()  # names of the tensors that were read and held NaN or infinity
        for path in paths:
            for name, stored in read_header(path).items():
                if canonical(name) in self._where:
                    raise InputError(
                        f"{path}: {name} must be there once; it is there under two spellings or in two files"
                    )
                self._where[canonical(name)] = stored

    def names(self) -> set[str]:
        """Names of all tensors in the files."""
        return set(self._where)

    def stored(self, name: str) -> Stored:
        """Where a tensor lies; KeyError if it is in no file."""
        return self._where[canonical(name)]

    def __contains__(self, name: str) -> bool:
        return canonical(name) in self._where

    def tensor(self, name: str) -> np.ndarray:
        """Mapped: only what is looked at is read."""
        return self._mapped(self.stored(name))


def holds_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has weights, whole or not."""
    return (folder / _INDEX).exists() or (folder / _WHOLE).is_file()


def open_weights(folder: pathlib.Path) -> WeightFiles:
    """All weights of a folder, their headers checked; InputError if a file is missing or its index is wrong."""
    if not holds_weights(folder):
        raise InputError(f"{folder} holds no weights; it needs {_WHOLE} or {_INDEX}{_interrupted(folder)}")
    index = folder / _INDEX
    if not index.exists():
        return WeightFiles([folder / _WHOLE])
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not all(isinstance(n, str) and n == pathlib.Path(n).name for n in weight_map.values()):
            raise ValueError("its values must be names of files in the folder")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise InputError(f"{index} must be a safetensors index: {e!r}") from e
    paths = [folder / n for n in sorted(set(weight_map.values()))]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        named = f"{index} names shards that are not in the folder: {some(missing)}"
        raise InputError(f"{named}; fetch or copy them again{_interrupted(folder)}")
    files = WeightFiles(paths)
    astray = [f"{n} ({at})" for n, at in weight_map.items() if n not in files or files.stored(n).path.name != at]
    if astray:
        raise InputError(f"{index} names tensors that their shards lack: {some(astray)}; fetch index and shards again")
    return files


def _interrupted(folder: pathlib.Path) -> str:
    """A hint at a download that did not end, where one left its traces."""
    places = (folder, folder / ".cache" / "huggingface" / "download")
    found = [p.name for place in places for p in sorted(place.glob("*.incomplete"))]
    return f" ({found[0]} is there: a download was interrupted)" if found else ""


def some(problems: list[str], separator: str = ", ", *, shown: int = 20) -> str:
    """The first ones, and how many more there are."""
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return separator.join(problems[:shown] + more)


def read_leaf(
    files: WeightFiles, row: Tensor, shape: tuple[int, ...], *, dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """One leaf of the parameters; reads each shard of this process's devices once.

    Host memory holds one shard at a time; `jax.make_array_from_callback` would hold them all, and read replicated
    shards once per device.

    Args:
      sharding: of the leaf; None for the default device.
    """
    if sharding is None:
        whole = tuple(slice(0, n) for n in shape)
        return jax.device_put(read_shard(files, row, whole, dtype=dtype)).block_until_ready()
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or (slice(None),) * len(shape)
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        shard = read_shard(files, row, tuple(slice(*b) for b in bounds), dtype=dtype)
        arrays += [jax.device_put(shard, device).block_until_ready() for device in devices]
        # Free this shard before the next is allocated: jax releases it when Python collects garbage.
        del shard
        gc.collect(0)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_shard(files: WeightFiles, row: Tensor, index: tuple[slice, ...], *, dtype: np.dtype) -> np.ndarray:
    """The part of a leaf at `index`, in host memory; no more than that is read from the files.

    Names of tensors with non-finite values there are added to `files.not_finite`.
    """
    out = np.empty([s.stop - s.start for s in index], dtype)
    names = row.names()[index[0]] if row.stacked else row.names()
    inside = index[1:] if row.stacked else index
    layers = out if row.stacked else out[None]

    def read(name: str, piece: np.ndarray, layer: np.ndarray) -> None:
        copy(piece, layer)
        if not is_finite(layer):
            files.not_finite.add(name)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(read, names, (row.from_file(files.tensor(name), inside) for name in names), layers))
    return out


def is_finite(x: np.ndarray) -> bool:
    """Whether an array of a dtype among DTYPES (a contiguous one) holds neither NaN nor infinity."""
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    exponent = bits.dtype.type(_EXPONENT[x.dtype])  # all of it set: NaN or infinity
    return all(np.max(bits[i : i + _CHUNK] & exponent) < exponent for i in range(0, len(bits), _CHUNK))


_EXPONENT = {DTYPES["F32"]: 0x7F800000, DTYPES["BF16"]: 0x7F80, DTYPES["F16"]: 0x7C00}
_CHUNK = 2**18  # numbers looked at together: they stay in the processor's cache


_ROWS = 16  # of the file, copied at a time into columns of ours: a whole matrix at once takes eight times as long


def copy(piece: np.ndarray, target: np.ndarray) -> None:
    """Copies a part of a file's tensor, transposed or not, into an array of its shape and perhaps another dtype."""
    if piece.dtype == target.dtype:  # bits are moved faster than numbers of a dtype that numpy does not have
        bits = np.dtype(f"u{target.dtype.itemsize}")
        piece, target = piece.view(bits), target.view(bits)
    if piece.ndim < 2 or piece.strides[0] >= piece.strides[1]:
        target[...] = piece
        return
    for i in range(0, piece.shape[1], _ROWS):
        target[:, i : i + _ROWS] = piece[:, i : i + _ROWS]
