"""The one exception that reaches the user as a single line, and what other ones come to in a line."""

import errno

_REFUSED = ("DefaultCPUAllocator", "std::bad_alloc")
"""In the messages of PyTorch's errors where the system refuses it memory."""


class UserError(Exception):
    """Something the user can mend. The message says what happened and what to do next.

    Args:
        message: one line, with the offending value and the remedy.
        exit_code: 2 for wrong usage (bad config, missing file), 1 for a failure while running.
    """

    reported_elsewhere = False
    """Does another process tell the user of it?"""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def explain(error: Exception) -> tuple[str, int] | None:
    """What to tell the user, and the exit code; None for what is a fault of the program."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            place = f": {error.filename}" if error.filename else ""
            message = f"no space left on the disk{place}; make room; what was kept is whole, `train` and `eval` go on "
            return f"{message}from it with --resume", 1
        if error.filename is not None:  # a folder that may not be written to, ...
            return f"{error.strerror}: {error.filename}; make room or give another place", 1
        return str(error), 1
    refused = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _REFUSED)
    if refused or isinstance(error, MemoryError):
        return "memory ran out; `searche1-lite doctor` says what to lower. Finished stages are kept", 1
    # PyTorch is not imported here for the names of its errors.
    if isinstance(error, RuntimeError) and "CUDA" in str(error):
        if type(error).__name__ == "OutOfMemoryError":
            return "the GPU's memory ran out; `searche1-lite doctor` says what to lower. Finished stages are kept", 1
        return f"the GPU failed: {str(error).strip().splitlines()[0]}; look at `searche1-lite doctor`", 1
    return None


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
