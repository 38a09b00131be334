"""Errors that are printed as one line, without a traceback."""


class UserError(ValueError):
    """Bad configuration or input; exit code 2. The message names the key, file or line, the value, and the remedy."""


class RunFailure(RuntimeError):
    """Something around a running job failed (a disk, a device's memory); exit code 1. The message says what is kept,
    and what to do."""
