"""A folder that is there whole or not at all, and that shows when something in it has changed since.

It is written to a staging folder beside it, synced, and renamed. `state.json` is written last: it holds the size and
checksum of every other file, and a checksum of itself.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

SEAL = "state.json"


class DamagedError(Exception):
    """A sealed folder has changed; names the file and the change."""


def write_sealed(final: Path, write: Callable[[Path], None], state: dict[str, Any]) -> None:
    """Makes the folder `final`, over an earlier one. If anything fails, that one stays, and no half of the new one.

    Args:
        write: puts the files into the folder that it is given.
        state: goes into `state.json`.
    """
    staging = final.with_name(f".{final.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write(staging)
        files = {}
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            files[path.relative_to(staging).as_posix()] = fingerprint(path)
            sync(path)
        (staging / SEAL).write_text(_sealed(state, files), encoding="utf-8")
        sync(staging / SEAL)
        for folder in [*(path for path in staging.rglob("*") if path.is_dir()), staging]:
            sync(folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)  # on a full disk its room is needed
        if "os error 28" in str(error):  # safetensors has an error of its own for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
        raise
    earlier = final.with_name(f".{final.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if final.exists():
        final.rename(earlier)
    staging.rename(final)
    sync(final.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def recover_sealed(parent: Path) -> None:
    """Restores each folder in `parent` whose replacement was interrupted between its two renames: the new one if it is
    undamaged, else the earlier one."""
    for earlier in sorted(parent.glob(".*.earlier")):
        final = earlier.with_name(earlier.name[1:].removesuffix(".earlier"))
        if final.exists():
            continue  # cut off after the second one
        staging = final.with_name(f".{final.name}.staging")
        try:
            read_sealed(staging)
        except DamagedError:
            staging = earlier
        staging.rename(final)
        sync(parent)


def update_sealed(folder: Path, state: dict[str, Any]) -> None:
    """Replaces the state of a sealed folder, whose files must be unchanged."""
    write_atomically(folder / SEAL, _sealed(state, _read_seal(folder)["files"]))


def read_sealed(folder: Path, files: bool = True) -> dict[str, Any]:
    """The state, after every file was found to be as it was sealed.

    Args:
        files: look at all files; else only at the state itself.

    Raises:
        DamagedError: if one is missing, cut off or changed.
    """
    seal = _read_seal(folder)
    for name, known in seal["files"].items() if files else ():
        path = folder / name
        try:
            found = fingerprint(path)
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror})") from error
        if found["bytes"] != known["bytes"]:
            raise DamagedError(f"{path} has {found['bytes']} of its {known['bytes']} bytes")
        if found["sha256"] != known["sha256"]:
            raise DamagedError(f"{path} has changed since it was written (its checksum differs)")
    return seal["state"]


def remove_sealed(folder: Path) -> None:
    """Removes a folder so that an interrupted removal is not mistaken for damage."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.staging")
    try:
        staging.write_text(text, encoding="utf-8")
        sync(staging)
        staging.replace(path)
        sync(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def cut(path: Path, size: int) -> None:
    """Cuts a file to `size` bytes if it has more; hard links of the file keep their content."""
    if not path.is_file():
        return
    known = path.stat()
    if known.st_nlink > 1:  # also where nothing is to be cut: what is cut is then added to
        staging = path.with_name(f".{path.name}.staging")
        shutil.copyfile(path, staging)
        os.truncate(staging, min(size, known.st_size))
        sync(staging)
        staging.replace(path)
    elif known.st_size > size:
        os.truncate(path, size)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and checksum of a file: `bytes` and `sha256`."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sealed(state: dict[str, Any], files: dict[str, Any]) -> str:
    content = {"state": state, "files": files}
    return json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_seal(folder: Path) -> dict[str, Any]:
    path = folder / SEAL
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        known = seal.pop("sha256")
        if known != _digest(seal) or seal.keys() != {"state", "files"}:
            raise DamagedError(f"{path} has changed since it was written (its checksum differs)")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged or cut off") from error
    state, files = seal["state"], seal["files"]
    if not (isinstance(state, dict) and isinstance(files, dict) and all(map(_is_inside, files, files.values()))):
        raise DamagedError(f"{path} was written by another program or version (it is of another form)")
    return seal


def _is_inside(name: str, known: Any) -> bool:
    """Whether the file exists and matches its `fingerprint`."""
    place = PurePosixPath(name)
    inside = not place.is_absolute() and ".." not in place.parts and "\0" not in name
    return inside and isinstance(known, dict) and {"bytes", "sha256"} <= known.keys()
