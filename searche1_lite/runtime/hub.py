"""Downloads from and uploads to the Hugging Face hub, with a one-line error for each failure.

huggingface_hub 2.4 retries an unreachable hub for 24 s to minutes and lists a repository's files without a time limit.
So each download starts with one short request, and falls back to the cache if that fails.
"""

import errno
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Literal

from searche1_lite.runtime.errors import UserError, first_line

RepoType = Literal["model", "dataset"]

_TIMEOUT = 10.0
"""Seconds of the first request."""
_PAUSES = (1.0, 2.0)
"""Seconds before it is sent again, if the hub fails for a moment."""
_KINDS = {"model": "model", "dataset": "data set"}
_STATUS = {
    401: "the hub refused your token (HTTP 401); log in again with `hf auth login`, or unset HF_TOKEN",
    403: "the hub denies access (HTTP 403); check the terms on its page and the permissions of your token",
    429: "too many requests (HTTP 429); wait a few minutes, or `hf auth login` for a higher limit",
}


def download_file(repo: str, filename: str, *, repo_type: RepoType, revision: str | None = None) -> Path:
    """One file of a repository, from the cache if it is current or the hub cannot be reached.

    Raises:
        UserError: if it is neither on the hub nor in the cache; the message gives the cause and the remedy.
    """
    with _explained(f"{filename} of the {_KINDS[repo_type]} {repo!r}", revision=revision):
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        def fetch(cached: bool) -> str:
            return hf_hub_download(repo, filename, repo_type=repo_type, revision=revision, local_files_only=cached)

        url = hf_hub_url(repo, filename, repo_type=repo_type, revision=revision)
        return _fetch(lambda: get_hf_file_metadata(url, timeout=_TIMEOUT), fetch)


