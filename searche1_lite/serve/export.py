"""A trained policy for other programs: an adapter folder for plain PEFT, or one merged model for plain transformers.

    searche1-lite export runs/demo --to my-agent --merge

What is exported is staged beside its place and renamed at the end: complete, or not there. Beside the weights are the
tokenizer's files as the base has them, a model card (`model_card.py`), and the run's settings and figures.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from searche1_lite.config import Config, ModelConfig, dump_config, load_config
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.hub import check_upload, download_folder, upload_folder
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.quiet import quieten
from searche1_lite.runtime.sealed_folder import sync
from searche1_lite.train.run_folder import check_adapter_folder
from searche1_lite.train.schedule import next_stage

if TYPE_CHECKING:
    from searche1_lite.serve.model_card import Base

RUN_CONFIG, RUN_SUMMARY = "run_config.yaml", "run_summary.json"
"""The run's settings and its figures up to the stage that was exported, in the exported folder."""

_SOME_SERVER = "search-server"
"""In the place of a search server's name, which is for those inside."""


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter, and what is known of the run that trained it."""

    adapter: Path
    base: str
    """As `model.name` was: `demo`, a folder, or a hub name."""
    revision: str | None
    shape: tuple[int, int]
    """Rank and alpha."""
    config: Config | None
    """None, as `summary` is, where the adapter's run is not known."""
    summary: dict[str, Any] | None
    """Its `stages` end with the one that is exported."""


