"""Paths that mean the same from every folder."""

import os
import pathlib


def absolute(path: str | pathlib.Path) -> str:
    """The path from the root. Links in it stay: a folder of links to a cache, say, has its own name and neighbours."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_if_local(name: str) -> str:
    """The path from the root where there is such a file or folder; other names, like the hub's, stay as they are."""
    return absolute(name) if name and os.path.exists(os.path.expanduser(name)) else name


def same_place(old: str, new: str) -> bool:
    """Whether a path kept in a file by `absolute` is what is asked for now, perhaps from another folder.

    The same relative path is taken for the same place, from wherever it is asked: a project may have been moved, or be
    mounted elsewhere.
    """
    if old == new or absolute(old) == absolute(new):
        return True
    is_relative = not os.path.isabs(os.path.expanduser(new)) and os.path.exists(new)
    tail = "/".join(part for part in pathlib.Path(os.path.normpath(new)).parts if part != "..")
    return is_relative and tail not in ("", ".") and old.endswith(f"/{tail}")
