"""A server's address: its port, bound before anything slow, the names it answers to, and its token."""

import errno
import ipaddress
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.terminal import one_line

TOKEN_VARIABLE = "SEARCHE1_LITE_TOKEN"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Place:
    """A bound address and who may use it. Made by `listen`."""

    host: str
    port: int
    bound: socket.socket = field(repr=False)
    """Bound, not yet listening."""
    token: str | None = field(repr=False)
    """None: not needed."""
    loopback: bool

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}"

    def is_name(self, header: str) -> bool:
        """Whether a `Host` header names this server.

        With DNS rebinding, a page of another site sends that site's name. On loopback only names of loopback are
        accepted; beyond it also addresses, which cannot be rebound, and the machine's name.
        """
        match = _HOST.fullmatch(header)
        if match is None:
            return False
        name = match[1].strip("[]").lower().removesuffix(".")
        if name in ("localhost", self.host.lower()):
            return True
        with suppress(ValueError):
            return ipaddress.ip_address(name).is_loopback or not self.loopback
        return not self.loopback and name in (own := socket.gethostname().lower(), f"{own}.local")


_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)


def find_token(given: str | None) -> str | None:
    """The clients' token: `given` (of --token), else SEARCHE1_LITE_TOKEN, else None; a UserError if it is too weak."""
    token = given if given is not None else os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and not re.fullmatch(f"[!-~]{{{_SHORTEST_TOKEN},}}", token):
        origin = "--token" if given is not None else TOKEN_VARIABLE
        raise UserError(
            f"the token of {origin} has to have {_SHORTEST_TOKEN} or more letters, digits or signs, and no spaces; "
            "`openssl rand -hex 16` makes one"
        )
    return token


def listen(host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Place:
    """Binds the port, before anything slow, so that its errors are reported at once.

    Args:
        host: name or address; beyond loopback only with a token.
        port: 0: a free one.
        token: from `find_token`.

    Raises:
        UserError: if the host is unknown, it is beyond loopback and there is no token, or the port is taken.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise UserError(
            f"a server needs {missing[0]}, which is not installed: pip install -e '.[web]' in the toolkit's checkout"
        )
    if not 0 <= port <= 65535:
        raise UserError(f"there is no port {port}; give one from 1 to 65535, or 0 for a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UserError(f"there is no host {one_line(host, 100)!r}; give 127.0.0.1, or an address of here") from None
    loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not loopback and token is None:
        raise UserError(
            f"{host} can be reached from other machines: give a token with --token or {TOKEN_VARIABLE}, or stay with "
            "127.0.0.1"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        reason = {
            errno.EADDRINUSE: f"port {port} of {host} is taken; end what uses it, or give another with --port (0: any)",
            errno.EACCES: f"port {port} may not be opened; give one above 1023 with --port (0: any)",
            errno.EADDRNOTAVAIL: f"{host} is no address of this machine; give 127.0.0.1, or one that is",
        }.get(error.errno or 0, f"cannot listen on {host}, port {port}: {error.strerror}; give another one")
        raise UserError(reason) from None
    return Place(host, sock.getsockname()[1], sock, token, loopback)
