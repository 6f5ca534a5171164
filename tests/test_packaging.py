"""What is shipped: the wheel's and the source archive's files, the version, the command, and what Tab offers."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path
from typing import get_args

import pytest

import searche1_lite
from searche1_lite.bench import PARTS
from searche1_lite.cli import arguments
from searche1_lite.config import preset_names
from searche1_lite.evaluate.baselines import Method

ROOT = Path(__file__).parent.parent
TOP_LEVEL = [
    "searche1_lite", "tests", "examples", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "constraints.txt",
    "pyproject.toml", ".gitignore",
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what must not be shipped lying about."""
    tree = tmp_path_factory.mktemp("tree")
    leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in TOP_LEVEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, tree / name)
    for stray in (
        "searche1_lite/__pycache__/x.pyc",
        "runs/demo/config.yaml",
        ".venv/x.py",
        "searche1_lite/.mypy_cache/x",
    ):
        (tree / stray).parent.mkdir(parents=True, exist_ok=True)
        (tree / stray).write_text("stray")
    return tree


@pytest.fixture(scope="module")
def built(tree: Path) -> tuple[Path, Path]:
    """The wheel and the source archive, built as `python -m build` has them built, without a network."""
    subprocess.run([sys.executable, "-m", "hatchling", "build"], cwd=tree, check=True, capture_output=True)
    (wheel,), (archive,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    return wheel, archive


def shipped(folder: Path) -> set[str]:
    """The files of a folder that belong to the project, as its paths name them."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    files = set(zipfile.ZipFile(built[0]).namelist())
    about = f"searche1_lite-{searche1_lite.__version__}.dist-info"
    facts = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert files == shipped(ROOT / "searche1_lite") | facts
    needed = {
        "py.typed",
        "config/presets/demo.yaml",
        "policy/demo/model.safetensors",
        "report/template.html",
        "serve/web/page.html",
    }
    assert {f"searche1_lite/{name}" for name in needed} <= files
    assert {Path(name).suffix for name in files if name.startswith("searche1_lite/")} == {
        ".css", ".html", ".jinja", ".js", ".json", ".py", ".safetensors", ".typed", ".yaml",
    }  # fmt: skip


def test_the_source_archive_holds_what_a_clone_has(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    folders = set().union(*(shipped(ROOT / name) for name in ("searche1_lite", "tests", "examples", "docs")))
    assert files == folders | {name for name in TOP_LEVEL if (ROOT / name).is_file()} | {"PKG-INFO"}


def test_the_metadata_says_version_licence_and_extras(built: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(built[0])
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    facts = BytesParser().parsebytes(archive.read(name))
    assert (facts["Version"], facts["License-Expression"]) == (searche1_lite.__version__, "Apache-2.0")
    assert set(facts.get_all("Provides-Extra")) == {"dev", "serve", "tensorboard", "trackio", "vllm", "wandb", "web"}
    assert facts["Description-Content-Type"] == "text/markdown"


def test_the_version_is_written_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert f"## {searche1_lite.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    command = [sys.executable, "-m", "searche1_lite", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout == f"searche1-lite {searche1_lite.__version__}\n"


def offered(folder: Path, line: str) -> list[str]:
    """What Tab offers in bash after `line`."""
    words = line.split(" ")
    program = "import sys; sys.argv[0] = 'searche1-lite'; from searche1_lite.cli.main import main; main()"
    asked = {
        "_SEARCHE1_LITE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        cwd=folder, env=os.environ | asked, capture_output=True, text=True,
    )  # fmt: skip
    assert not {"torch", "transformers", "numpy"} & {x.rpartition("|")[2].strip() for x in ran.stderr.splitlines()}
    return ran.stdout.split()


def test_tab_offers_commands_presets_and_what_lies_there(tmp_path: Path) -> None:
    for stage in ("round1.grpo", "round1.ofsd", "round2.grpo"):
        (tmp_path / "runs/own/checkpoints" / stage).mkdir(parents=True)
        (tmp_path / "runs/own/checkpoints" / stage / "adapter_config.json").write_text("{}")
    (tmp_path / "runs/own/checkpoints/round2.ofsd").mkdir()  # begun, not finished
    (tmp_path / "sweeps").mkdir()
    for name in ("settle.yaml", "teacher.yml", "notes.txt"):
        (tmp_path / "sweeps" / name).write_text("")
    assert offered(tmp_path, "searche1-lite ex") == ["export"]
    assert offered(tmp_path, "searche1-lite train --preset d") == ["demo"]
    assert offered(tmp_path, "searche1-lite eval --method r") == ["rag"]
    assert offered(tmp_path, "searche1-lite bench --part ro") == ["rollout", "round"]
    assert offered(tmp_path, "searche1-lite sweep sweeps/") == ["sweeps/settle.yaml", "sweeps/teacher.yml"]
    assert offered(tmp_path, "searche1-lite export runs/own --stage round1.") == ["round1.grpo", "round1.ofsd"]
    assert offered(tmp_path, "searche1-lite ask --adapter runs/own/checkpoints/round2") == [
        "runs/own/checkpoints/round2.grpo"
    ]


def test_what_tab_offers_is_what_there_is() -> None:
    assert get_args(get_args(arguments.Method)[0]) == get_args(Method)
    assert arguments.offer_parts("") == list(PARTS)
    assert arguments.offer_presets("") == preset_names()
