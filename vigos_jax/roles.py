"""A teacher role is data: what its context shows, which tokens it scores, when, and how.

ViGOS is three roles, vanilla on-policy self-distillation one; every ablation is a table of a few lines. Nothing
else in the program knows a method's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vigos_jax.errors import InputError

SPANS = ("description", "reasoning", "answer", "completion")
CONDITIONS = ("valid", "invalid", "always")
DIVERGENCES = ("forward_kl", "reverse_kl")


@dataclasses.dataclass(frozen=True)
class TeacherRole:
    """One frozen teacher: the initial parameters behind a context of their own.

    Attributes:
      name: of the role, and of its entry in `config.prompts`.
      user: text after the image in the user turn; `{problem}` and `{reference}` show the question and the answer.
      assistant_prefill: text the assistant turn starts with.
      scores: spans whose tokens this role scores; "completion" is every completion token, delimiters included.
      when: "valid" rollouts, "invalid" ones, or "always".
      divergence: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher).
      weight: lambda of the role's mean over its own tokens; 0 leaves the role out.
      clip: largest value one token may contribute, after the sum over the vocabulary; 0 means no clip.
    """

    name: str
    user: str
    assistant_prefill: str
    scores: tuple[str, ...]
    when: str
    divergence: str
    weight: float
    clip: float

    def applies(self, is_valid: bool) -> bool:
        return self.when == "always" or (self.when == "valid") == is_valid


def _choice(role: str, field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"config.roles.{role}.{field}={value!r} is unknown; choices: {', '.join(choices)}")


def role_table(roles: Mapping[str, Any], prompts: Mapping[str, Any]) -> tuple[TeacherRole, ...]:
    """Builds the table from `config.roles` and `config.prompts`; roles of weight 0 are left out.

    Raises:
      InputError: an unknown span, condition or divergence, a negative number, a role without a prompt, no role.
    """
    table = []
    for name, r in roles.items():
        for span in r["scores"]:
            _choice(name, "scores", span, SPANS)
        if not r["scores"]:
            raise InputError(f"config.roles.{name}.scores is empty; choices: {', '.join(SPANS)}")
        _choice(name, "when", r["when"], CONDITIONS)
        _choice(name, "divergence", r["divergence"], DIVERGENCES)
        for field in ("weight", "clip"):
            if not 0 <= r[field] < float("inf"):
                raise InputError(f"config.roles.{name}.{field}={r[field]} must be a finite number of at least 0")
        if name not in prompts:
            raise InputError(f"config.roles.{name} has no config.prompts.{name}; choices: {', '.join(prompts)}")
        p = prompts[name]
        role = TeacherRole(
            name, p["user"], p["assistant_prefill"], tuple(r["scores"]), r["when"], r["divergence"],
            float(r["weight"]), float(r["clip"]),
        )  # fmt: skip
        if role.weight:
            table.append(role)
    if not table:
        raise InputError("config.roles has no role of positive weight; a run needs at least one teacher")
    return tuple(table)


def roles_per_token(table: tuple[TeacherRole, ...]) -> int:
    """The largest number of roles that may score one token: 1 for ViGOS and OPSD."""
    worst = 1
    for is_valid in (True, False):
        active = [r for r in table if r.applies(is_valid)]
        for span in SPANS[:-1]:
            worst = max(worst, sum(span in r.scores or "completion" in r.scores for r in active))
    return worst
