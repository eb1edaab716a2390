"""The one error type a user can cause. Everything else is a bug and may show a traceback."""


class InputError(ValueError):
    """Bad config, data or files: one line with the value, the constraint and the choices.

    `vigos_jax.main` prints the message and exits with code 2.
    """


class Stopped(BaseException):
    """The run stops because it was asked to, and can be gone on with: no error, and nothing to handle on the way."""
