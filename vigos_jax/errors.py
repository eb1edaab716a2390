"""The one error type a user can cause. Everything else is a bug and may show a traceback."""


class InputError(ValueError):
    """Bad config, data or files: one line with the value, the constraint and the choices.

    `vigos_jax.main` prints the message and exits with code 2.
    """
