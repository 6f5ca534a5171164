"""A stage's training between two optimizer steps, saved and restored bit for bit.

A checkpoint within a stage is an adapter folder (`adapter_model.safetensors`: the current policy) with:

    start/               the policy of the stage's start: the reference of GRPO's KL, the teacher of OFSD
    optimizer.*          the optimizer's moments and settings
    random.*             the states of torch's, CUDA's, numpy's and python's generators
    scheduler.json       of the learning rate
    trainer_state.json   the Trainer's step and log

Rollouts are seeded by their purpose and the order of questions is fixed, so the step is the position in the data. No
pickle: tensors are safetensors, the rest is JSON.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

from searche1_lite.policy.adapter import load_adapter_weights, save_adapter
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.interrupt import Interrupted
from searche1_lite.runtime.ranks import detect_lost_process
from searche1_lite.train.run_folder import RunFolder

Resumed = tuple[Path, dict[str, Any]]
"""A checkpoint within a stage, and its state."""

_TRAINER_STATE = "trainer_state.json"


class Holdable(Protocol):
    """Part of a stage with a JSON state."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class StageKeeper:
    """Saves one stage's training every few steps and where it stops, and restores it.

    Args:
        every: optimizer steps between two checkpoints; 0: only where it stops.
        state: the rest of the run's state in its checkpoints: the summary so far.
        grown: names of the trajectory files that grow during the stage.
        resumed: the checkpoint to resume from and its state; None: the stage begins.
    """

    def __init__(
        self,
        folder: RunFolder,
        stage: str,
        model: PeftModel,
        *,
        every: int,
        state: dict[str, Any],
        grown: Sequence[str] = (),
        resumed: Resumed | None = None,
    ) -> None:
        self.every = every
        self._folder, self._stage, self._model, self._state, self._grown = folder, stage, model, state, grown
        self.resumed_from: Path | None = None
        within: dict[str, Any] = {}
        if resumed is not None:
            self.resumed_from, within = resumed
        self.figures: dict[str, Any] = within.get("figures", {})
        """Measurements that the stage needs again when it is resumed."""
        self.spent: float = within.get("seconds", 0.0)
        """Seconds of training before this session."""
        self.steps: int = within.get("step", 0)
        self._parts: dict[str, Holdable] = {}
        self._parts_then: dict[str, Any] = within.get("parts", {})
        self._start = _copy_of(model)
        self._metrics_began: int = within.get("metrics_began", folder.metrics_size())
        self._began = time.monotonic()
        self._noted: dict[str, Any] | None = None
        self._random: tuple[dict[str, torch.Tensor], Any] | None = None
        for name, size in within.get("sizes", {}).items():
            folder.rewind_trajectories(name, size)

    @property
    def seconds(self) -> float:
        """Seconds of training, in all sessions."""
        return self.spent + time.monotonic() - self._began

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `measure`, from the checkpoint if the stage was resumed; its time is not training time."""
        if name not in self.figures:
            began = time.monotonic()
            self.figures[name] = measure()
            self._began += time.monotonic() - began
        return dict(self.figures[name])

    def hold(self, **parts: Holdable) -> None:
        """Includes these parts in its checkpoints, and restores their state."""
        self._parts |= parts
        for name, part in parts.items():
            if name not in self._parts_then:
                continue
            try:
                part.restore(self._parts_then[name])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.resumed_from} does not fit this version (it says something else of {name}); delete it, and "
                    "--resume goes on from the one before",
                    exit_code=1,
                ) from error

    def note(self, step: int) -> None:
        """Records the state after a step that is done and logged."""
        self.steps = step
        self._noted = {
            "stage": self._stage,
            "step": step,
            "seconds": round(self.seconds, 3),
            "figures": dict(self.figures),
            "parts": {name: part.state() for name, part in self._parts.items()},
            "metrics_began": self._metrics_began,
            "sizes": {name: self._folder.trajectories_size(name) for name in self._grown},
        }
        self._metrics_size = self._folder.metrics_size()
        self._random = _random_state()

    def save(self, trainer: Trainer) -> None:
        """Saves the state that was recorded last; between two steps neither weights nor optimizer change."""
        if self._noted is None:
            return  # nothing was done since the last save
        if trainer.state.global_step != self._noted["step"]:
            return  # another process was lost between an update and its note
        within, self._noted = self._noted, None
        state = self._state | {"within": within, "metrics_size": self._metrics_size}
        self._folder.save_within(self._stage, within["step"], lambda folder: self._write(folder, trainer), state)

    def _write(self, folder: Path, trainer: Trainer) -> None:
        assert self._random is not None
        save_adapter(self._model, folder)
        # With the settings beside them, they load as any adapter does.
        (folder / "start").mkdir()
        save_file(self._start, folder / "start" / "adapter_model.safetensors")
        (folder / "start" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        tensors, rest = _flat(trainer.optimizer.state_dict())
        save_file(tensors, folder / "optimizer.safetensors")
        _write_json(folder / "optimizer.json", rest)
        _write_json(folder / "scheduler.json", trainer.lr_scheduler.state_dict())
        save_file(self._random[0], folder / "random.safetensors")
        _write_json(folder / "random.json", self._random[1])
        trainer.state.save_to_json(str(folder / _TRAINER_STATE))


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are safetensors and JSON in place of pickles."""

    keeper: StageKeeper | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.keeper is not None and not self.control.should_training_stop:  # else the stage's own follows
            self.keeper.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        tensors = load_file(folder / "optimizer.safetensors")
        self.optimizer.load_state_dict(_nested(tensors, _read_json(folder / "optimizer.json")))
        self.lr_scheduler.load_state_dict(_read_json(folder / "scheduler.json"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder = Path(checkpoint)
            _set_random_state(load_file(folder / "random.safetensors"), _read_json(folder / "random.json"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """bf16 needs no loss scaling."""


def train(trainer: ResumableTrainer, keeper: StageKeeper | None) -> None:
    """Trains from the stage's state. If it is stopped or raises a UserError, the last whole step is saved."""
    trainer.keeper = keeper
    source = keeper.resumed_from if keeper is not None else None
    if source is not None:
        _check_readable(source)
    try:
        with detect_lost_process():
            trainer.train(resume_from_checkpoint=None if source is None else str(source))
    except (Interrupted, UserError):
        if keeper is not None:
            keeper.save(trainer)
        raise


def _check_readable(folder: Path) -> None:
    """Refuses a checkpoint with an invalid file: sound checksums do not prove who wrote it."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix == ".json":
                _read_json(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not what `train` writes ({error}); delete {folder}, and --resume goes on from the one "
                "before",
                exit_code=1,
            ) from error


def saving_arguments(keeper: StageKeeper | None) -> dict[str, Any]:
    """The Trainer's arguments for saving."""
    if keeper is None or not keeper.every:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": keeper.every}


def _copy_of(model: PeftModel) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    from searche1_lite.policy.adapter import ADAPTER

    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def _flat(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `index.name`, and the rest."""
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        rest["state"][str(index)] = {}
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                rest["state"][str(index)][name] = value
    return tensors, rest


def _nested(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _random_state() -> tuple[dict[str, torch.Tensor], Any]:
    drawn: Any = numpy.random.get_state()  # noqa: NPY002 - the state others draw from
    name, keys, position, has_gauss, gauss = drawn
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(numpy.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": random.getstate(), "numpy": [name, position, has_gauss, gauss]}


def _set_random_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    version, internal, gauss_next = rest["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, position, has_gauss, gauss = rest["numpy"]
    numpy.random.set_state((name, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(devices):
        if (state := tensors.get(f"cuda.{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
