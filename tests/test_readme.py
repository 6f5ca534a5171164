"""README.md, docs/ and the examples' READMEs: their commands, links, files and tables are correct.

A command is a line of an indented block. It is run next to a small run of the demo, some with overrides that make it
short (`SHORTER`); or the real command line parses it and its settings and files are checked, where it needs a GPU, the
hub or minutes (`PARSED`); or another test runs it (`ELSEWHERE`). Any other line fails. Fenced blocks are program
output, or records of a corpus or a question file.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer

from searche1_lite.cli.main import app
from searche1_lite.config import load_config, preset_names
from searche1_lite.data.question_files import read_own_file
from searche1_lite.evaluate.sweep.plan import load_plan
from searche1_lite.search.corpus import check_corpus

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").rglob("README.md")),
    )
}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
COMMANDS: Any = typer.main.get_command(app)

SHORT = ["grpo.steps=1", "grpo.questions_per_step=4", "ofsd.questions=8", "data.evaluation_limit=8"]
SHORTER = {
    "searche1-lite train --preset demo --config": ["grpo.steps=1", "grpo.questions_per_step=2", "ofsd.questions=4"],
    "searche1-lite eval": ["--limit", "4"],
}
PARSED = {
    "searche1-lite doctor": "its plan of a 3B model takes long, and it fails without a hub (tests/test_doctor.py)",
    "searche1-lite train --yes": "needs a GPU and the hub",
    "searche1-lite train --preset qwen2.5": "needs a GPU and the hub",
    "searche1-lite train --config examples/countries": "42 minutes; tests/test_smollm2.py has it in miniature",
    "searche1-lite ask --web": "serves until it is stopped (tests/test_web.py)",
    "searche1-lite sweep": "takes minutes (tests/test_sweep.py)",
    "searche1-lite bench": "takes minutes (tests/test_bench.py)",
    "accelerate launch": "needs GPUs (tests/test_distributed.py has two processes on a CPU)",
}
ELSEWHERE = {
    "python examples/python_api.py": "tests/test_examples.py",
    "python examples/own_reward.py": "tests/test_examples.py",
    "python examples/own_retriever.py": "tests/test_examples.py",
    "python examples/inspect_signal.py": "tests/test_examples.py",
    "python examples/planning/plan.py": "tests/test_examples.py",
    "python examples/countries/build.py": "tests/test_smollm2.py",
}
BY_HAND = {
    "python -m pytest": "the tests",
    "python tests/soak/": "minutes, on an idle machine",
    "python -m examples.demo_policy.build": "takes 13 minutes",
    "source .venv/bin/activate": "make demo creates it",
    "python3.11 -m venv vllm-env": "an environment of 4.5 GB",
    "vllm-env/bin/": "vLLM has an environment of its own",
    "OMP_NUM_THREADS=1 vllm-env/bin/": "vLLM has an environment of its own",
}
RUN_FILES = ["config.yaml", "metrics.jsonl", "summary.json", "trajectories/", "checkpoints/", "report.html"]
PLACEHOLDERS = {"sweep.json", "FILE.yaml", "tensorboard/", "runs/demo/report.html"}
"""Files that a sweep (tests/test_sweep.py), TensorBoard (tests/test_logging.py) or the reader creates."""


def commands(page: str) -> list[list[str]]:
    """The lines of the page's indented blocks, as words."""
    lines = FENCED.sub("", PAGES[page]).splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"    \S", line)]


def kind(words: list[str], *kinds: Iterable[str]) -> str | None:
    """The first of these prefixes that the command has."""
    return next((start for group in kinds for start in group if " ".join(words).startswith(start)), None)


