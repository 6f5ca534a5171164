"""The one form that a server's errors have."""

import json
from typing import Any

from fastapi.responses import JSONResponse

from searche1_lite.runtime.terminal import one_line


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    """`{"error": message}`, on one line of at most 500 characters."""
    # ASCII, so that not even a lone surrogate of the request, repeated here, is a reason to fail.
    return _AsciiJSON({"error": one_line(message, 500)}, status, headers)


class _AsciiJSON(JSONResponse):
    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")
