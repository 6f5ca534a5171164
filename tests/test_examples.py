"""Every script of `examples/` and every sweep file, on the demo's policy; and the questions of the corpus example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import run_command

from searche1_lite.data.questions import check_disjoint, load_questions
from searche1_lite.rollout.reward import normalize_answer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINE = re.compile(r"(\S.*): (\d\.\d\d) right, (\d\.\d\d) searches a question")


def script(name: str, *words: str, cwd: Path) -> str:
    """The stdout of an example that prints no traceback and no warning."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr and "Warning" not in ran.stderr
    return ran.stdout


def figures(shown: str) -> dict[str, tuple[float, float]]:
    """Exact match and searches per question, by the name that precedes them on a line."""
    return {match[1]: (float(match[2]), float(match[3])) for match in LINE.finditer(shown)}


def test_python_api_trains_asks_and_evaluates_in_under_25_lines(tmp_path: Path) -> None:
    code = (EXAMPLES / "python_api.py").read_text().rpartition('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 25
    shown = script("python_api.py", "run", cwd=tmp_path)
    stages = figures(shown)
    assert list(stages) == ["base", "round1.grpo", "round1.ofsd"]
    assert stages["base"][0] < stages["round1.ofsd"][0], "the demo learns"
    assert "Feda Vifa? " in shown and "searched for ['" in shown and "dev questions: 0." in shown


def test_own_reward_is_what_grpo_rewards(tmp_path: Path) -> None:
    shown = script("own_reward.py", "run", cwd=tmp_path)
    assert shown.startswith("rewarded by right_and_brief\n")
    assert figures(shown)["base"][0] < figures(shown)["round1.grpo"][0]


def test_own_retriever_is_what_the_policy_searches(tmp_path: Path) -> None:
    found = figures(script("own_retriever.py", cwd=tmp_path))
    assert list(found) == ["bm25(k1=0.9, b=0.4)", "rare words"]
    assert found["rare words"][0] > 0.2 and found["rare words"] != found["bm25(k1=0.9, b=0.4)"]


@pytest.mark.slow
def test_inspect_signal_shows_the_kl_of_the_pairs_falling_and_the_control_at_zero(tmp_path: Path) -> None:
    shown = script("inspect_signal.py", "run", cwd=tmp_path)
    rows = re.findall(r"(before|after): pairs (\S+), plain (\S+), foreign (\S+)", shown)
    (_, *before), (_, *after) = [(when, *map(float, values)) for when, *values in rows]
    assert before[0] > after[0] > 0 and before[1] == after[1] == 0 and before[2] > 0


@pytest.fixture(scope="module")
def corpus_text() -> str:
    files = sorted((EXAMPLES / "own_corpus" / "rivers").glob("*.md"))
    assert len(files) == 36
    return " ".join(path.read_text(encoding="utf-8") for path in files)


def test_the_rivers_questions_are_disjoint_and_their_answers_are_in_the_documents(
    corpus_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    splits = [load_questions(f"examples/own_corpus/{name}.jsonl", "test", 0, 0, print) for name in ("train", "test")]
    assert [len(split) for split in splits] == [24, 12]
    check_disjoint(*splits)
    plain = normalize_answer(corpus_text)
    for question in [*splits[0], *splits[1]]:
        assert all(normalize_answer(gold) in plain for gold in question.golden_answers), question


@pytest.mark.slow
def test_planning_prints_the_documented_table_and_its_parts_add_up(tmp_path: Path) -> None:
    table = [line for line in script("planning/plan.py", cwd=tmp_path).splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    heads, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:]))
    plans = [dict(zip(heads, row, strict=True)) for row in rows]
    hours = [float(plan["hours"]) for plan in plans]
    assert [plan["cards"] for plan in plans] == ["1", "8", "8", "64", "64"]
    assert sorted(hours, reverse=True) == hours and hours[0] / hours[-1] < 64
    for plan, total in zip(plans, hours, strict=True):
        parts = [float(plan[part].split()[0]) for part in ("rollouts", "training", "exchange", "writing down")]
        assert sum(parts) == pytest.approx(total, abs=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["settle-it", "divergence", "reference", "teacher", "budget"])
def test_each_sweep_file_compares_its_variants(name: str, tmp_path: Path) -> None:
    """Two updates per run, one seed: every variant runs; its figures do not matter."""
    short = ["grpo.steps=1", "grpo.questions_per_step=2", "ofsd.questions=8", "data.evaluation_limit=8"]
    words = ["sweep", str(EXAMPLES / f"{name}.yaml"), "--out", "out", "--seeds", "1", "--json", "budget.updates=2"]
    ran = run_command(*words, *short, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    variants = json.loads(ran.stdout)["variants"]
    assert {row["name"] for row in variants} == set(yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["variants"])
    assert [run["state"] for row in variants for run in row["runs"]] == ["done"] * len(variants)
