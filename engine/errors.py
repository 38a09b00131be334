"""The one exception for mistakes a user can repair: printed as one line, exit code 2, no traceback."""


class UserError(ValueError):
    """Bad configuration or input. The message names the key, file or line, the value, and the remedy."""
