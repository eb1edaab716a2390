"""A teacher role is data: what its context shows, which tokens it scores, when, and how.

ViGOS is three roles, vanilla on-policy self-distillation one; every ablation is a table of a few lines. Nothing
else in the program depends on a method's name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from vigos_jax.data.views import NONE, ORIGINAL, ImageView, read_view
from vigos_jax.errors import InputError
from vigos_jax.method.divergences import DIVERGENCES
from vigos_jax.method.prompts import fields, unknown_fields

SPANS = ("description", "reasoning", "answer", "completion")
CONDITIONS = ("valid", "invalid", "always")
CLIP_PER = ("token", "entry")
READS = ("completion", "scored")
TOKEN_WEIGHTS = ("uniform", "entropy", "image_dependence", "teacher_top_k")  # rules of `method/token_weights.py`
_LARGEST = 1e30  # of a weight or clip; far above any, and float32 still holds it


class Prefix(NamedTuple):
    """What the branches of one packed sequence have in common.

    Attributes:
      model: whose weights read them, see `TeacherRole.model`.
      view: the images in front of them.
    """

    model: str = ""
    view: ImageView = ORIGINAL


OWN = Prefix()  # the student's base and images


@dataclasses.dataclass(frozen=True)
class TeacherRole:
    """One teacher: a context of its own, and the student's base weights unless it names others.

    Attributes:
      name: of the role, and of its entry in `config.prompts`.
      user: text after the image in the user turn; `{problem}` and `{reference}` show the question and the answer,
        `{NAME}` a column of `config.data.fields`.
      assistant_prefill: text the assistant turn starts with.
      scores: spans whose tokens this role scores in a valid rollout; "completion" is every completion token,
        delimiters included. An invalid rollout has no other span: a role that applies to it scores all its tokens.
      when: "valid" rollouts, "invalid" ones, or "always".
      divergence: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher), and "jsd" is
        beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture m = beta teacher + (1 - beta) student.
      weight: lambda of the role's mean over its own tokens; 0 leaves the role out.
      clip: largest value that one token (or one vocabulary entry of its sum) may contribute; 0 means no clip.
      clip_per: "token" clips after the sum over the vocabulary, "entry" every term of that sum (a clipped sum of
        signed terms can be negative: it is another objective).
      first_clip, last_clip: a further clip of the first and the last token the role scores in a rollout; 0: none.
      beta: the teacher's share in the mixture of "jsd", between 0 and 1; nothing else reads it.
      reads: what the teacher has read of the student's tokens when it scores one: the "completion" before it,
        or only those before it that the role "scored" itself.
      image: what the teacher sees in place of the row's images, a kind of `ImageView`.
      image_column, image_margin, image_pixels: see `ImageView`.
      token_weights: the rule by which the role weighs its tokens, a row of `token_weights.RULES`.
      token_top_k: k of "teacher_top_k"; nothing else reads it.
      model: folder or hub id of the teacher's weights, of the student's family and tokenizer; "" is the student's base.
    """

    name: str
    user: str
    assistant_prefill: str
    scores: tuple[str, ...]
    when: str
    divergence: str
    weight: float
    clip: float
    clip_per: str = "token"
    first_clip: float = 0.0
    last_clip: float = 0.0
    beta: float = 0.5
    reads: str = "completion"
    image: str = "original"
    image_column: str = ""
    image_margin: float = 0.0
    image_pixels: int = 0
    token_weights: str = "uniform"
    token_top_k: int = 0
    model: str = ""

    def applies(self, is_valid: bool) -> bool:
        """Whether the role scores a rollout, by its format."""
        return self.when == "always" or (self.when == "valid") == is_valid

    @property
    def view(self) -> ImageView:
        """The images that the teacher sees."""
        return ImageView(self.image, self.image_column, self.image_margin, self.image_pixels)

    @property
    def prefix(self) -> Prefix:
        """The prefix that its branch follows."""
        return Prefix(self.model, self.view)

    @property
    def control_prefix(self) -> Prefix | None:
        """The prefix that its control follows: the role run without an image, to weigh its tokens; None without one."""
        return Prefix(self.model, NONE) if self.has_control else None

    @property
    def has_control(self) -> bool:
        """Whether the role is also run without an image."""
        return self.token_weights == "image_dependence"

    @property
    def shows_reference(self) -> bool:
        """Whether its template shows the answer."""
        return "reference" in fields(self.user)


ENTRY_FIELDS = tuple(f.name for f in dataclasses.fields(TeacherRole))[3:]  # of an entry of config.roles
_OPTIONAL = {f.name: f.default for f in dataclasses.fields(TeacherRole) if f.default is not dataclasses.MISSING}
REQUIRED_FIELDS = tuple(f for f in ENTRY_FIELDS if f not in _OPTIONAL)


def role_table(
    roles: Mapping[str, Any], prompts: Mapping[str, Any], *, data_fields: tuple[str, ...] = ()
) -> tuple[TeacherRole, ...]:
    """Builds the table from `config.roles` and `config.prompts`; roles of weight 0 are left out.

    Args:
      data_fields: `config.data.fields`, what templates may name beside problem and reference.

    Raises:
      InputError: an unknown field, span, condition or divergence, a number out of range, a role without a prompt, a
        role's prompt with a field that no row has, a student's prompt with any field but problem, or no role at all.
    """
    if "student" in prompts and (strangers := unknown_fields(prompts["student"]["user"])):
        raise InputError(f"config.prompts.student.user names {{{strangers[0]}}}; it must show {{problem}} alone")
    table = [_role(name, entry, prompts, data_fields) for name, entry in roles.items()]
    table = [role for role in table if role.weight]
    if not table:
        raise InputError("config.roles has no role of positive weight; a run needs at least one teacher")
    return tuple(table)


def _role(name: str, entry: Mapping[str, Any], prompts: Mapping[str, Any], data_fields: tuple[str, ...]) -> TeacherRole:
    where = f"config.roles.{name}"
    if name == "student":
        raise InputError(f"{where}: 'student' names the student's own prompt; choices: any other name")
    values = _values(where, entry)
    if name not in prompts:
        raise InputError(f"{where} has no config.prompts.{name}; choices: {', '.join(prompts)}")
    prompt = prompts[name]
    if strangers := unknown_fields(prompt["user"], data_fields):
        raise InputError(
            f"{where} needs {{{strangers[0]}}} in config.prompts.{name}.user, which no row has; "
            f"choices: {', '.join(('problem', 'reference', *data_fields))}, or a column named in config.data.fields"
        )
    return TeacherRole(name=name, user=prompt["user"], assistant_prefill=prompt["assistant_prefill"], **values)


def _values(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The checked fields of an entry of config.roles, with the defaults of those it leaves out."""
    if not hasattr(entry, "items"):
        raise InputError(f"{where}={entry!r} must be a table; its fields are {', '.join(ENTRY_FIELDS)}")
    missing = [f for f in REQUIRED_FIELDS if f not in entry]
    unknown = [f for f in entry if f not in ENTRY_FIELDS]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has an unknown field {unknown[0]!r}"
        raise InputError(f"{where} {what}; its fields are {', '.join(ENTRY_FIELDS)}")
    r = _OPTIONAL | dict(entry.items())
    if not isinstance(r["scores"], list | tuple) or not r["scores"]:
        raise InputError(f"{where}.scores={r['scores']!r} must be a list of spans; choices: {', '.join(SPANS)}")
    chosen = {"when": CONDITIONS, "divergence": tuple(DIVERGENCES), "clip_per": CLIP_PER, "reads": READS}
    chosen |= {"token_weights": TOKEN_WEIGHTS}
    for field, value, choices in (
        *(("scores", span, SPANS) for span in r["scores"]),
        *((field, r[field], choices) for field, choices in chosen.items()),
    ):
        if value not in choices:
            raise InputError(f"{where}.{field}={value!r} is unknown; choices: {', '.join(choices)}")
    for field in ("weight", "clip", "first_clip", "last_clip", "beta"):
        is_number = isinstance(r[field], int | float) and not isinstance(r[field], bool)
        if not is_number or not 0 <= r[field] <= _LARGEST:
            raise InputError(f"{where}.{field}={r[field]!r} must be a finite number of at least 0")
        r[field] = float(r[field])
    if not 0 < r["beta"] < 1:
        raise InputError(
            f"{where}.beta={r['beta']} must be between 0 and 1, both excluded: the limits are named, forward_kl is "
            "KL(teacher || student) and reverse_kl is KL(student || teacher)"
        )
    if not isinstance(r["model"], str):
        raise InputError(f"{where}.model={r['model']!r} must be a text: a model folder, or owner/name on the hub")
    view = read_view(where, r)
    _check_weights(where, r, view)
    return r | {"scores": tuple(r["scores"]), "image_margin": view.margin}


