"""The form of a refusal: one line that shows a value, and says what would do or what to do. Checked as they are made.

`check_all` is called once, in conftest: a test that meets a refusal without advice fails with it, whatever it expects.
"""

import re

from vigos_jax.errors import InputError

MOST = 2000  # characters; some list all columns or fields
# What would do (a constraint, the choices), or what to do.
ADVICE = re.compile(
    r"\bmust\b|\bchoices?:|\bchoose\b|\bneeds?\b|\bneeded\b|\ballows?\b|\bchoice\b|\binstall\b|\bit has\b|\bthey have\b"
    r"|\bthe (?:nearest|largest|only)\b|\bsee\b|\btry\b|\bis now\b|\bshipped are\b|\bits (?:files|fields) are\b"
    r"|\bresumes\b|\bat (?:most|least)\b|\bfetch\b|\bmove\b|\bmake (?:room|it)\b|\bwait\b|\blower\b|\braise\b|\bset\b"
    r"|\bname\b|\bleave\b|\bgive\b|\bgo back\b|\bwrite (?:it|them)\b|\binstead\b|\bstart again\b|\bunset\b|\bend them\b"
    r"|\btakes an older\b"
)
# A path, a number, a name in quotes, a field, a flag: something of the user's.
VALUE = re.compile(r"['\"/=]|[0-9]|config\.|--\w|\w\.\w|[{(]|\b(?:True|False|None)\b|\bcannot (?:read|write) \S")


def fault(message: str) -> str | None:
    """What is wrong with the form of a refusal, None if nothing is."""
    if "\n" in message:
        return "it has several lines"
    if len(message) > MOST:
        return f"it has {len(message)} characters, more than {MOST}"
    if not VALUE.search(message):
        return "it shows no value"
    if not ADVICE.search(message):
        return "it says neither what would do nor what to do"
    return None


def check_all() -> None:
    """From now on every InputError of this process is checked when it is made; those of its subclasses are not."""

    def init(self: InputError, *args: object) -> None:
        ValueError.__init__(self, *args)
        if type(self) is InputError and args and (wrong := fault(str(self))):
            raise AssertionError(f"a refusal is out of form, {wrong}: {self}")

    InputError.__init__ = init
