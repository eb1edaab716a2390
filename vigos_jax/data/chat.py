"""Rows that hold a conversation instead of a question: one user turn with its images, perhaps the assistant's answer.

Both spellings in use are read: `[{"role": "user", "content": ...}]`, whose content is a text or a list of parts, and
`[{"from": "human", "value": ...}]`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vigos_jax.data.images import held_in
from vigos_jax.data.markers import count_markers

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}
_ROLES |= {"bot": "assistant", "system": "system", "developer": "system"}
_TYPES = {"text": "text", "input_text": "text", "output_text": "text"}
_TYPES |= dict.fromkeys(("image", "image_url", "input_image"), "image")


class BadChat(ValueError):
    """A conversation that is not one question and one answer.

    Attributes:
      kind: chat_not_understood or several_turns.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Chat:
    """What a conversation asks.

    Attributes:
      problem: the user's text, markers where its images stand.
      answer: the assistant's text; None without such a turn.
      images: the contents of its image parts; () if these are empty placeholders for the row's image columns.
    """

    problem: str
    answer: str | None
    images: tuple[Any, ...]


def is_chat(value: object) -> bool:
    """Whether a value is a list of turns or of a turn's parts, or the JSON of one."""
    items = _items(value)
    return bool(items) and all(isinstance(i, Mapping) and i.keys() & {"role", "from", "type", "text"} for i in items)


def read_chat(value: object) -> Chat:
    """The question, its images and the answer of a conversation that `is_chat` accepts.

    System turns are dropped, as this program has its own prompts. A bare list of parts is read as one user turn.

    Raises:
      BadChat: unknown roles or parts, or turns that are not one question and at most one answer after it.
    """
    items = [{k: v for k, v in item.items() if v is not None} for item in _items(value)]
    if not any(item.keys() & {"role", "from"} for item in items):
        items = [{"role": "user", "content": items}]
    turns = []
    for item in items:
        role = _ROLES.get(str(item.get("role", item.get("from"))).lower())
        if role is None:
            raise BadChat("chat_not_understood", f"role {item.get('role', item.get('from'))!r}; choices: {_names()}")
        if role != "system":
            turns.append((role, item.get("content", item.get("value"))))
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"], ["assistant"]):
        kind = "several_turns" if roles.count("user") > 1 else "chat_not_understood"
        raise BadChat(kind, f"its turns are {', '.join(roles) or 'none'}; one user turn is read, and one answer to it")
    texts, images = {}, ()
    for role, content in turns:
        texts[role], found, count = _parts(content)
        if role == "user":
            images = found
        elif count:
            raise BadChat("chat_not_understood", "there is an image in the assistant's turn")
    return Chat(texts.get("user", ""), texts.get("assistant"), images)


def _names() -> str:
    return ", ".join(_ROLES)


def _items(value: object) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return list(value) if isinstance(value, list | tuple | np.ndarray) else []


def _parts(content: object) -> tuple[str, tuple[Any, ...], int]:
    """A turn's content as (text with image markers, contents of its image parts, number of image parts)."""
    if isinstance(content, str):
        return content, (), 0
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple | np.ndarray):
        raise BadChat("chat_not_understood", f"a turn's content is a {type(content).__name__}, not a text or parts")
    texts: list[str] = []
    places: list[int] = []  # of each image part: how many texts stand before it
    images: list[Any] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = _type_of(part)
        if kind == "text":
            texts.append(str(part.get("text") or ""))
            continue
        places.append(len(texts))
        held = held_in(part)
        images += [] if held is None else [held]
    if images and len(images) != len(places):
        raise BadChat("chat_not_understood", f"{len(images)} of {len(places)} image parts hold an image")
    # Images before the text or after it are not part of a sentence; some texts say themselves where they stand.
    are_inside = any(0 < place < len(texts) for place in places) and not count_markers("".join(texts))
    if are_inside:
        for place in reversed(places):
            texts.insert(place, "<image>")
    return "".join(texts), tuple(images), len(places)


def _type_of(part: object) -> str:
    """The kind of a part, "text" or "image"; one that does not say is known by what it holds."""
    if not isinstance(part, Mapping):
        raise BadChat("chat_not_understood", f"a part is a {type(part).__name__}; it must be a text, or have a type")
    named = part.get("type")
    kind = _TYPES.get(str(named)) if named is not None else "image" if held_in(part) is not None else "text"
    if kind is None:
        raise BadChat("chat_not_understood", f"a part of type {named!r}; choices: {', '.join(_TYPES)}")
    return kind


def answer_text(value: object) -> Any:
    """An answer column's value; of a list of turns, what the assistant says in it."""
    if isinstance(value, str) or not is_chat(value):
        return value
    try:
        return read_chat(value).answer
    except BadChat:
        return value