def _check_weights(where: str, entry: Mapping[str, Any], view: ImageView) -> None:
    """Raises InputError if an option of the token-weight rule is missing, unused or incompatible."""
    k, rule = entry["token_top_k"], entry["token_weights"]
    is_whole = isinstance(k, int) and not isinstance(k, bool)
    if not is_whole or k < 0 or bool(k) != (rule == "teacher_top_k"):
        what = "a whole number above 0" if rule == "teacher_top_k" else f"0, as token_weights={rule!r} reads no k"
        raise InputError(f"{where}.token_top_k={k!r} must be {what}")
    if rule == "image_dependence" and view.kind == "none":
        raise InputError(f"{where}.token_weights={rule!r} needs a teacher with an image; choices of image: not none")


def views_of(table: tuple[TeacherRole, ...]) -> tuple[ImageView, ...]:
    """The different views of the roles."""
    return tuple(dict.fromkeys(role.view for role in table))


def models_of(table: tuple[TeacherRole, ...]) -> dict[str, str]:
    """For each teacher model other than the student's base, the name of the first role that uses it."""
    return {role.model: role.name for role in reversed(table) if role.model}


def prefixes_of(table: tuple[TeacherRole, ...]) -> tuple[Prefix, ...]:
    """The different prefixes of the roles and of their controls; the student's own first, if a role has it."""
    different = dict.fromkeys(role.prefix for role in table)
    different |= dict.fromkeys(role.control_prefix for role in table if role.control_prefix is not None)
    return tuple(sorted(different, key=lambda prefix: prefix != OWN))


def branches_of(prefix: Prefix, table: tuple[TeacherRole, ...]) -> tuple[tuple[int, bool], ...]:
    """(index of the role, whether the branch is its control) of all branches after a prefix."""
    own = [(i, False) for i, role in enumerate(table) if role.prefix == prefix]
    return (*own, *((i, True) for i, role in enumerate(table) if role.control_prefix == prefix))


def branches_per_rollout(prefix: Prefix, table: tuple[TeacherRole, ...]) -> int:
    """The most branches that one rollout may have after a prefix."""
    roles = [table[i] for i, _ in branches_of(prefix, table)]
    return max(sum(r.applies(is_valid) for r in roles) for is_valid in (True, False))


def roles_per_token(table: tuple[TeacherRole, ...]) -> int:
    """The largest number of roles that may score one token: 1 for ViGOS and OPSD."""
    worst = max(1, sum(r.applies(False) for r in table))
    for span in SPANS[:-1]:
        worst = max(worst, sum(r.applies(True) and (span in r.scores or "completion" in r.scores) for r in table))
    return worst
