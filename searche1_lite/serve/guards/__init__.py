"""What every server of this project is guarded with: who may ask, how much, how slowly, and what an error tells.

    place = listen(host, port, find_token(token))   # binds; faults are told before anything heavy is loaded
    app = new_app("search")                         # FastAPI whose errors are all {"error": "one line"}
    serve(app, place)                               # guarded; until Ctrl-C or SIGTERM

Importing this without FastAPI or uvicorn raises the UserError that says what to install.
"""

from searche1_lite.runtime.errors import UserError

try:
    from searche1_lite.serve.guards.errors import error_response
    from searche1_lite.serve.guards.guard import HEALTH, MAX_BODY, Guard, Limits
    from searche1_lite.serve.guards.place import TOKEN_VARIABLE, Place, find_token, listen
    from searche1_lite.serve.guards.server import GuardedServer, Text, new_app, serve
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("fastapi", "h11", "starlette", "uvicorn"):
        raise
    raise UserError(
        f"a server needs {error.name}, which is not installed: pip install -e '.[web]' in the toolkit's checkout"
    ) from None

__all__ = [
    "HEALTH", "MAX_BODY", "TOKEN_VARIABLE", "Guard", "GuardedServer", "Limits", "Place", "Text", "error_response",
    "find_token", "listen", "new_app", "serve",
]  # fmt: skip
