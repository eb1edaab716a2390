"""The chat template of a model folder: which one it is, its switches, and what it writes around the messages."""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from vigos_jax.errors import InputError, one_line
from vigos_jax.runtime.files import read_object

_MARK = "@@vigos-message@@"
_THINK, _THOUGHT = "<think>", "</think>"  # what reasoning models put around their thoughts
_SWITCHES = "config.model.chat_template_kwargs"
_FILES = "chat_template.jinja, chat_template.json, a chat_template in tokenizer_config.json"

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A folder's template with its switches set. Build it with `open_chat_template`.

    Attributes:
      tokenizer: transformers', which renders it.
      source: Jinja.
      switches: further variables of the template, like enable_thinking.
    """

    folder: pathlib.Path
    tokenizer: Any
    source: str
    switches: Mapping[str, Any]

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The conversation as text; InputError if the template fails."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.switches,
            )
        except Exception as e:  # a template is a program: it can fail in any way
            raise InputError(
                f"the chat template of {self.folder} fails: {one_line(e)}; it must render one user turn"
            ) from e

    def behind_header(self) -> str:
        """What follows the assistant's header line where an answer is to begin: "", or the start of a thought."""
        user = [_message("user", [{"type": "text", "text": _MARK}])]
        chat, asked = (self.render(user, add_generation_prompt=flag) for flag in (False, True))
        return asked.removeprefix(chat).partition("\n")[2] if asked.startswith(chat) else ""

    def check_prefill(self, behind_header: str, assistant_prefill: str) -> None:
        """Raises InputError if a forced start of the answer would stand inside a thought that the template opens."""
        is_open = behind_header.count(_THINK) > behind_header.count(_THOUGHT)
        if not (is_open and assistant_prefill) or _THOUGHT in assistant_prefill:
            return
        switch = f"{_SWITCHES}.enable_thinking=False, " if mentions(self.source, "enable_thinking") else ""
        raise InputError(
            f"the chat template of {self.folder} opens a thought behind the assistant's header ({behind_header!r}), in "
            f"front of assistant_prefill {assistant_prefill!r}; choices: {switch}an assistant_prefill that closes it "
            f"first, like {_THOUGHT + assistant_prefill!r}, or a model whose template does not open one"
        )

    def turn_end(self, control: Collection[str]) -> str | None:
        """The control token that the template puts after an assistant's message; None if it puts none there."""
        question = _message("user", [{"type": "text", "text": "?"}])
        for answer in (_MARK, [{"type": "text", "text": _MARK}]):  # some templates take only one of the two
            try:
                chat = self.render([question, _message("assistant", answer)], add_generation_prompt=False)
            except InputError:
                continue
            if chat.count(_MARK) == 1:
                behind = chat.split(_MARK)[1].lstrip()
                return max((token for token in control if behind.startswith(token)), key=len, default=None)
        return None


def open_chat_template(root: pathlib.Path, tokenizer: Any, switches: Mapping[str, Any]) -> ChatTemplate:
    """The folder's default template.

    Args:
      switches: variables of the template. If it has enable_thinking and `switches` does not, that is False, since a
        prefill starts the answer, not a thought.

    Raises:
      InputError: there is no template, or it does not mention one of the switches.
    """
    source = _source(root, tokenizer)
    for name in switches:
        if not mentions(source, name):
            raise InputError(f"{_SWITCHES}.{name} is not a switch of the chat template of {root}; leave it out")
    defaults = {"enable_thinking": False} if mentions(source, "enable_thinking") else {}
    return ChatTemplate(root, tokenizer, source, {**defaults, **switches})


def mentions(source: str, name: str) -> bool:
    """Whether a template reads a variable of this name, as far as its text shows."""
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", source) is not None


def _source(root: pathlib.Path, tokenizer: Any) -> str:
    """The template, where transformers' processors look for it: a file of its own first, the tokenizer's last."""
    named = tokenizer.chat_template  # of chat_template.jinja and additional_chat_templates too, where they are there
    legacy = root / "chat_template.json"
    if not (root / "chat_template.jinja").exists() and legacy.exists():
        named = read_object(legacy, owner="a model folder").get("chat_template") or named
    if isinstance(named, list) and all(isinstance(t, Mapping) for t in named):
        named = {t.get("name"): t.get("template") for t in named}
    if isinstance(named, Mapping):
        if "default" not in named:
            names = ", ".join(map(str, named))
            raise InputError(f"{root} has the chat templates {names}; it needs one of the name default")
        named = named["default"]
    if not isinstance(named, str):
        raise InputError(f"{root} has no chat template; choices: {_FILES}")
    return named


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
