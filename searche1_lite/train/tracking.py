"""TensorBoard, trackio and wandb: the places that a run's figures go to through the Trainers' `report_to`.

Each stage has a Trainer of its own, so each is a run of its own there: `RUN/tensorboard/round1.grpo`, or the run
`NAME-ID/round1.grpo` of a project, NAME being the run's folder and ID its mark in the file `tracking-id`. The
evaluations are one more run, `evaluation`, whose steps are the stages. A stage that is done again after an interruption
replaces its earlier figures.

What it leaves out: trackio's runs on a Space are not replaced, only local ones; models and tables are not uploaded.
"""

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from copy import copy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searche1_lite.config import Config, LoggingConfig
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.ranks import is_first
from searche1_lite.runtime.sealed_folder import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from transformers import Trainer

EVALUATION = "evaluation"
"""The run of the evaluations, beside those of the stages."""

_DEFAULT_PROJECT = "searche1-lite"


def check_trackers(settings: LoggingConfig) -> None:
    """Refuses what cannot be reported to, before anything heavy is loaded.

    Raises:
        UserError: if a package is not installed, or wandb is to be written to and has no key.
    """
    for name in settings.report_to:
        if find_spec(name) is None:
            remedy = f"pip install -e '.[{name}]' in the toolkit's checkout, or leave it out"
            raise UserError(f"logging.report_to={name} needs the package {name}: {remedy}")
    if is_first() and "wandb" in settings.report_to and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        with redirect_stdout(sys.stderr), _as_user_error():
            wandb.login()  # asks where there is a terminal