def export_policy(
    folder: Path | str,
    to: Path | str,
    *,
    stage: str | None = None,
    merge: bool = False,
    push: str | None = None,
    public: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = say_on_stderr,
) -> dict[str, Any]:
    """Exports an adapter to the folder `to`, which must be empty or not there.

    Args:
        folder: a run's folder, whose last stage's adapter is meant; or an adapter's.
        stage: another one of the run's stages, such as `round1.grpo`.
        merge: one model with the adapter in its weights, bf16, instead of the adapter alone.
        push: also uploads the folder to the hub, as this repository (`owner/name`).
        public: whether that repository, if it is not there yet, is made for everyone to see.
        quiet: keep libraries' notices off the terminal, see `quieten`.
        say: receives notices for the user.

    Returns:
        `{"folder", "kind", "base", "revision", "stage", "em", "files", "bytes", "address"}`: `kind` is `adapter` or
        `merged`; `stage` and `em` are None where the run is not known, `address` where nothing was uploaded.

    Raises:
        UserError: if there is nothing to export there, `to` will not do, the base cannot be loaded, or the hub refuses.
            After a failed upload the exported folder is there all the same.
    """
    folder, to = Path(folder), Path(to)
    source = find_source(folder, stage)
    check_target(to, folder)
    if public and push is None:
        raise UserError("--public is for --push; name the repository with it")
    if quiet:
        quieten()
    if push is not None:
        if not merge and Path(source.base).is_dir():
            raise UserError(f"the base {source.base} is a folder here, which nobody else can load; push with --merge")
        check_upload(push)
    if source.config is None:
        say(f"{folder} belongs to no run: the card has no figures{', and NF4 is taken for granted' if merge else ''}")
    from searche1_lite.serve.model_card import model_card

    with _staged(to) as staging:
        commit = _copy_tokenizer(source, staging)
        if merge:
            from searche1_lite.policy.merge import save_merged

            save_merged(_model_config(source), source.adapter, staging)
        else:
            _copy_adapter(source, staging)
        config = source.config and without_folders(source.config)
        summary = source.summary and summary_without_folders(source.summary)
        if summary is not None and source.config is not None and (url := source.config.search.url) is not None:
            summary["retriever"] = summary["retriever"].replace(urlsplit(url).netloc, _SOME_SERVER)
        (staging / "README.md").write_text(
            model_card(push or to.resolve().name, _base(source, commit, staging), config, summary, merged=merge),
            encoding="utf-8",
        )
        if config is not None and summary is not None:
            (staging / RUN_CONFIG).write_text(dump_config(config), encoding="utf-8")
            (staging / RUN_SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for weights in staging.glob("*.safetensors"):  # the library lets nobody else read them
            shutil.copymode(staging / "README.md", weights)
    if source.base == "demo" and not merge:
        say(f"the demo's base comes with the package: {to / 'README.md'} says how to load it; --merge needs no base")
    stages = source.summary["stages"] if source.summary else []
    files = {path.relative_to(to).as_posix(): path.stat().st_size for path in sorted(to.rglob("*")) if path.is_file()}
    address = None
    if push is not None:
        try:
            address = upload_folder(to, push, public=public)
        except UserError as error:
            raise UserError(f"{error}; it is exported, in {to}: `hf upload {push} {to}` tries again", 1) from error
    return {
        "folder": str(to),
        "kind": "merged" if merge else "adapter",
        "base": source.base,
        "revision": source.revision or commit,
        "stage": stages[-1]["name"] if stages else None,
        "em": stages[-1]["em"] if stages else None,
        "files": list(files),
        "bytes": sum(files.values()),
        "address": address,
    }


def find_source(folder: Path, stage: str | None = None) -> Source:
    """The adapter that `folder` and `stage` mean; see `export_policy`. Nothing heavy is loaded.

    Raises:
        UserError: if there is none, or the run is not finished and no stage is named.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run's, such as runs/demo, or an adapter's")
    if stage is None and folder.resolve().parent.name == "checkpoints":
        folder, stage = folder.resolve().parent.parent, folder.resolve().name
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        config, summary, stage = _find_stage(folder, stage)
        return _source(folder / "checkpoints" / stage, config, summary)
    if stage is not None:
        raise UserError(f"{folder} is no run's folder, so it has no stage {stage!r}; leave --stage out")
    check_adapter_folder(folder)
    if (folder / RUN_CONFIG).is_file() and (folder / RUN_SUMMARY).is_file():  # exported before
        return _source(folder, load_config(file=folder / RUN_CONFIG), _read_json(folder / RUN_SUMMARY))
    return _source(folder, None, None)


def _find_stage(folder: Path, stage: str | None) -> tuple[Config, dict[str, Any], str]:
    """A run's settings, its summary up to `stage` (default: the last one), and the stage."""
    path = folder / "summary.json"
    summary = _read_json(path) if path.is_file() else {"stages": []}
    config = load_config(file=folder / "config.yaml")
    names = [item["name"] for item in summary["stages"]]
    there = [name for name in names if (folder / "checkpoints" / name / "adapter_config.json").is_file()]
    if not there:
        raise UserError(f"no stage of the run in {folder} is finished; go on with `train --resume --out {folder}`")
    if stage is None and next_stage(config, summary["stages"]) is not None:
        raise UserError(
            f"the run in {folder} is not finished; go on with `train --resume --out {folder}`, or name one of its "
            f"stages with --stage: {', '.join(there)}"
        )
    stage = stage or there[-1]
    if stage not in there:
        raise UserError(f"the run in {folder} has no finished stage {stage!r}; there are: {', '.join(there)}")
    return config, summary | {"stages": summary["stages"][: names.index(stage) + 1]}, stage


def _source(adapter: Path, config: Config | None, summary: dict[str, Any] | None) -> Source:
    check_adapter_folder(adapter)
    saved = _read_json(adapter / "adapter_config.json")
    base = saved.get("base_model_name_or_path")
    if not isinstance(base, str) or not {"r", "lora_alpha"} <= saved.keys():
        raise UserError(f"{adapter / 'adapter_config.json'} names no base, rank or alpha; give what `train` wrote")
    return Source(adapter, base, saved.get("revision"), (saved["r"], saved["lora_alpha"]), config, summary)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; put it back, or export another run") from error
    if not isinstance(data, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object; put it back, or export another run")
    return data


def check_target(to: Path, source: Path) -> None:
    """Refuses a place that is taken, or inside of what is exported.

    Raises:
        UserError: telling which of it.
    """
    if to.is_dir() and any(to.iterdir()):
        raise UserError(f"{to} exists and is not empty; delete it or choose another --to")
    if to.exists() and not to.is_dir():
        raise UserError(f"{to} is a file; choose another --to")
    if to.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{to} is inside {source}, which is what is exported; choose a --to beside it")


def _model_config(source: Source) -> ModelConfig:
    rank, alpha = source.shape
    chosen = replace(source.config.model) if source.config else ModelConfig()
    return replace(chosen, name=source.base, revision=source.revision, lora_rank=rank, lora_alpha=alpha)


def _copy_tokenizer(source: Source, staging: Path) -> str | None:
    """The base's own files, as they are; returns the commit that they are of, where the base is on the hub."""
    from searche1_lite.policy.model import TOKENIZER_FILES, resolve_model

    base, commit = Path(resolve_model(source.base)), None
    if not base.is_dir():
        base = download_folder(source.base, repo_type="model", patterns=TOKENIZER_FILES, revision=source.revision)
        commit = base.name  # the hub's cache names a snapshot by it
    for pattern in TOKENIZER_FILES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging / file.name)
    return commit


def _copy_adapter(source: Source, staging: Path) -> None:
    from safetensors import SafetensorError, safe_open

    weights = source.adapter / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="numpy"):  # reads the header, which must agree with the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged or missing ({error}); export another stage", exit_code=1) from error
    shutil.copyfile(weights, staging / weights.name)
    saved = _read_json(source.adapter / "adapter_config.json")
    saved["inference_mode"] = True
    if isinstance(saved.get("target_modules"), list):
        saved["target_modules"].sort()  # PEFT keeps a set
    (staging / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def _base(source: Source, commit: str | None, folder: Path) -> "Base":
    """What the card says of the base; `folder` has its tokenizer's files."""
    from searche1_lite.serve.model_card import Base

    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    generic = settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return Base(
        _public_name(source.base),
        "demo" if source.base == "demo" else "folder" if commit is None else "hub",
        source.revision or commit,
        pinned=source.revision is not None,
        tokenizer_class="PreTrainedTokenizerFast" if generic else "AutoTokenizer",
        has_chat_template=any(folder.glob("chat_template*")) or "chat_template" in settings,
        in_four_bits=source.config is None or source.config.model.quantization == "nf4",
    )


def without_folders(config: Config) -> Config:
    """The settings with what names a place on this machine cut to its last part, and a search server without its
    address: they are for others to read."""
    search, data = config.search, config.data
    url = search.url and urlsplit(search.url)._replace(netloc=_SOME_SERVER).geturl()
    return replace(
        config,
        model=replace(config.model, name=_public_name(config.model.name)),
        search=replace(search, url=url, corpus=_public_names(search.corpus), index=_public_names(search.index)),
        data=replace(data, train=_public_names(data.train), evaluation=_public_names(data.evaluation)),
    )


def summary_without_folders(summary: dict[str, Any]) -> dict[str, Any]:
    """The same of a run's summary."""
    cut = summary | {"model": _public_name(summary["model"])}
    for key in ("training", "evaluation"):
        if key in cut:
            cut[key] = cut[key] | {"data": _public_names(cut[key]["data"])}
    return cut


def _public_names(names: str | None) -> str | None:
    return names and "+".join(map(_public_name, names.split("+")))


def _public_name(name: str) -> str:
    path = Path(name).expanduser()
    return path.name if path.is_absolute() or path.exists() or name.startswith(".") else name


@contextmanager
def _staged(to: Path) -> Iterator[Path]:
    """A folder that takes the place of `to` when the body is through, and goes if it is not."""
    from safetensors import SafetensorError

    place = to.resolve()
    staging = place.with_name(f".{place.name}.{os.getpid()}.staging")
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in [*staging.rglob("*"), staging]:
            sync(file)
        staging.replace(place)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says of a full disk
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot write to {to}: {reason}; make room or choose another --to", exit_code=1) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
