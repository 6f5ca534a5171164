"""The one exception that reaches the user as a single line."""


class UserError(Exception):
    """Something the user can mend. The message says what happened and what to do next.

    Args:
        message: one line, with the offending value and the remedy.
        exit_code: 2 for wrong usage (bad config, missing file), 1 for a failure while running.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code
