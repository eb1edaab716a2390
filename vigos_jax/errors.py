"""The one error type a user can cause. Everything else is a bug and may show a traceback."""

import textwrap


class InputError(ValueError):
    """Bad config, data or files: one line with the value, the constraint and the choices.

    `vigos_jax.main` prints the message and exits with code 2. Names out of a hostile file may hold line breaks or
    a terminal's control codes: what cannot be printed is shown escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Stopped(BaseException):
    """The run was asked to stop and can be resumed: not an error, so `except Exception` does not catch it."""


def one_line(error: BaseException, *, most: int = 300) -> str:
    """An error of a library in one line: its type and its words, the first `most` characters of them, whole."""
    words = textwrap.shorten(str(error), most, placeholder=" ...")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
