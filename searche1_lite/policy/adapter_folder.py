"""Folders of adapters, checked without importing PyTorch."""

from pathlib import Path

from searche1_lite.runtime.errors import UserError


def no_adapter(folder: Path) -> UserError:
    """The error for a folder without an adapter; for a run's folder it names the adapters inside."""
    if not folder.is_dir():
        return UserError(f"{folder} holds no adapter: there is no such folder; give one written by `train`")
    if stages := sorted(file.parent.name for file in folder.glob("checkpoints/[!.]*/adapter_config.json")):
        return UserError(f"{folder} holds no adapter, but a run; add /checkpoints/ and one of {', '.join(stages)}")
    return UserError(f"{folder} holds no adapter (no adapter_config.json); give a folder written by `train`")