def download_folder(repo: str, *, repo_type: RepoType, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with the files of a repository whose paths match `patterns` (`fnmatch`).

    If the hub cannot be reached, the cache is used unless it is known to be incomplete.

    Raises:
        UserError: as `download_file` does; also if no file matches.
    """
    what = f"the {_KINDS[repo_type]} {repo!r}"
    with _explained(what, revision=revision):
        from huggingface_hub import HfApi, snapshot_download

        def fetch(cached: bool) -> str:
            return snapshot_download(
                repo, repo_type=repo_type, revision=revision, allow_patterns=list(patterns), local_files_only=cached
            )

        folder = _fetch(
            lambda: HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=_TIMEOUT), fetch
        )
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not any(fnmatch(path, pattern) for path in paths for pattern in patterns):
        raise UserError(f"cannot fetch {what}: it holds no {' or '.join(patterns)}; check the name")
    return folder


def check_upload(repo: str) -> None:
    """Checks that the hub accepts an upload to `repo` from this user, before work that takes long.

    Raises:
        UserError: for an invalid name, a missing or refused token, or an unreachable hub.
    """
    with _explained(f"to {repo!r}", "upload"):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise UserError(f"cannot upload to {repo!r}: write owner/name")
        if constants.is_offline_mode():
            raise UserError(f"cannot upload to {repo!r}: HF_HUB_OFFLINE is set; unset it", exit_code=1)
        if get_token() is None:
            raise UserError(
                f"cannot upload to {repo!r}: there is no token; log in with `hf auth login`, or set HF_TOKEN",
                exit_code=1,
            )
        HfApi().whoami()


def upload_folder(folder: Path, repo: str, *, public: bool = False) -> str:
    """Uploads a folder's files as the model `repo`, which is created if it does not exist.

    Args:
        public: visibility of a repository that is created here.

    Returns:
        The repository's URL.

    Raises:
        UserError: as `check_upload` does; also if the upload fails.
    """
    with _explained(f"to {repo!r}", "upload"):
        from huggingface_hub import HfApi

        url = HfApi().create_repo(repo, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by searche1-lite")
        return str(url)


def _fetch(probe: Callable[[], object], fetch: Callable[[bool], str]) -> Path:
    """`fetch(cached=False)` if `probe` gets an answer, else what is cached, else the error of `probe`."""
    from huggingface_hub import errors

    http = _http_library()
    for pause in (*_PAUSES, None):
        try:
            probe()
            break
        except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError, errors.HFValidationError):
            raise
        except (errors.OfflineModeIsEnabled, http.TransportError, errors.HfHubHTTPError, ValueError) as error:
            with suppress(errors.LocalEntryNotFoundError):
                return Path(fetch(True))
            if isinstance(error, ValueError) and not isinstance(error, errors.HfHubHTTPError):
                raise errors.FileMetadataError(str(error)) from error  # a page that is not the hub's
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 500
            if pause is None or status < 500 or isinstance(error, errors.OfflineModeIsEnabled | http.TimeoutException):
                raise
            time.sleep(pause)
    return Path(fetch(False))


@contextmanager
def _explained(what: str, action: str = "fetch", revision: str | None = None) -> Iterator[None]:
    """Silences huggingface_hub's own output and turns its errors into a `UserError`."""
    what = what if revision is None else f"{what} at revision {revision!r}"
    try:
        with _quiet():
            yield
    except (OSError, ValueError, RuntimeError, _http_library().HTTPError) as error:  # hf_xet raises RuntimeErrors
        problem, exit_code = _explain(error)
        raise UserError(f"cannot {action} {what}: {problem}", exit_code) from error


def _explain(error: BaseException) -> tuple[str, int]:
    """The cause of a hub error with its remedy, and the exit code: 2 for a wrong name, 1 otherwise.

    Libraries wrap the hub's errors, so causes and contexts are searched too.
    """
    from huggingface_hub import constants, errors

    http, hub, cache = _http_library(), constants.ENDPOINT, constants.HF_HUB_CACHE
    chain = _chain(error)
    full = f"no space left for the cache {cache}; free some, or set HF_HOME to another folder"
    unreachable = f"cannot reach {hub} ({{}}); check the connection, a proxy, or HF_ENDPOINT"
    unwritable = f"cannot write to the cache {cache} ({{}}); set HF_HOME to a writable folder"
    broken = f"the connection to {hub} broke ({{}}); run it again, complete files are kept"
    offline = f"HF_HUB_OFFLINE is set, and this is not (or not all) in the cache {cache}; unset it to download"
    no_connection = (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol)
    # An exception's type, its errno, or part of its message; the first one that is in the chain counts.
    causes: list[tuple[type[BaseException] | int | str, str, int]] = [
        (errors.OfflineModeIsEnabled, offline, 1),
        (errors.GatedRepoError, "it is gated; accept the terms on its page, then log in with `hf auth login`", 1),
        (errors.RepositoryNotFoundError, "no such repository, or it is private; check the name, or `hf auth login`", 2),
        (errors.RevisionNotFoundError, "the repository has no such revision; check it, or leave it out", 2),
        (errors.RemoteEntryNotFoundError, "the repository has no such file; check the name", 2),
        (errors.HfHubHTTPError, "", 1),
        (errors.HFValidationError, "not a repository name; write owner/name", 2),
        (errors.FileMetadataError, f"{hub} does not answer as a hub does; check HF_ENDPOINT, proxy and firewall", 1),
        *((kind, unreachable, 1) for kind in no_connection),
        *((sign, full, 1) for sign in (errno.ENOSPC, errno.EDQUOT, "os error 28")),  # the last from hf_xet
        *((kind, unwritable, 1) for kind in (PermissionError, NotADirectoryError, errno.EROFS)),
        *((kind, broken, 1) for kind in (http.TransportError, errors.XetDownloadError, "Consistency check failed")),
        (errors.LocalEntryNotFoundError, f"it is not in the cache {cache} and {hub} gave no answer; try again", 1),
    ]
    for cause, problem, exit_code in causes:
        link = next((link for link in chain if _is(link, cause)), None)
        if isinstance(link, errors.HfHubHTTPError) and not problem:
            status = link.response.status_code
            return _STATUS.get(status, f"{hub} answered HTTP {status}; try again later"), exit_code
        if link is not None:
            return problem.format(first_line(link).rstrip(".")), exit_code
    return f"{first_line(error).rstrip('.')}; try again", 1


def _is(error: BaseException, cause: type[BaseException] | int | str) -> bool:
    if isinstance(cause, type):
        return isinstance(error, cause)
    return cause in str(error) if isinstance(cause, str) else getattr(error, "errno", None) == cause


def _http_library() -> ModuleType:
    """The HTTP library whose errors huggingface_hub raises: httpx2 in version 2, httpx in version 1."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return sys.modules[base.__module__.partition(".")[0]]


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and all its causes and contexts, each once, nearest first."""
    links = [error]
    for link in links:
        links += [cause for cause in (link.__cause__, link.__context__) if cause is not None and cause not in links]
    return links


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences huggingface_hub's warnings, and its progress bars unless stderr is a terminal."""
    if os.environ.get("SEARCHE1_LITE_DEBUG"):
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, hide_bars = logging.get_verbosity(), not sys.stderr.isatty() and not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(logging.CRITICAL)
        if hide_bars:
            disable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if hide_bars:
                enable_progress_bars()
