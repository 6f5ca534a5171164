"""A large file over HTTP: resumed where it stopped, checked, and unpacked whole or not at all."""

import errno
import hashlib
import http.client
import io
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT, Progress, megabytes

_BLOCK = 2**20
_TIMEOUT = 60.0
"""Seconds without a byte after which the connection counts as broken."""
_PAUSE = 2.0
"""Seconds before a broken connection is tried again; as long as each try brings something, there is another."""


class _BrokenConnection(UserError):
    """What came is kept; another try goes on from there."""


def download(url: str, part: Path, size: int, md5: str, progress: Progress = SILENT) -> None:
    """Brings the file at `url` to `part`, going on with what is there already.

    Args:
        size: bytes of the whole file.
        md5: of the whole file.

    Raises:
        UserError: for no network, an HTTP error, a connection that broke or a full disk (`part` is kept), or a wrong
            checksum.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.is_file() else 0
    if have > size:
        part.unlink()
        have = 0
    while have < size:
        try:
            with full_disk_explained(part.parent):
                _fetch(url, part, have, size, progress)
        except _BrokenConnection:
            if part.stat().st_size <= have:
                raise
            time.sleep(_PAUSE)
        have = part.stat().st_size
    with part.open("rb") as file, megabytes(progress, f"verify {part.name}", size) as advance:
        digest = hashlib.md5(usedforsecurity=False)
        while data := file.read(_BLOCK):
            digest.update(data)
            advance(len(data))
    if digest.hexdigest() != md5:
        part.unlink()
        raise UserError(f"what {url} gave is damaged (its MD5 is not {md5}); it was deleted, run it again", exit_code=1)


def _fetch(url: str, part: Path, have: int, size: int, progress: Progress) -> None:
    host = urlsplit(url).netloc
    request = urllib.request.Request(url, headers={"User-Agent": "searche1-lite", "Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if response.status != 206:  # a server that cannot resume sends all of it
                have = 0
            name = f"download {Path(urlsplit(url).path).name}"
            with part.open("ab" if have else "wb") as file, megabytes(progress, name, size, have) as advance:
                while data := response.read(_BLOCK):
                    have += len(data)
                    if have > size:
                        raise UserError(f"{url} is longer than the {size:,} bytes expected; try again later", 1)
                    file.write(data)
                    advance(len(data))
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot download {url}: HTTP {error.code} {error.reason}; try again later", 1) from error
    except urllib.error.URLError as error:
        raise UserError(
            f"cannot reach {host} ({_reason(error.reason)}); check the connection, and run it again to go on", 1
        ) from error
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _BrokenConnection(_broken(host, part, size), exit_code=1) from error
    if have < size:
        raise _BrokenConnection(_broken(host, part, size), exit_code=1)


def _broken(host: str, part: Path, size: int) -> str:
    have = part.stat().st_size
    return (
        f"the connection to {host} broke after {megabytes_of(have)} of {megabytes_of(size)}; run it again, it goes on "
        "from there"
    )


def _reason(error: object) -> str:
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def full_disk_explained(place: Path) -> Iterator[None]:
    """Turns the body's error for a full disk into a UserError that names `place`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk of {place} is full; make room and run it again", exit_code=1) from error


def megabytes_of(size: int) -> str:
    """Bytes for people: `9.2 GB`, `300 MB`."""
    if size >= 10**9:
        return f"{size / 10**9:.1f} GB"
    return f"{size / 10**6:.{0 if size >= 10**7 else 1}f} MB"


def unpack(archive: Path, out: Path, progress: Progress = SILENT) -> None:
    """Unpacks a `tar.gz` that holds one folder, which becomes `out`. Complete or not there at all.

    Raises:
        UserError: if it cannot be read, wants to write elsewhere, holds anything but one folder, or the disk is full.
    """
    staging = out.with_name(f".{out.name}.unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with (
            full_disk_explained(out.parent),
            archive.open("rb") as file,
            megabytes(progress, f"unpack {out.name}", archive.stat().st_size) as advance,
        ):
            counted = io.BufferedReader(_Counted(file, advance), _BLOCK)
            with tarfile.open(fileobj=counted, mode="r|gz") as tar:
                tar.extractall(staging, filter="data")
        folders = [path for path in staging.iterdir() if path.is_dir() and not path.is_symlink()]
        if len(folders) != 1:
            problem = f"{archive} holds {len(folders)} folders where an index is one"
            raise UserError(f"{problem}; delete it and run it again", exit_code=1)
        folders[0].rename(out)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it and run it again", exit_code=1) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Counted(io.RawIOBase):
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: Any, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._advance(count)
        return count
