"""Ablation sweeps: named variants of one configuration, each with the same seeds, one run a folder.

A sweep file says what is compared:

    preset: demo                      # or `config: FILE.yaml`, beside this file
    settings: {budget.updates: 64}    # of all variants
    seeds: [1, 2, 3]
    baseline: grpo                    # default: the first variant
    variants:
      grpo: {title: GRPO only, ofsd.enabled: false}
      ofsd: {}

`grid: {key: [values], ...}` in the place of `variants` takes every combination. What two runs have in common is
computed once: the stages in which their settings and seed agree, and answers that the same policy gave to the same
questions.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from searche1_lite.config import Config, load_config
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.yaml_file import read_yaml

_KEYS = ("preset", "config", "settings", "seeds", "baseline", "variants", "grid")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.,=+-]{0,98}[A-Za-z0-9_,=+-])?")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""What is no folder's name on Windows, which also drops a dot at the end."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a sweep."""

    variant: str
    seed: int
    config: Config
    folder: Path
    """Within the sweep's."""

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep file asks for."""

    name: str
    titles: dict[str, str]
    """Of each variant, in the file's order."""
    baseline: str
    seeds: list[int]
    runs: list[PlannedRun]
    """Seed by seed, so that an unfinished sweep already compares."""


def load_plan(file: Path, overrides: Sequence[str] = (), seeds: Sequence[int] = ()) -> Plan:
    """Reads a sweep file and checks every run's settings.

    Args:
        overrides: `key=value` settings of all variants; what a variant itself says counts more.
        seeds: in the place of the file's.

    Raises:
        UserError: for a faulty file or impossible settings; names the file, and the variant.
    """
    data = read_yaml(file)
    if unknown := [key for key in data if key not in _KEYS]:
        raise UserError(f"{file}: unknown key {unknown[0]}; a sweep has {', '.join(_KEYS)}")
    settings = data.get("settings") or {}  # of all variants
    for key in ("preset", "config"):
        if not isinstance(data.get(key), str | None):
            raise UserError(f"{file}: {key}={data[key]!r} is impossible; give a name")
    if not isinstance(settings, dict):
        raise UserError(f"{file}: settings must hold `key: value` lines")
    if "seed" in settings or any(override.partition("=")[0].strip() == "seed" for override in overrides):
        raise UserError(f"{file}: a sweep has `seeds`, not seed; write them there, or give --seeds 1,2,3")
    chosen = list(seeds) or data.get("seeds") or [0]
    if not isinstance(chosen, list) or not all(type(seed) is int and seed >= 0 for seed in chosen):
        raise UserError(f"{file}: seeds must be a list of whole numbers, such as [1, 2, 3]")
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{file}: a seed stands twice in {chosen}; each gives one run a variant")
    variants, titles = _variants(file, data)
    baseline = str(data.get("baseline") or next(iter(variants)))
    if baseline not in variants:
        raise UserError(f"{file}: baseline {baseline!r} is no variant; there are {', '.join(variants)}")
    preset, config = data.get("preset"), data.get("config")
    runs = []
    for seed, (name, changes) in product(chosen, variants.items()):
        try:
            settled = load_config(
                preset,
                file.parent / config if config else None,
                overrides,
                {"logging.samples": 0, **settings},
                {**changes, "seed": seed},
            )
        except UserError as error:
            raise UserError(f"{file}, variant {name}: {error}") from error
        runs.append(PlannedRun(name, seed, settled, Path("runs") / name / f"seed-{seed}"))
    _check_different(file, runs)
    return Plan(sweep_name(file), titles, baseline, chosen, runs)


def sweep_name(file: Path) -> str:
    """What a sweep is called, by its file."""
    return file.stem.strip(".") or "sweep"


def parse_seeds(text: str) -> list[int]:
    """Seeds from `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers; write them as 1,2,3") from error


def _variants(file: Path, data: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Each variant's settings and its title, by its name."""
    variants, grid = data.get("variants"), data.get("grid")
    if (variants is None) == (grid is None):
        raise UserError(
            f"{file}: a sweep has either `variants` (by name) or a `grid` (key: [values]); write one of them"
        )
    if variants is None:
        if not isinstance(grid, dict) or not grid or not all(isinstance(v, list) and v for v in grid.values()):
            raise UserError(f"{file}: grid must hold `key: [value, ...]` lines")
        lasts = [str(key).rpartition(".")[2] for key in grid]
        shown = lasts if len(set(lasts)) == len(lasts) else [str(key) for key in grid]
        variants = {}
        for values in product(*grid.values()):
            title = ",".join(f"{key}={value}" for key, value in zip(shown, values, strict=True))
            name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", title)[:100]
            if name in variants:
                raise UserError(f"{file}: two values of the grid are both called {name}; write them as variants")
            variants[name] = {"title": title, **dict(zip(grid, values, strict=True))}
    if not isinstance(variants, dict) or not variants:
        raise UserError(f"{file}: variants must hold `name: {{key: value}}` lines")
    titles = {}
    for name, changes in variants.items():
        if not _NAME.fullmatch(str(name)) or _RESERVED.fullmatch(str(name)):
            raise UserError(f"{file}: variant {name!r} becomes a folder; use letters, digits and _ . , = + - only")
        if not isinstance(changes or {}, dict):
            raise UserError(f"{file}: variant {name} must hold `key: value` lines, or {{}} for no change")
        if "seed" in (changes or {}):
            raise UserError(f"{file}: variant {name} sets seed; give the seeds of all variants in `seeds`")
        titles[str(name)] = str((changes or {}).get("title", name))
    settings = {
        str(name): {key: value for key, value in (changes or {}).items() if key != "title"}
        for name, changes in variants.items()
    }
    return settings, titles


def _check_different(file: Path, runs: Sequence[PlannedRun]) -> None:
    """Two variants with the same settings compare nothing: something is misspelt, or overridden."""
    for index, run in enumerate(runs):
        for other in runs[:index]:
            if run.config == other.config:
                raise UserError(
                    f"{file}: variants {other.variant} and {run.variant} have the same settings; change one of them"
                )


def common_stages(one: Config, other: Config) -> list[str]:
    """The stages that two runs have in common to the bit, in their order: up to the first one with other settings."""

    def whole_run(config: Config) -> dict[str, Any]:
        return {k: v for k, v in asdict(config).items() if k not in ("rounds", "grpo", "ofsd", "logging", "checkpoint")}

    if whole_run(one) != whole_run(other):
        return []
    stages = ["base"]
    for index in range(1, min(one.rounds, other.rounds) + 1):
        if one.grpo != other.grpo:
            break
        stages.append(f"round{index}.grpo")
        if one.ofsd.enabled != other.ofsd.enabled or (one.ofsd.enabled and one.ofsd != other.ofsd):
            break
        if one.ofsd.enabled:
            stages.append(f"round{index}.ofsd")
    return stages