@dataclass(frozen=True, slots=True)
class Tracked:
    """One stage of a run, as the trackers know it.

    Args:
        folder: the run's, which is there.
        stage: such as `round1.grpo`.
    """

    config: Config
    folder: Path
    stage: str

    @property
    def report_to(self) -> list[str]:
        return list(self.config.logging.report_to) if is_first() else []

    @property
    def project(self) -> str:
        return self.config.logging.project or _DEFAULT_PROJECT

    @property
    def group(self) -> str:
        """What the names of all the run's stages begin with."""
        return f"{self.folder.resolve().name}-{_id_of(self.folder)}"

    @property
    def name(self) -> str:
        return f"{self.group}/{self.stage}"

    @contextmanager
    def opened(self) -> "Iterator[SummaryWriter | None]":
        """Removes what an earlier attempt at this stage reported, and opens what the Trainer's callbacks would not.

        Yields:
            TensorBoard's writer, if it is asked for.
        """
        writer = None
        # trackio prints; results alone go to stdout.
        with redirect_stdout(sys.stderr), ExitStack() as stack:
            if "tensorboard" in self.report_to:
                writer = self._tensorboard_writer()
                stack.callback(writer.close)
            if "wandb" in self.report_to:
                stack.enter_context(self._wandb_run())
            if "trackio" in self.report_to:
                stack.enter_context(self._trackio_run())
            yield writer

    def _tensorboard_writer(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard" / self.stage
        shutil.rmtree(folder, ignore_errors=True)
        return SummaryWriter(str(folder), purge_step=0)  # a TensorBoard that is open forgets the earlier try too

    @contextmanager
    def _wandb_run(self) -> Iterator[None]:
        import wandb

        with _as_user_error():
            run = wandb.init(
                project=self.config.logging.project or os.environ.get("WANDB_PROJECT") or _DEFAULT_PROJECT,
                group=self.group,
                name=self.name,
                id=f"{_id_of(self.folder)}-{self.stage}",  # without `resume`, a run of this id is overwritten
                dir=os.environ.get("WANDB_DIR") or str(self.folder),
                config={"searche1_lite": asdict(self.config)},
                # Its lines about each stage's run are enough; the evaluations' run is opened after each of them.
                settings=wandb.Settings(console="off", quiet=True, silent=self.stage == EVALUATION),
            )
        try:
            yield
        except BaseException:
            run.finish(exit_code=1)
            raise
        run.finish()

    @contextmanager
    def _trackio_run(self) -> Iterator[None]:
        """Opened by the callback; closed here if the callback does not come to it."""
        import trackio
        from trackio import context_vars

        with suppress(ValueError):  # there is no such project yet
            for run in trackio.Api().runs(self.project):
                if run.name == self.name:
                    run.delete()
        try:
            yield
        finally:
            if context_vars.current_run.get() is not None:
                trackio.finish()


@contextmanager
def _closing(opened: AbstractContextManager[Any]) -> Iterator[Any]:
    """`opened`, whose failure to close costs a line: what was trained in it must still be saved."""
    value = opened.__enter__()
    try:
        yield value
    except BaseException:
        with suppress(Exception):  # the first error is reported
            opened.__exit__(*sys.exc_info())
        raise
    try:
        opened.__exit__(None, None, None)
    except Exception as error:
        _say_lost(error)


def _say_lost(error: Exception) -> None:
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    say_on_stderr(f"a tracker failed, and may lack figures that the run's folder has: {type(error).__name__}: {reason}")


def reporting_arguments(tracked: Tracked | None) -> dict[str, Any]:
    """The Trainer's arguments that have to do with reporting; None: it reports to nobody."""
    if tracked is None or not tracked.report_to:
        return {"report_to": "none"}
    return {
        "report_to": tracked.report_to,
        "run_name": tracked.name,
        "project": tracked.project,
        "trackio_static_space_id": False,  # else each stage would leave a Space behind, where TRACKIO_SPACE_ID is set
    }


@contextmanager
def reporting(trainer: "Trainer", tracked: Tracked | None) -> Iterator[None]:
    """What the trainer's reporting callbacks need around `train`.

    They are put behind those given to the trainer, which may add figures to the log that they are shown.
    """
    if tracked is None or not tracked.report_to:
        yield
        return
    from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

    with _closing(tracked.opened()) as writer:
        callbacks = []
        for kind in get_reporting_integration_callbacks(tracked.report_to):
            callback = trainer.pop_callback(kind)
            if isinstance(callback, TensorBoardCallback):
                callback.tb_writer = writer
            trainer.add_callback(callback)
            callbacks.append(callback)
        trainer.add_callback(_retelling(callbacks))
        yield


def _retelling(callbacks: Sequence[Any]) -> Any:
    """What tells `callbacks`, as training begins, all that a stage that is resumed had logged: theirs is a new run."""
    from transformers import TrainerCallback

    class Retelling(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            for entry in state.log_history:
                then = copy(state)
                then.global_step = entry["step"]
                for callback in callbacks:
                    logs = {name: value for name, value in entry.items() if name != "step"}
                    callback.on_log(args, then, control, logs=logs, **rest)

    return Retelling()


def report_evaluations(config: Config, folder: Path, stages: Sequence[dict[str, Any]]) -> None:
    """All evaluations so far, as the run `evaluation`: step 0 is the base, step 1 the first stage, and so on.

    It is written anew each time, so nothing stands in it twice however often a run was resumed.

    Args:
        stages: as in `summary.json`.
    """
    tracked = Tracked(config, folder, EVALUATION)
    if not tracked.report_to:
        return
    try:
        _report_points(tracked, [{f"eval/{name}": value for name, value in figures_of(s).items()} for s in stages])
    except Exception as error:  # the run matters more; they are reported again with the next evaluation
        _say_lost(error)


def _report_points(tracked: Tracked, points: Sequence[dict[str, float]]) -> None:
    with tracked.opened() as writer:
        if "trackio" in tracked.report_to:
            import trackio

            trackio.init(project=tracked.project, name=tracked.name, embed=False)
        if "wandb" in tracked.report_to:
            import wandb
        for step, point in enumerate(points):
            if writer is not None:
                for name, value in point.items():
                    writer.add_scalar(name, value, step)
            if "trackio" in tracked.report_to:
                trackio.log(point, step=step)
            if "wandb" in tracked.report_to:
                wandb.log(point, step=step)


def figures_of(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record, those of a part under `part/figure`; its place in the run is none."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= {f"{key}/{inner}": figure for inner, figure in figures_of(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("round", "step"):
            found[key] = value
    return found


def _id_of(folder: Path) -> str:
    """A mark of the run in this folder, so that a later run in a folder of that name is not taken for it."""
    path = folder / "tracking-id"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def _as_user_error() -> Iterator[None]:
    """wandb's own errors in one line."""
    from wandb.errors import Error

    try:
        yield
    except Error as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"wandb: {reason} (WANDB_MODE=offline does without the network)", exit_code=1) from error
