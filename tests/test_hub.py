"""The hub, over real HTTP and in processes of their own: what is fetched, what is kept, and a line for what fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

DATA = "RUC-NLPIR/FlashRAG_datasets"
BIG = 12 * 2**20
"""Bytes; huggingface_hub 2.4 writes in pieces of 10 MiB, and goes on after the last whole one."""

FETCH = """
import json, sys
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.hub import download_file, download_folder
for call in json.loads(sys.argv[1]):
    fetch = download_folder if "patterns" in call else download_file
    try:
        print(json.dumps(str(fetch(**call))))
    except UserError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""

LOAD = """
import json, sys
from searche1_lite.runtime.quiet import quieten
quieten()  # as the commands do, before anything heavy is imported
from searche1_lite.config import ModelConfig
from searche1_lite.runtime.errors import UserError
from searche1_lite.policy.model import load_policy
for name in json.loads(sys.argv[1]):
    try:
        model, tokenizer = load_policy(ModelConfig(name=name, lora_rank=4), seed=0)
        total = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
        print(json.dumps({"base": model.peft_config["default"].base_model_name_or_path, "vocabulary": len(tokenizer),
                          "total": total}))
    except UserError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


def client(environment: dict[str, str], code: str, calls: list[Any]) -> list[Any]:
    """What a process of its own prints for each of `calls`; it may say nothing else."""
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def file(filename: str, **changes: Any) -> dict[str, Any]:
    return {"repo": DATA, "filename": filename, "repo_type": "dataset", **changes}


def folder(*patterns: str, **changes: Any) -> dict[str, Any]:
    return {"repo": DATA, "patterns": patterns, "repo_type": "dataset", **changes}


def write_lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def question(question_id: str, text: str, *golds: str, **more: Any) -> dict[str, Any]:
    return {"id": question_id, "question": text, "golden_answers": golds, **more}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data_set")
    write_lines(root / "nq/train.jsonl", *(question(f"train_{n}", f"Who is {n}?", "Ada") for n in range(9)))
    write_lines(root / "nq/test.jsonl", *(question(f"test_{n}", f"Where is {n}?", "Lima") for n in range(4)))
    write_lines(root / "popqa/test.jsonl", {"id": "test_0", "question": "Who?", "possible_answers": ["Ada"]})
    (root / "big.bin").write_bytes(os.urandom(2**20) * (BIG // 2**20))
    return root


@pytest.fixture
def hub(data_folder: Path) -> Iterator[HubServer]:
    with HubServer().run() as server:
        server.add("datasets", DATA, data_folder)
        yield server


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_file_is_fetched_once_and_then_comes_from_the_cache(
    hub: HubServer, data_folder: Path, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path)
    (path,) = client(environment, FETCH, [file("nq/test.jsonl")])
    assert Path(path).read_bytes() == (data_folder / "nq/test.jsonl").read_bytes()
    assert Path(path).is_relative_to(tmp_path)
    assert client(environment, FETCH, [file("nq/test.jsonl")] * 2) == [path, path]
    assert len(hub.downloads("nq/test.jsonl")) == 1


def test_a_folder_holds_the_files_that_match_and_no_others(hub: HubServer, tmp_path: Path) -> None:
    (path,) = client(hub.environment(tmp_path), FETCH, [folder("nq/*", "popqa/te*")])
    files = {found.relative_to(path).as_posix() for found in Path(path).rglob("*") if found.is_file()}
    assert files == {"nq/train.jsonl", "nq/test.jsonl", "popqa/test.jsonl"}
    assert not hub.downloads("big.bin")


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub: HubServer, data_folder: Path, tmp_path: Path) -> None:
    hub.drop_after = 11 * 2**20
    (path,) = client(hub.environment(tmp_path), FETCH, [file("big.bin")])
    assert [request.range for request in hub.downloads("big.bin")] == [None, f"bytes={10 * 2**20}-"]
    assert Path(path).read_bytes() == (data_folder / "big.bin").read_bytes()


def test_a_connection_that_keeps_breaking_is_one_line_and_never_leaves_half_a_file(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.drop_after, hub.drops_left = 20, 100
    [[code, line]] = client(hub.environment(tmp_path), FETCH, [folder("nq/test*")])
    assert code == 1 and "\n" not in line
    assert line.startswith(f"cannot fetch the data set '{DATA}': the connection to {hub.address} broke")
    assert "run it again, complete files are kept" in line
    hub.drop_after = None
    (path,) = client(hub.environment(tmp_path), FETCH, [folder("nq/test*")])
    assert len((Path(path) / "nq/test.jsonl").read_text().splitlines()) == 4


def test_offline_mode_takes_what_is_cached_and_names_what_is_not(hub: HubServer, tmp_path: Path) -> None:
    cached = client(hub.environment(tmp_path), FETCH, [file("nq/test.jsonl"), folder("popqa/*")])
    hub.requests.clear()
    *found, missing, partial = client(
        hub.environment(tmp_path, HF_HUB_OFFLINE="1"),
        FETCH,
        [file("nq/test.jsonl"), folder("popqa/*"), file("nq/train.jsonl"), folder("nq/*")],
    )
    assert found == cached
    assert missing[0] == partial[0] == 1
    assert missing[1].startswith(f"cannot fetch nq/train.jsonl of the data set '{DATA}': HF_HUB_OFFLINE is set")
    assert partial[1].startswith(f"cannot fetch the data set '{DATA}': HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_wrong_name_is_a_usage_error_that_says_which_part_is_wrong(hub: HubServer, tmp_path: Path) -> None:
    calls = {
        "the repository has no such file": file("nq/validation.jsonl"),
        "no such repository, or it is private": file("nq/test.jsonl", repo="RUC-NLPIR/FlashRAG"),
        "no such repository, or it is private; ": folder("*", repo="RUC-NLPIR/FlashRAG"),
        "the repository has no such revision": file("nq/test.jsonl", revision="v9"),
        "the repository has no such revision;": folder("*", revision="v9"),
        "not a repository name": file("nq/test.jsonl", repo="FlashRAG data"),
        "it holds no *.parquet or *.csv": folder("*.parquet", "*.csv"),
    }
    results = client(hub.environment(tmp_path), FETCH, list(calls.values()))
    for problem, call, (code, line) in zip(calls, calls.values(), results, strict=True):
        assert code == 2 and "\n" not in line
        assert problem in line and repr(call["repo"]) in line
        assert call.get("revision", "") in line
    assert not hub.downloads("nq/test.jsonl")


def test_a_gated_repository_is_told_from_a_missing_one(hub: HubServer, tmp_path: Path) -> None:
    hub.gated.add(f"datasets/{DATA}")
    for code, line in client(hub.environment(tmp_path), FETCH, [file("nq/test.jsonl"), folder("nq/*")]):
        assert code == 1 and "it is gated; accept the terms" in line and "`hf auth login`" in line


@pytest.mark.parametrize("status", [503, None], ids=["503", "closed port"])
def test_a_hub_that_does_not_answer_is_given_up_soon_unless_the_cache_will_do(
    hub: HubServer, tmp_path: Path, status: int | None
) -> None:
    environment = hub.environment(tmp_path)
    cached = client(environment, FETCH, [file("nq/test.jsonl"), folder("popqa/*")])
    hub.requests.clear()
    hub.status = status
    if status is None:
        environment["HF_ENDPOINT"] = closed_port()
    *found, one, many = client(
        environment, FETCH, [file("nq/test.jsonl"), folder("popqa/*"), file("nq/train.jsonl"), folder("nq/*")]
    )
    assert found == cached
    problem = f"cannot reach {environment['HF_ENDPOINT']} (" if status is None else f"{hub.address} answered HTTP 503"
    for code, line in (one, many):
        assert code == 1 and "\n" not in line and problem in line
    asked = [request.path for request in hub.requests]
    assert asked.count(f"/datasets/{DATA}/resolve/main/nq/train.jsonl") == (3 if status else 0)


def test_a_full_disk_is_one_line_that_names_the_cache(hub: HubServer, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("a small file system to fill can be mounted by root only")
    try:
        (full, whole) = client(hub.environment(mount), FETCH, [file("big.bin"), file("nq/test.jsonl")])
        assert full[0] == 1 and f"no space left for the cache {mount}" in full[1] and "\n" not in full[1]
        assert Path(whole).is_file(), "no partial file fills the disk"
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_cache_that_may_not_be_written_to_is_one_line(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache's folder would be")
    [[code, line]] = client(hub.environment(tmp_path), FETCH, [file("nq/test.jsonl")])
    assert code == 1 and f"cannot write to the cache {tmp_path / 'hub'}" in line


@pytest.fixture(scope="module")
def models(tiny_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders: whole, with pickled weights only, with a shard cut off, and with a shard missing."""
    root = tmp_path_factory.mktemp("models")
    for name in ("whole", "pickled", "cut", "shardless"):
        shutil.copytree(tiny_policy_folder, root / name)
    (root / "whole" / "pytorch_model.bin").write_bytes(b"never asked for")
    (root / "whole" / "modeling_own.py").write_text("raise SystemExit('code from the hub was run')")
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    weights = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (root / "shardless" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (root / "shardless" / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


def test_a_model_is_loaded_by_its_hub_name_and_each_failure_is_one_line(
    hub: HubServer, models: Path, tmp_path: Path
) -> None:
    for name in ("whole", "pickled", "cut"):
        hub.add("models", f"tiny/{name}", models / name)
    hub.add("models", "tiny/gated", models / "whole")
    hub.gated.add("models/tiny/gated")
    failures = {
        "tiny/missing": (2, "cannot fetch the model 'tiny/missing': no such repository"),
        "tiny/gated": (1, "cannot fetch the model 'tiny/gated': it is gated"),
        "tiny/pickled": (1, "cannot load the model 'tiny/pickled': it has no model.safetensors; only safetensors"),
        "tiny/cut": (1, "cannot load the model 'tiny/cut': model.safetensors is damaged or cut off"),
        **{
            str(models / name): (1, f"cannot load the model '{models / name}': {problem}")
            for name, problem in {
                "pickled": "it has no model.safetensors; only safetensors are loaded, as pickled",
                "cut": "model.safetensors is damaged or cut off",
                "shardless": "it has no model-00001-of-00001.safetensors",
            }.items()
        },
    }
    loaded, local, *failed = client(hub.environment(tmp_path), LOAD, ["tiny/whole", str(models / "whole"), *failures])
    assert loaded == {**local, "base": "tiny/whole"}
    assert not hub.downloads("pytorch_model.bin") and not hub.downloads("modeling_own.py")
    for (code, begins), (exit_code, line) in zip(failures.values(), failed, strict=True):
        assert exit_code == code and line.startswith(begins) and "\n" not in line

    hub.requests.clear()
    again, missing = client(hub.environment(tmp_path, HF_HUB_OFFLINE="1"), LOAD, ["tiny/whole", "tiny/other"])
    assert again == loaded and hub.requests == []
    assert missing[0] == 1 and missing[1].startswith("cannot fetch the model 'tiny/other': HF_HUB_OFFLINE is set")


def test_a_model_is_not_waited_for_when_the_hub_cannot_be_reached(hub: HubServer, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path, HF_ENDPOINT=closed_port())
    [[code, line]] = client(environment, LOAD, ["tiny/whole"])
    assert code == 1
    assert line.startswith(f"cannot fetch the model 'tiny/whole': cannot reach {environment['HF_ENDPOINT']}")


def test_eval_takes_a_public_set_by_name_and_refuses_what_the_set_lacks(
    hub: HubServer, tiny_policy_folder: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "corpus.jsonl", {"id": "a", "contents": "Lima\nLima is the capital of Peru."})
    settings = {
        "model": {"name": str(tiny_policy_folder), "lora_rank": 4},
        "search": {"corpus": "corpus.jsonl"},
        "protocol": {"max_turn_tokens": 8, "max_completion_tokens": 64, "max_invalid_turns": 0},
    }
    (tmp_path / "own.yaml").write_text(json.dumps(settings))
    environment = hub.environment(tmp_path / "home", SEARCHE1_LITE_CACHE=str(tmp_path / "cache"))

    def evaluate(data: str) -> subprocess.CompletedProcess[str]:
        words = ["eval", "--config", "own.yaml", "--data", data, "--limit", "2", "--json"]
        return subprocess.run(
            [sys.executable, "-m", "searche1_lite", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    shown = evaluate("nq")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["n"] == 2 and result["data"] == "nq"
    assert len(hub.downloads("nq/test.jsonl")) == 1 and not hub.downloads("nq/train.jsonl")

    hub.requests.clear()
    shown = evaluate("nq:validation")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == "error: nq has no split 'validation'; there are: train, dev, test\n"
    assert hub.requests == []

    shown = evaluate("popqa")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        f"error: popqa/test.jsonl of {DATA}:1: no `golden_answers`; a question needs id, question and golden_answers\n"
    )
    shown = evaluate("bamboogle")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"error: cannot fetch bamboogle/test.jsonl of the data set '{DATA}': the repository")
