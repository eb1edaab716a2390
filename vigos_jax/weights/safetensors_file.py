"""Reads and writes safetensors files: validated headers, memory-mapped tensors, streaming writes.

A file is 8 bytes with the length of its header, the header (JSON: dtype, shape and bytes of every tensor), and the
tensors' bytes, without gaps. Of a mapped tensor, only the pages that are accessed are read, and they belong to the page
cache, not to this program.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vigos_jax.errors import InputError, one_line
from vigos_jax.runtime.files import unique_keys

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes per element, including dtypes that a file may hold but that are not read here.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, dtype as the header spells it, shape, and first byte in the file."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a file by name; none of them is read.

    Raises:
      InputError: the file is missing, empty, cut short, no safetensors file, or its header does not fit its size.
    """
    try:
        raw, start, size = _header(path)
        raw.pop("__metadata__", None)
        out = {name: _stored(path, start, value) for name, value in raw.items()}
        ranges = {name: tuple(value["data_offsets"]) for name, value in raw.items()}
    except OSError as e:
        raise _broken(path, e.strerror or str(e)) from e
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise _broken(path, f"its header does not describe tensors ({one_line(e)})") from e
    if problem := _misfit(ranges, size - start):
        raise _broken(path, problem)
    return out


def _broken(path: pathlib.Path, problem: str) -> InputError:
    return InputError(f"cannot read {path}: {problem}; it must be a complete safetensors file, fetch it again")


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """(parsed header, first byte after it, bytes of the file); InputError if there is none."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(len(_POINTER))
        if first == _POINTER:
            raise _broken(
                path, "it is a git-lfs pointer, which names the weights and has none (`git lfs pull` gets them)"
            )
        if len(first) < 8:
            raise _broken(path, "it is empty" if not first else f"it ends after {len(first)} bytes")
        length = int.from_bytes(first[:8], "little")
        if length > _MAX_HEADER:
            raise _broken(path, "it does not begin with the length of a header")
        if length > size - 8:
            raise _broken(path, f"it ends inside its header, after {size} of at least {8 + length} bytes")
        file.seek(8)
        try:
            return json.loads(file.read(length), object_pairs_hook=unique_keys), 8 + length, size
        except (ValueError, RecursionError) as e:
            raise _broken(path, f"its header is not JSON ({one_line(e)})") from e


def _stored(path: pathlib.Path, data_start: int, value: dict[str, Any]) -> Stored:
    """One entry of a header; ValueError or the like if it contradicts itself."""
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers) or begin > end:
        raise ValueError(f"a tensor of dtype {dtype!r}, shape {list(shape)} and bytes {begin} to {end}")
    if dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{end - begin} bytes for a tensor of dtype {dtype} and shape {list(shape)}")
    return Stored(path, dtype, shape, data_start + begin)


def _misfit(ranges: dict[str, tuple[int, int]], size: int) -> str:
    """What is wrong with byte ranges that must fill `size` bytes without gap or overlap; "" if they do."""
    at = 0
    for name, (begin, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if begin != at:
            return f"its tensors overlap or leave a gap before {name}"
        at = end
    if at > size:
        return f"it is cut short, {size} bytes of tensors where its header says {at}"
    return f"it has {size - at} bytes behind its last tensor" if at < size else ""


class MappedTensors:
    """Maps each file once. The arrays stay valid as long as anyone holds them."""

    def __init__(self):
        self._maps: dict[pathlib.Path, np.memmap] = {}

    def __call__(self, stored: Stored) -> np.ndarray:
        """The tensor, read-only, of a dtype among DTYPES; no byte is read before it is looked at."""
        if stored.path not in self._maps:
            self._maps[stored.path] = np.memmap(stored.path, mode="r")
        dtype = DTYPES[stored.dtype]
        return np.ndarray(stored.shape, dtype, buffer=self._maps[stored.path], offset=stored.start)


def write_file(path: pathlib.Path, tensors: Sequence[tuple[str, Any]]) -> None:
    """Writes a file tensor by tensor.

    Args:
      tensors: (name, array) pairs; instead of an array, anything with `shape` and `dtype` that `np.asarray` converts.
        They are converted one at a time, when they are written.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors:
        begin, end = end, end + byte_count(x)
        header[name] = {"dtype": _NAMES[np.dtype(x.dtype)], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, planned in tensors:
            x = np.asarray(planned)
            if x.shape != tuple(planned.shape) or x.dtype != planned.dtype:
                raise ValueError(f"{name} became {x.dtype}{x.shape}, planned as {planned.dtype}{planned.shape}")
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def byte_count(x: Any) -> int:
    """Bytes of an array, or of what has its shape and dtype."""
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
