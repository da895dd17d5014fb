"""The one exception that is meant for the user."""


class UserError(Exception):
    """A mistake of the user's that one sentence explains; `main()` prints it without a traceback and exits with 2."""
