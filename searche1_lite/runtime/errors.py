"""`UserError`, and one-line messages for other exceptions that a user can act on."""

import errno

_REFUSED = ("DefaultCPUAllocator", "std::bad_alloc")
"""Parts of PyTorch's messages when the system is out of memory."""


class UserError(Exception):
    """An error that the user can fix; shown as one line without a traceback.

    Args:
        message: one line with the offending value and the remedy.
        exit_code: 2 for wrong usage (bad config, missing file), 1 for a failure while running.
    """

    reported_elsewhere = False
    """Whether another process reports it to the user."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def explain(error: Exception) -> tuple[str, int] | None:
    """The message for the user and the exit code; None for a bug in the program."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            place = f": {error.filename}" if error.filename else ""
            message = (
                f"no space left on the disk{place}; make room; saved files are complete, `train` and `eval` continue "
            )
            return f"{message}from it with --resume", 1
        if error.filename is not None:  # such as a folder without write permission
            return f"{error.strerror}: {error.filename}; check the permissions or choose another place", 1
        return str(error), 1
    refused = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _REFUSED)
    if refused or isinstance(error, MemoryError):
        return "memory ran out; `searche1-lite doctor` shows what to lower. Finished stages are kept", 1
    # PyTorch is not imported here for the names of its errors.
    if isinstance(error, RuntimeError) and "CUDA" in str(error):
        if type(error).__name__ == "OutOfMemoryError":
            return "the GPU's memory ran out; `searche1-lite doctor` shows what to lower. Finished stages are kept", 1
        return f"the GPU failed: {first_line(error)}; run `searche1-lite doctor`", 1
    return None


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
