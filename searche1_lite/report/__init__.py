"""The report: one HTML file with the figures of a run or a sweep, and every trajectory to look into.

It opens from disk: style, script, plots (SVG) and data are inside, and its content security policy lets nothing else
in. It can be built while a run goes on; what is not there yet is left out. Text of documents, questions and answers is
data all the way: `escaping.py` for what Python writes, text nodes alone for what the viewer's script shows.
"""

from pathlib import Path

from searche1_lite.report.record import is_run
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.sealed_folder import write_atomically

FILE_NAME = "report.html"


def build_report(folder: Path, place: Path | None = None) -> str:
    """The HTML report of a run's or a sweep's folder.

    Args:
        place: the folder that the report will lie in, for a sweep's links to its runs; default: `folder`.

    Raises:
        UserError: if the folder is neither, or a sweep's `sweep.json` cannot be read.
    """
    check_folder(folder)
    if (folder / "sweep.json").is_file():
        from searche1_lite.report.sweep import build_sweep_report

        return build_sweep_report(folder, place or folder)
    from searche1_lite.report.run import build_run_report

    return build_run_report(folder)


def write_report(folder: Path, out: Path | None = None, runs: bool = False) -> Path:
    """Writes the report and returns where: `out`, else `report.html` in the folder.

    Args:
        runs: for a sweep, write the report of each of its runs first, into the run's folder.

    Raises:
        UserError: as `build_report`, and if there is no folder to write `out` to.
    """
    check_folder(folder)
    path = out or folder / FILE_NAME
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.absolute().parent}; make it, or choose another --out")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --out a file, such as {path / FILE_NAME}")
    if runs:
        if not (folder / "sweep.json").is_file():
            raise UserError(f"{folder} is one run, not a sweep; leave --runs out")
        from searche1_lite.report.sweep import run_folders

        for run in run_folders(folder):
            write_atomically(run / FILE_NAME, build_report(run))
    write_atomically(path, build_report(folder, path.absolute().parent))
    return path


def check_folder(folder: Path) -> None:
    """Before anything heavy is loaded.

    Raises:
        UserError: if the folder holds neither a run nor a sweep.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a run, such as runs/demo")
    if not is_run(folder) and not (folder / "sweep.json").is_file():
        raise UserError(
            f"{folder} holds neither a run (config.yaml, summary.json) nor a sweep (sweep.json); give the folder that "
            "`train` or `sweep` wrote"
        )