def run(words: list[str]) -> str:
    """What `searche1-lite WORDS` prints on stdout, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = COMMANDS.main(words, prog_name="searche1-lite", standalone_mode=False)
    assert not code or (words[0] == "ask" and code == 3), f"{words}: exit status {code}"  # 3: no answer
    return shown.getvalue()


def check_parsed(words: list[str]) -> None:
    """The command line accepts these words; the preset, files and overrides among them exist and are valid."""
    if words[0] == "accelerate":
        start = words.index("searche1_lite")
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        words = words[start:]
    name, given = words[1], COMMANDS.commands[words[1]].make_context(words[1], words[2:]).params
    if name == "sweep":
        load_plan(ROOT / given["file"], given["overrides"] or [])
    elif given.get("preset") or given.get("config"):
        load_config(given["preset"], given["config"] and ROOT / given["config"], given["overrides"] or [])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the repository's root after `make demo`, whose run is shorter; `shown.txt` is what it printed."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "examples").symlink_to(ROOT / "examples")
    shown = subprocess.run(["make", "-n", "demo", "test", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    train = next(line for line in shown.stdout.splitlines() if "searche1-lite train" in line)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        words = shlex.split(train)
        words = words[words.index(".venv/bin/searche1-lite") + 1 :]  # the number of threads precedes it
        (desk / "shown.txt").write_text(run([*words, *SHORT]))
    return desk


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_or_parses(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("SEARCHE1_LITE_CACHE", str(desk / "cache"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands(page):
        command = " ".join(words)
        if kind(words, PARSED):
            check_parsed(words)
        elif words[0] == "searche1-lite":
            run([*words[1:], *SHORTER.get(kind(words, SHORTER) or "", [])])
        elif words[:2] == ["python", "examples/plot_run.py"]:
            subprocess.run([sys.executable, *words[1:]], check=True)
        elif elsewhere := kind(words, ELSEWHERE):
            assert Path(words[1]).name in (ROOT / ELSEWHERE[elsewhere]).read_text(), f"{command} is not run there"
        elif words[0] == "make":
            assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
        elif words[:2] == ["pip", "install"] and words[-1].startswith(".["):
            assert words[-1][2:-1] in extras
        else:
            assert kind(words, BY_HAND), f"{page}: no way to check {command!r}"
        if words[0] == "python":
            exists = find_spec(words[2]) if words[1] == "-m" else (ROOT / words[1]).is_file()
            assert exists, f"{command} does not exist"


def test_each_exception_is_for_a_command_of_a_page() -> None:
    present = [" ".join(words) for page in PAGES for words in commands(page)]
    for start in (*SHORTER, *PARSED, *ELSEWHERE, *BY_HAND):
        assert any(command.startswith(start) for command in present), start


def test_a_runs_folder_holds_the_documented_files_and_its_picture_can_be_drawn(desk: Path) -> None:
    for name in RUN_FILES:
        assert (desk / "runs" / "demo" / name).exists() and f"`{name}`" in README
    picture = desk / "picture.svg"
    subprocess.run([sys.executable, ROOT / "examples" / "plot_run.py", desk / "runs" / "demo", picture], check=True)
    drawn = "".join(ElementTree.parse(picture).getroot().itertext())
    stages = json.loads((desk / "runs" / "demo" / "summary.json").read_text())["stages"]
    assert len(stages) == 5 and all(f"{stage['em']:.3f}" in drawn for stage in stages)


def stage_tables(text: str) -> list[str]:
    return [block for block in re.findall(r"(?:^.*[┏┃┡│└].*\n)+", text, re.MULTILINE) if "searches/" in block]


def test_the_stage_table_is_as_train_prints_it_and_the_picture_has_its_figures(desk: Path) -> None:
    (printed,), (shown,) = stage_tables(README), stage_tables((desk / "shown.txt").read_text())
    assert printed.splitlines()[:4] == shown.splitlines()[:4], "the heading"
    assert re.sub(r"\d+\.\d+|(?<= )\d+(?= │)|-(?= │)", "0", printed).split() == (
        re.sub(r"\d+\.\d+|(?<= )\d+(?= │)|-(?= │)", "0", shown).split()
    )  # fmt: skip
    title = (desk / "shown.txt").read_text().splitlines()[0]
    assert f"\n{title}\n" in README
    drawn = (ROOT / "examples" / "demo_run.svg").read_text()
    exact_match, per_correct = (
        re.findall(r"│ +(\d\.\d{3}) │", printed),
        re.findall(r"│ +(\d\.\d\d) │ +\d+ │ +\d+ │", printed),
    )
    assert len(exact_match) == len(per_correct) == 5
    assert all(f">{figure}<" in drawn for figure in [*exact_match, *per_correct])
    assert len(drawn) < 60_000 and f"from {exact_match[0]} to {exact_match[-1]}" in README


def test_every_command_and_preset_is_documented_with_existing_options() -> None:
    for name in preset_names():
        assert f"`{name}`" in README, name
    for name, command in COMMANDS.commands.items():
        assert f"`searche1-lite {name} " in README, name
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for span in re.findall(rf"`searche1-lite {name} ([^`]*)`", "".join(PAGES.values())):
            assert set(re.findall(r"--[a-z-]+", span)) <= options, span


def anchors(text: str) -> set[str]:
    """The headings' as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_internal_link_has_a_target(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", PAGES[page])):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            linked = (ROOT / page).parent / file if file else ROOT / page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page: str) -> None:
    suffixes = "py|yaml|md|jsonl|json|html|txt|svg|toml|css|js"
    spans = re.findall(rf"`((?:[\w.-]+/)*(?:[\w.-]+\.(?:{suffixes})|[\w.-]+/))`", FENCED.sub("", PAGES[page]))
    for span in set(spans) - set(RUN_FILES) - PLACEHOLDERS:
        places = [(ROOT / page).parent / span, ROOT / span, ROOT / "searche1_lite" / span]
        assert any(place.exists() for place in places), span


def test_readme_and_architecture_name_every_room() -> None:
    package = ROOT / "searche1_lite"
    rooms = [f"`{path.name}/`" for path in package.iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert len(rooms) == 12
    for text in (README.partition("\n## Layout\n")[2], PAGES["docs/architecture.md"]):
        assert not [room for room in rooms if room not in text]
    assert [path.name for path in package.glob("*.py") if not path.name.startswith("__")] == []


def test_the_readme_is_short_links_every_page_and_states_the_limits() -> None:
    assert len(README.splitlines()) <= 200
    for page in PAGES:
        assert page == "README.md" or page.startswith("examples/") or f"]({page}" in README, page
    limits = README.partition("\n## Limits\n")[2]
    assert "No figure here is from a GPU" in limits and "GRPO alone does better than GRPO + OFSD" in limits


def test_the_records_shown_for_documents_and_questions_are_accepted(tmp_path: Path) -> None:
    passage, question = re.findall(r"^```jsonl\n(.*?)^```$", PAGES["docs/data.md"], re.DOTALL | re.MULTILINE)
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text(passage)
    questions.write_text(question)
    checked = check_corpus(corpus)
    assert (checked.passages, checked.faults) == (1, 0)
    (read,) = read_own_file(questions)
    assert read.golden_answers[0] in passage


def test_the_configuration_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert PAGES["docs/configuration.md"] == generate.page(), "python docs/generate.py"
