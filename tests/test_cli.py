"""The command line through a real console: quick help, one line for every mistake, nothing overwritten."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "jnius", "pyserini", "numpy"}
COMMANDS = ["train", "eval", "ask", "index", "serve-search", "doctor", "bench", "sweep", "report", "export"]
QUESTION = '{"id": "q1", "question": "What is the capital of Peru?", "golden_answers": ["Lima"]}\n'
ANOTHER = '{"id": "q2", "question": "What is the capital of Ecuador?", "golden_answers": ["Quito"]}\n'
PASSAGE = '{"id": "a", "contents": "Lima\\nLima is the capital of Peru."}\n'


# Runs each command in a fork of a process that has loaded the command line only, never PyTorch.
SERVER = """
import json, os, sys, traceback
from searche1_lite.cli.main import main
import searche1_lite.config

def run(words, environment, folder):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["searche1-lite", *words]
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    words, environment, folder, files = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, file in zip((1, 2), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        code = run(words, environment, folder)
        sys.stdout.flush()
        with open(files[2], "w") as modules:
            modules.write(" ".join(sys.modules))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Shown:
    """The result of one command; `imported` holds the top-level packages that Python loaded."""

    code: int
    stdout: str
    stderr: str
    imported: set[str]


@cache
def server() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def console(folder: Path, *words: str, **environment: str) -> Shown:
    """Runs `searche1-lite WORDS` in `folder`."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith("SEARCHE1_LITE_")}
    settings |= {"SEARCHE1_LITE_CACHE": str(folder / "cache")} | environment
    running = server()
    assert running.stdin and running.stdout
    with tempfile.TemporaryDirectory() as place:
        files = [f"{place}/{name}" for name in ("stdout", "stderr", "modules")]
        running.stdin.write(json.dumps([words, settings, str(folder), files]) + "\n")
        running.stdin.flush()
        code = int(running.stdout.readline())
        stdout, stderr, modules = (Path(file).read_text() for file in files)
    return Shown(code, stdout, stderr, {name.partition(".")[0] for name in modules.split()})


def tree(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """Everything below `folder`, files with their content and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(folder: Path, *words: str) -> str:
    """The line that a call is refused with: before anything heavy is loaded, with nothing written or changed."""
    before = tree(folder)
    shown = console(folder, *words)
    assert shown.code == 2, shown
    assert shown.stdout == ""
    assert shown.stderr.startswith("error: ") and shown.stderr.endswith("\n") and shown.stderr.count("\n") == 1
    assert not shown.imported & HEAVY
    assert tree(folder) == before
    return shown.stderr.removeprefix("error: ").strip()


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder to work in, with good and bad files."""
    files = {
        "good.jsonl": QUESTION,
        "other.jsonl": ANOTHER,
        "corpus.jsonl": PASSAGE,
        "faulty.jsonl": QUESTION + '{"id": "q2", "question":\n',
        "faulty_corpus.jsonl": PASSAGE + '{"id": "b"}\n',
        "nothing_good.jsonl": '{"id": "b"}\n',
        "empty.jsonl": "\n",
        "config.yaml": "seed: 3\n",
        "misspelt.yaml": "search:\n  passages: 3\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "full/notes.txt": "mine",
        "no_text/picture.png": "mine",
        "no_adapter/README.md": "mine",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words) or "-")
def test_help_loads_nothing_heavy(tmp_path: Path, words: list[str]) -> None:
    shown = console(tmp_path, *words, "--help")
    assert shown.code == 0 and shown.stderr == ""
    assert all(word in shown.stdout for word in (words or COMMANDS))
    assert f"Example: searche1-lite {words[0] if words else 'train'} " in shown.stdout
    assert "typer" in shown.imported and not shown.imported & HEAVY


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --preset demo grpo.step=3", "unknown config key grpo.step; did you mean grpo.steps?"),
        ("ask Who? --config misspelt.yaml", "unknown config key search.passages; known here: corpus, index, k,"),
        ("train grpo.clip=-1", "grpo.clip=-1 is impossible"),
        ("train grpo.micro_batch_tokens=0", "grpo.micro_batch_tokens=0 is impossible"),
        ("train seed", "'seed' is not an override; write key=value"),
        ("train --config missing.yaml", "cannot read the config missing.yaml"),
        ("eval --config twice.yaml", "twice.yaml:2: not valid YAML (duplicate key 'seed')"),
        ("train --preset huge", "no preset 'huge'; there are: "),
        ("ask Who? --preset huge", "no preset 'huge'; there are: "),
        ("doctor --preset huge", "no preset 'huge'; there are: "),
        ("doctor grpo.step=3", "unknown config key grpo.step; did you mean grpo.steps?"),
        ("doctor --gpu-gb 6", "the GPU has 6.0 GiB, and no preset is made for less than 8; give one with --preset"),
        ("bench --config missing.yaml", "cannot read the config missing.yaml"),
        ("bench grpo.clip=-1", "grpo.clip=-1 is impossible"),
        ("bench --part speed", "bench has no part 'speed'; there are: memory, rollout, search, round"),
        ("sweep missing.yaml", "cannot read the config missing.yaml"),
        ("sweep twice.yaml", "twice.yaml:2: not valid YAML (duplicate key 'seed')"),
        ("sweep twice.yaml --seeds one", "--seeds 'one' is not a list of whole numbers; write them as 1,2,3"),
        ("report missing", "there is no folder missing; give the folder of a run, such as runs/demo"),
        ("report .", ". holds neither a run (config.yaml, summary.json) nor a sweep (sweep.json); give the folder"),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(desk: Path, words: str, message: str) -> None:
    assert refusal(desk, *words.split()).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval --preset demo --data missing.jsonl", "no question file at missing.jsonl"),
        ("eval --preset demo --data faulty.jsonl", "faulty.jsonl:2: not a JSON line"),
        ("eval --preset demo --data demo:validation", "the demo has no split 'validation'; there are: train, dev"),
        ("train --preset demo --out new data.train=missing.jsonl", "no question file at missing.jsonl"),
        ("train --preset demo --out new data.evaluation=faulty.jsonl", "faulty.jsonl:2: not a JSON line"),
        ("train --preset demo --out new data.train=good.jsonl data.evaluation=good.jsonl", "evaluation question 'q1'"),
        ("eval --preset demo --adapter missing", "missing holds no adapter"),
        ("ask Who? --preset demo --adapter no_adapter", "no_adapter holds no adapter"),
        ("index missing.jsonl --out new", "no corpus at missing.jsonl"),
        ("index nothing_good.jsonl --out new", "every line of nothing_good.jsonl is faulty: nothing_good.jsonl:1: "),
        ("index empty.jsonl --out new", "empty.jsonl holds no passage"),
        ("index no_text --out new", "no_text holds no text"),
        ("eval --preset demo search.corpus=missing.jsonl --data good.jsonl", "no corpus at missing.jsonl"),
        ("eval --preset demo search.index=full --data good.jsonl", "no Lucene index at full"),
        ("train --preset demo --out new search.corpus=missing.jsonl", "no corpus at missing.jsonl"),
        ("index corpus.jsonl --out full", "full exists already"),
        ("train --preset demo --out full", "full is not empty and holds no run"),
        ("train --preset demo --out good.jsonl", "cannot write to the run's folder good.jsonl"),
    ],
)
def test_a_bad_file_or_folder_is_refused_in_one_line(desk: Path, words: str, message: str) -> None:
    assert refusal(desk, *words.split()).startswith(message)


@pytest.mark.parametrize("words", ["train", "train grpo.steps=3", "eval", "ask Who?"])
def test_without_a_gpu_a_preset_must_be_named(desk: Path, words: str) -> None:
    before = tree(desk)
    shown = console(desk, *words.split(), CUDA_VISIBLE_DEVICES="")
    assert shown.code == 2 and shown.stdout == "" and shown.stderr.count("\n") == 1
    assert shown.stderr.startswith("error: no NVIDIA GPU found, and no preset or config given; try --preset demo")
    assert "qwen2.5-3b-8gb" in shown.stderr and tree(desk) == before
    assert not shown.imported & (HEAVY - {"torch", "numpy"}), "only what can see a GPU is loaded"


def test_doctor_without_a_gpu_tells_why_none_is_seen_and_plans_for_the_smallest(desk: Path) -> None:
    shown = console(desk, "doctor", "--json", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    assert "preset qwen2.5-3b-8gb" in shown.stderr
    found = json.loads(shown.stdout)
    gpu = next(check for check in found["checks"] if check["name"] == "GPU")
    assert gpu["status"] == "warn" and "PyTorch sees no NVIDIA GPU" in gpu["detail"]
    assert found["memory"]["stages"].keys() == {"rollout", "GRPO step", "OFSD step"}
    assert shown.code == (0 if found["ok"] else 1)


@pytest.mark.parametrize("question", ["", "  \t"])
def test_an_empty_question_is_refused_in_one_line(desk: Path, question: str) -> None:
    assert refusal(desk, "ask", question, "--preset", "demo").startswith("the question is empty")


def test_a_folder_with_another_run_is_refused_in_one_line(desk: Path) -> None:
    # A run is told by its settings; another command writes them here as `train` does.
    write_run = "from pathlib import Path; from searche1_lite.train.run_folder import RunFolder\n"
    write_run += (
        "from searche1_lite.config import load_config; RunFolder(Path('runs/demo'), load_config('demo'), False).start()"
    )
    subprocess.run([sys.executable, "-c", write_run], cwd=desk, check=True)
    again = refusal(desk, "train", "--preset", "demo")
    assert again.startswith("runs/demo already holds a run; add --resume"), "the default folder is runs/PRESET"
    other = refusal(desk, "train", "--preset", "demo", "--out", "runs/demo", "--resume", "seed=8")
    assert other.startswith("runs/demo holds a run with other settings: seed (0 there, 8 now)")


def test_a_name_with_a_line_break_still_gives_one_line(desk: Path) -> None:
    assert refusal(desk, "train", "--config", "no\n\nsuch.yaml").startswith("cannot read the config no such.yaml")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train --presett demo", "--presett"),
        ("eval --limit -1", "--limit"),
        ("ask --preset demo", "question"),
        ("index corpus.jsonl", "--out"),
        ("doctor --gpu-gb 0", "--gpu-gb"),
        ("bench --cap-gb little", "--cap-gb"),
        ("eval --method oracle", "--method"),
        ("learn", "learn"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(desk: Path, words: str, named: str) -> None:
    before = tree(desk)
    shown = console(desk, *words.split(), TERM="dumb", NO_COLOR="1")
    assert shown.code == 2 and shown.stdout == ""
    assert named in shown.stderr.lower() and "Traceback" not in shown.stderr
    assert not shown.imported & HEAVY and tree(desk) == before


def test_the_debug_switch_shows_the_traceback(desk: Path) -> None:
    shown = console(desk, "train", "grpo.step=3", SEARCHE1_LITE_DEBUG="1")
    assert shown.code != 0
    assert "Traceback" in shown.stderr and "UserError: unknown config key grpo.step" in shown.stderr


def test_a_mistake_found_late_is_one_line_too(desk: Path) -> None:
    """The model is looked for after every library was loaded: none of them may say anything."""
    shown = console(desk, "eval", "--preset", "demo", "--data", "good.jsonl", "model.name=./no_adapter")
    assert shown.code in (1, 2) and shown.stdout == ""
    assert shown.stderr.startswith("error: ") and shown.stderr.count("\n") == 1 and "no_adapter" in shown.stderr


def test_index_skips_faulty_lines_and_names_them_in_one_line(desk: Path) -> None:
    shown = console(desk, "index", "faulty_corpus.jsonl", "--out", "new")
    assert (shown.code, shown.stdout) == (0, "new\n")
    assert shown.stderr == (
        "skipped 1 faulty line: faulty_corpus.jsonl:2: a passage needs `id` and a string `contents`\n"
        "indexed 1 passage\n"
    )
    assert json.loads((desk / "new" / "searche1_index.json").read_text())["passages"] == 1
    assert [path.name for path in desk.iterdir() if path.name.startswith(".")] == []


def test_a_large_download_is_not_begun_unasked(desk: Path) -> None:
    words = ["eval", "--preset", "demo", "--data", "good.jsonl", "search.index=wikipedia-dpr-100w"]
    shown = console(desk, *words, PYSERINI_CACHE=str(desk / "pyserini"))
    assert shown.code == 1 and shown.stdout == "" and shown.stderr.count("\n") == 1
    assert "9.2 GB" in shown.stderr and "--yes" in shown.stderr
    assert "torch" not in shown.imported and not (desk / "pyserini").exists()


@pytest.mark.parametrize(("answer", "agreed"), [("y", True), ("Yes", True), ("", False), ("n", False)])
def test_someone_at_a_terminal_is_asked_before_a_download(answer: str, agreed: bool) -> None:
    program = "from searche1_lite.cli.main import _confirm; print(_confirm('downloading X takes 1 GB'))"
    terminal, other_end = os.openpty()
    os.write(terminal, f"{answer}\n".encode())
    ran = subprocess.run([sys.executable, "-c", program], stdin=other_end, stderr=other_end, stdout=subprocess.PIPE)
    os.close(other_end)
    assert b"downloading X takes 1 GB. Go on? [y/N] " in os.read(terminal, 1000)
    os.close(terminal)
    assert ran.stdout.decode().strip() == str(agreed)


def test_eval_prints_one_json_object_and_nothing_else_on_stdout(desk: Path, tiny_policy_folder: Path) -> None:
    config = desk / "own.yaml"
    settings = {
        "model": {"name": str(tiny_policy_folder), "lora_rank": 4},
        "search": {"corpus": "corpus.jsonl"},
        "protocol": {"max_turn_tokens": 8, "max_completion_tokens": 64, "max_invalid_turns": 0},
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    shown = console(desk, "eval", "--config", str(config), "--data", "good.jsonl", "--json")
    assert shown.code == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["n"] == 1 and result["data"] == "good.jsonl" and result["adapter"] is None
    assert result["model"] == str(tiny_policy_folder) and result["retriever"].startswith("bm25")
    assert {"em", "em_ci95", "f1", "searches_per_question", "no_search_rate"} <= result.keys()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')", "the GPU's memory ran out; "),
        ("RuntimeError('CUDA error: no kernel image is there\\nmore')", "the GPU failed: CUDA error: no kernel"),
    ],
)
def test_a_gpu_that_fails_is_told_in_one_line(tmp_path: Path, error: str, message: str) -> None:
    program = f"""
import torch
from searche1_lite.cli import main as cli
def fail(): raise {error}
cli.app = fail
cli.main()
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 1 and shown.stdout == "" and shown.stderr.count("\n") == 1
    assert shown.stderr.startswith(f"error: {message}") and "doctor" in shown.stderr


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}])
def test_a_run_on_several_gpus_is_refused(desk: Path, environment: dict[str, str]) -> None:
    shown = console(desk, "train", "--preset", "demo", "--out", "new", **environment)
    assert shown.code == 2 and shown.stderr.startswith("error: a run uses one GPU") and not (desk / "new").exists()
