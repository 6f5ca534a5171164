"""Pyserini's prebuilt indexes by name: found where Pyserini keeps them, else downloaded to there.

Pyserini's own download is not called: it prints on stdout, cannot go on where it stopped, and reports by `assert`.
"""

import difflib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import Progress
from searche1_lite.search.download import download, megabytes_of, unpack
from searche1_lite.search.jvm import start_jvm

UNPACKED = 1.5
"""Size of an unpacked index over that of its archive, assumed."""


@dataclass(frozen=True, slots=True)
class PrebuiltIndex:
    """An entry of Pyserini's table. `size` is the archive's, in bytes; `folder` where the index is or goes."""

    name: str
    url: str
    md5: str
    size: int
    folder: Path


def pyserini_cache() -> Path:
    """Where Pyserini keeps indexes: `PYSERINI_CACHE`, else `~/.cache/pyserini`."""
    return Path(os.environ.get("PYSERINI_CACHE") or Path.home() / ".cache" / "pyserini") / "indexes"


def find_prebuilt(name: str, also: tuple[str, ...] = ()) -> PrebuiltIndex:
    """The entry of Pyserini's table with this name.

    Args:
        also: further names to suggest.

    Raises:
        UserError: with the nearest names, if there is none.
    """
    start_jvm()
    from pyserini.prebuilt_index_info import TF_INDEX_INFO

    entry: dict[str, Any] | None = TF_INDEX_INFO.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*TF_INDEX_INFO, *also], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "names are such as wikipedia-dpr-100w or wiki-18"
        raise UserError(f"no index {name!r}: it is no folder, and Pyserini has none of that name; {hint}")
    url, md5 = str(entry["urls"][0]), str(entry["md5"])
    base = str(entry.get("filename") or url.rpartition("/")[2]).partition(".tar.gz")[0]
    return PrebuiltIndex(name, url, md5, int(entry["size compressed (bytes)"]), pyserini_cache() / f"{base}.{md5}")


def fetch_prebuilt(index: PrebuiltIndex, confirm: Callable[[str], bool], progress: Progress) -> Path:
    """The index's folder, downloaded first if it is not there and `confirm` agrees.

    Raises:
        UserError: if there is no room, the answer was no, or the download failed (what came is kept, to go on with).
    """
    if index.folder.is_dir():
        return index.folder
    place = index.folder.parent
    part = place / f"{index.folder.name}.tar.gz.part"
    have = part.stat().st_size if part.is_file() else 0
    to_unpack = int(index.size * UNPACKED)
    need_room(place, index.size - have + to_unpack)
    left = f", of which {megabytes_of(have)} are there already" if have else ""
    what = f"downloading the index {index.name} takes {megabytes_of(index.size)}{left}"
    agree(confirm, f"{what}, and about {megabytes_of(to_unpack)} more on disk to unpack it, in {place}")
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{index.folder}.lock"):
        if not index.folder.is_dir():
            download(index.url, part, index.size, index.md5, progress)
            unpack(part, index.folder, progress)
            part.unlink()
    return index.folder


def need_room(place: Path, size: int) -> None:
    """Raises UserError if the disk of `place`, which may not exist yet, has less than `size` bytes free."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise UserError(
            f"no room in {place}: about {megabytes_of(size)} are needed and {megabytes_of(free)} are free; make room", 1
        )


def agree(confirm: Callable[[str], bool], what: str) -> None:
    """Raises UserError unless `confirm`, which is told `what` would be done, agrees."""
    if not confirm(what):
        raise UserError("nothing was downloaded; set search.index or search.corpus to something else", exit_code=1)
