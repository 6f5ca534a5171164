"""Files from the Hugging Face hub, kept in its own cache, with one clear line for everything that can go wrong.

Seen in huggingface_hub 2.4.0, and why this wraps it: alone it asks an unreachable hub for 24 s to minutes, and for a
repository's list of files with no time limit at all. So a short request goes first here. Within one call it takes up a
broken download where it stopped (a `Range` request); a call that fails throws its partial file away, and only complete
files are kept.
"""

import errno
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from searche1_lite.runtime.errors import UserError

RepoType = Literal["model", "dataset"]
_T = TypeVar("_T")

_TIMEOUT = 10.0
"""Seconds that the first request may take."""
_PAUSES = (1.0, 2.0)
"""Seconds before each further try, where trying again can help."""
_KINDS = {"model": "model", "dataset": "data set"}


def download_file(repo: str, filename: str, *, repo_type: RepoType, revision: str | None = None) -> Path:
    """One file of a repository, from the cache where it is there and still the newest.

    Where the hub cannot be reached, what is in the cache counts.

    Raises:
        UserError: see `explain_hub_error`.
    """
    what = _name(f"{filename} of the {_KINDS[repo_type]} {repo!r}", revision)
    with _quiet(), _explained(what):
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        def ask() -> object:
            url = hf_hub_url(repo, filename, repo_type=repo_type, revision=revision)
            return get_hf_file_metadata(url, timeout=_TIMEOUT)

        def fetch(local_files_only: bool) -> Path:
            return Path(
                hf_hub_download(
                    repo, filename, repo_type=repo_type, revision=revision, local_files_only=local_files_only
                )
            )

        return _fetch(ask, fetch)


