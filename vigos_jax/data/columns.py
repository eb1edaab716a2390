"""Which columns of a source hold the parts of a row: as configured, else found by common names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vigos_jax.data.chat import BadChat, answer_text, is_chat, read_chat
from vigos_jax.errors import InputError

# The first of each is this program's own name. For problem and answer it wins; several of the others are an error.
NAMES = {
    "problem": ("problem", "question", "query", "prompt", "instruction"),
    "answer": (
        *("answer", "solution", "ground_truth", "gt_answer", "multiple_choice_answer", "answers", "label"),
        "reward_model.ground_truth",
    ),
    "images": ("images", "image", "image_path", "image_paths", "img"),
    "id": ("problem_id", "id", "question_id", "pid", "idx"),
    "options": ("options", "choices"),
}
CHATS = ("messages", "conversations", "conversation")  # columns of turns
_NUMBERED = re.compile(r"image_?([0-9]{1,3})")


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path like `messages.0.content`, None if there is none; column names may have dots."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list | tuple | np.ndarray) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a row's parts are, as dotted paths.

    Attributes:
      problem: holds a question or a conversation.
      answer: "" if the conversation holds it.
      images: a row's first non-empty one is used, or all of them if `numbered`; () if the conversation holds them.
      ids, options: the first one that a row has is used; without an id, the row's index.
    """

    problem: str = "problem"
    answer: str = "answer"
    images: tuple[str, ...] = ("images", "image")
    ids: tuple[str, ...] = ("problem_id", "id")
    options: tuple[str, ...] = ("options", "choices")
    numbered: bool = False

    def names(self) -> set[str]:
        """All paths."""
        return {p for p in (self.problem, self.answer, *self.images, *self.ids, *self.options) if p}

    def read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The parts of a row under this program's names, and why it has none (`bad_reason`, `bad_detail`)."""
        ids = (*(lookup(row, name) for name in self.ids), index)
        out = {"id": str(next(i for i in ids if i is not None)), "options": _first(row, self.options)}
        problem, answer = lookup(row, self.problem), answer_text(lookup(row, self.answer)) if self.answer else None
        images = self._images(row)
        if is_chat(problem):
            try:
                chat = read_chat(problem)
            except BadChat as e:
                texts = {"problem": None, "answer": None, "images": images}
                return out | texts | {"bad_reason": e.kind, "bad_detail": str(e)}
            problem, answer = chat.problem, chat.answer if answer is None else answer
            images = list(chat.images) if chat.images else images
        return out | {"problem": problem, "answer": answer, "images": images}

    def _images(self, row: Mapping[str, Any]) -> Any:
        if self.numbered:
            return [value for name in self.images if (value := lookup(row, name)) is not None]
        return _first(row, self.images)

    def describe(self, *, always: bool = False) -> str:
        """One line: where each part comes from; "" if that is as this program names them, unless asked for `always`."""
        is_plain = (self.problem, self.answer) == ("problem", "answer") and set(self.images) <= {"images", "image"}
        if is_plain and not always:
            return ""
        sources = {"problem": self.problem, "answer": self.answer or f"the assistant's turn in {self.problem}"}
        sources["images"] = (" and " if self.numbered else " or ").join(self.images) or f"the parts of {self.problem}"
        if self.options:
            sources["options"] = " or ".join(self.options)
        return ", ".join(f"{part} from {source}" for part, source in sources.items())


def _first(row: Mapping[str, Any], paths: Sequence[str]) -> Any:
    """The first value that is there and not empty; else the first that is there."""
    values = [value for path in paths if (value := lookup(row, path)) is not None]
    return next((v for v in values if not _is_empty(v)), next(iter(values), None))


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, list | tuple | np.ndarray | Mapping) and all(v is None for v in value)


def find_columns(
    names: Sequence[str],
    *,
    where: str,
    mapping: Mapping[str, str] | None = None,
    fields: Sequence[str] = (),
    views: Sequence[str] = (),
    samples: Sequence[Mapping[str, Any]] = (),
) -> Columns:
    """Finds the columns that hold a row's parts.

    Args:
      names: all columns of the source.
      where: the source's name, for error messages.
      mapping: `config.data.columns`: part -> dotted path, "" to find it.
      fields: further columns that must be there.
      views: dotted paths of roles' image columns; they must exist, and are not searched for the row's parts.
      samples: some rows, to detect conversations and nested columns.

    Raises:
      InputError: a part has no column, or several candidates.
    """
    wanted = {part: (mapping or {}).get(part, "") for part in NAMES}
    for part, path in wanted.items():
        if path and path not in names and path.split(".")[0] not in names:
            there = f"{where} has the columns {', '.join(names)}"
            raise InputError(f"config.data.columns.{part}={path!r} must be a column, or a path into one: {there}")
    everything, private = names, {view for view in views if view not in wanted.values()}
    names = [name for name in names if name not in private]
    chats = [name for name in CHATS if name in names and any(is_chat(row.get(name)) for row in samples)]
    problem = wanted["problem"] or _one("problem", names, where, samples, others=chats[:1])
    has_chat = bool(problem) and any(is_chat(lookup(row, problem)) for row in samples)
    answer = wanted["answer"] or _one("answer", names, where, samples)
    images = _image_columns(wanted["images"], names)
    missing = [] if problem else ["problem"]
    missing += [] if answer or has_chat else ["answer"]
    missing += [field for field in fields if field not in everything]
    missing += [view for view in views if view not in everything and view.split(".")[0] not in everything]
    missing += [] if images or has_chat else ["images"]
    if missing:
        hint = "; name another one with config.data.columns" if set(missing) & {"problem", "answer", "images"} else ""
        raise InputError(f"{where} lacks {', '.join(missing)}; it has the columns {', '.join(everything)}{hint}")
    return Columns(
        problem=problem,
        answer=answer,
        images=images,
        ids=(wanted["id"],) if wanted["id"] else _named(NAMES["id"], names),
        options=(wanted["options"],) if wanted["options"] else _named(NAMES["options"], names),
        numbered=len(images) > 1 and all(_NUMBERED.fullmatch(name.casefold()) for name in images),
    )


def _named(wanted: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The columns of these names, however they are capitalised."""
    by_name = {name.casefold(): name for name in reversed(names)}
    return tuple(by_name[name] for name in wanted if name in by_name)


def _one(
    part: str, names: Sequence[str], where: str, samples: Sequence[Mapping[str, Any]], *, others: Sequence[str] = ()
) -> str:
    """The column of this part, "" for none; InputError where two could be it.

    Args:
      others: further columns that could be it.
    """
    own, *further = NAMES[part]
    if own in names:
        return own
    nested = [path for path in further if "." in path and any(lookup(row, path) is not None for row in samples)]
    found = [*_named(NAMES[part], names), *nested, *others]
    if len(found) > 1:
        raise InputError(f"{where}: {' and '.join(found)} could be the {part}; choose with config.data.columns.{part}")
    return found[0] if found else ""


def _image_columns(path: str, names: Sequence[str]) -> tuple[str, ...]:
    if path:
        return (path,)
    if found := _named(NAMES["images"], names):
        return found
    numbered = {int(m[1]): name for name in names if (m := _NUMBERED.fullmatch(name.casefold()))}
    return tuple(numbered[n] for n in sorted(numbered))