def download_folder(repo: str, *, repo_type: RepoType, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with those files of a repository that match `patterns` (`fnmatch`, on the path inside the repository).

    Where the hub cannot be reached, what is in the cache counts; it is refused where it is known to be incomplete.

    Raises:
        UserError: see `explain_hub_error`; also if no file matches.
    """
    what = _name(f"the {_KINDS[repo_type]} {repo!r}", revision)
    with _quiet(), _explained(what):
        from huggingface_hub import HfApi, snapshot_download

        def ask() -> object:
            return HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=_TIMEOUT)

        def fetch(local_files_only: bool) -> Path:
            return Path(
                snapshot_download(
                    repo,
                    repo_type=repo_type,
                    revision=revision,
                    allow_patterns=list(patterns),
                    local_files_only=local_files_only,
                )
            )

        folder = _fetch(ask, fetch)
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not any(fnmatch(path, pattern) for path in paths for pattern in patterns):
        raise UserError(f"cannot fetch {what}: it holds no {' or '.join(patterns)}; check the name")
    return folder


def check_upload(repo: str) -> None:
    """Whether there is a hub that takes an upload to `repo` from us; asked before hours of work, or minutes.

    Raises:
        UserError: for an impossible name, without a token or with one that the hub refuses, or if it is not reached.
    """
    with _quiet(), _explained(f"to {repo!r}", "upload"):
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
    """Uploads a folder's files as the model `repo`, which is made if it is not there, and returns its address.

    Args:
        public: whether a repository that is made here can be seen by everyone; one that is there stays as it is.

    Raises:
        UserError: see `check_upload` and `explain_hub_error`.
    """
    with _quiet(), _explained(f"to {repo!r}", "upload"):
        from huggingface_hub import HfApi

        address = HfApi().create_repo(repo, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by searche1-lite")
        return str(address)


def explain_hub_error(error: BaseException, what: str, doing: str = "fetch") -> UserError | None:
    """The one line for `error`, or None if it has nothing to do with the hub.

    Causes and contexts are looked through, because libraries wrap the hub's errors in others with several lines.

    Args:
        what: what was to be fetched, as it stands in a sentence, such as "the model 'a/b'".
        doing: what was done with it, if it was not fetched.

    Returns:
        A `UserError` with exit code 2 for a wrong name, and 1 for what network, disk, login or cache are to blame for.
    """
    from huggingface_hub import constants, errors

    http = _http_library()
    chain = list(_chain(error))

    def first(*types: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, types)), None)

    def failed(problem: str, exit_code: int = 1) -> UserError:
        return UserError(" ".join(f"cannot {doing} {what}: {problem}".split()), exit_code)

    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    not_cached = first(errors.LocalEntryNotFoundError)
    if first(errors.OfflineModeIsEnabled) or (not_cached and constants.is_offline_mode()):
        return failed(f"HF_HUB_OFFLINE is set, and this is not (or not all) in the cache {cache}; unset it to download")
    if first(errors.GatedRepoError):
        return failed("it is gated; accept the terms on its page on the hub, then log in with `hf auth login`")
    if first(errors.RepositoryNotFoundError):
        return failed("the hub has no such repository, or it is private; check the name, or `hf auth login`", 2)
    if first(errors.RevisionNotFoundError):
        return failed("the repository has no such revision; check it, or leave it out", 2)
    if first(errors.RemoteEntryNotFoundError):
        return failed("the repository has no such file; check the name", 2)
    answer = first(errors.HfHubHTTPError)
    if isinstance(answer, errors.HfHubHTTPError):
        return failed(_explain_status(answer.response.status_code, hub))
    if first(errors.HFValidationError):
        return failed("that is not a repository's name; write owner/name", 2)
    if first(errors.FileMetadataError):
        return failed(f"{hub} does not answer as a hub does; check HF_ENDPOINT, proxy and firewall")
    if out := first(http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol):
        return failed(f"cannot reach {hub} ({_reason(out)}); check the connection, a proxy, or HF_ENDPOINT")
    full = next((link for link in chain if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)), 0)
    if full or any("os error 28" in str(link) for link in chain):  # how hf_xet, written in Rust, says the same
        return failed(f"no space left for the cache {cache}; make room, or set HF_HOME to a folder elsewhere")
    if xet := next((link for link in chain if type(link).__module__ == "hf_xet"), None):
        return failed(f"the storage behind {hub} refused it ({_reason(xet)}); try again")
    if (shut := first(PermissionError, NotADirectoryError)) or (
        shut := next((link for link in chain if isinstance(link, OSError) and link.errno == errno.EROFS), None)
    ):
        return failed(f"cannot write to the cache {cache} ({_reason(shut)}); set HF_HOME to a folder you may write to")
    broken = first(http.TransportError, errors.XetDownloadError)
    if broken or (broken := next((link for link in chain if "Consistency check failed" in str(link)), None)):
        return failed(f"the connection to {hub} broke ({_reason(broken)}); run it again, complete files are kept")
    if not_cached:
        return failed(f"it is not in the cache {cache} and {hub} was not asked or gave no answer; try again")
    return None


def _http_library() -> ModuleType:
    """The HTTP library whose errors huggingface_hub lets through: httpx2 in version 2, httpx in version 1."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return sys.modules[base.__module__.partition(".")[0]]


def _explain_status(status: int, hub: str) -> str:
    if status == 401:
        return "the hub refused your token (HTTP 401); log in anew with `hf auth login`, or unset HF_TOKEN"
    if status == 403:
        return "the hub denies access (HTTP 403); check the terms on its page and what your token may do"
    if status == 429:
        return "too many requests (HTTP 429); wait a few minutes, or `hf auth login` for a higher limit"
    return f"{hub} answered HTTP {status}; try again later"


def _fetch(ask: Callable[[], object], fetch: Callable[[bool], Path]) -> Path:
    """`fetch(False)` once `ask` has shown that the hub answers, else what the cache has, else the error of `ask`."""
    from huggingface_hub import errors

    http = _http_library()
    for pause in (*_PAUSES, None):
        try:
            ask()
        except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError, errors.HFValidationError):
            raise
        except (errors.OfflineModeIsEnabled, http.TransportError, errors.HfHubHTTPError, ValueError) as error:
            try:
                return fetch(True)
            except errors.LocalEntryNotFoundError:
                pass
            if isinstance(error, ValueError) and not isinstance(error, errors.HfHubHTTPError):
                raise errors.FileMetadataError(str(error)) from error  # a page of some other kind than the hub's
            if isinstance(error, http.TimeoutException):
                raise  # long enough
            for_a_moment = isinstance(error, http.TransportError) or (
                isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (408, 500, 502, 503, 504)
            )
            if pause is None or not for_a_moment:
                raise
            time.sleep(pause)
        else:
            break
    return fetch(False)


@contextmanager
def _explained(what: str, doing: str = "fetch") -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, _http_library().HTTPError) as error:  # hf_xet raises RuntimeErrors
        said = explain_hub_error(error, what, doing)
        raise said or UserError(f"cannot {doing} {what}: {_reason(error)}; try again", exit_code=1) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's warnings to itself, as our line says what matters, and progress bars out of files."""
    if os.environ.get("SEARCHE1_LITE_DEBUG"):
        yield
        return
    # Imported first, since it sets the level itself as it is imported.
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

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


def _name(what: str, revision: str | None) -> str:
    return what if revision is None else f"{what} at revision {revision!r}"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what it came from, each once."""
    pending, seen = [error], set()
    while pending:
        link = pending.pop(0)
        if id(link) not in seen:
            seen.add(id(link))
            yield link
            pending += [cause for cause in (link.__cause__, link.__context__) if cause is not None]
