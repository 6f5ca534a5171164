"""The report's content: what it tells of a run or a sweep, how far it reads a run that goes on, what it lets in."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command import run_command
from report_run import STAGES, Texts, is_right, rollouts, token_kl, trajectory, write_lines, write_run, write_sweep

from searche1_lite.config import dump_config, load_config
from searche1_lite.report import build_report, write_report
from searche1_lite.report.escaping import escape, script_json, visible
from searche1_lite.report.record import read_run
from searche1_lite.report.run_charts import grouped
from searche1_lite.report.svg import draw
from searche1_lite.report.trajectories import parts_of, read_trajectories, stage_order
from searche1_lite.runtime.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "my-run")


def index_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', page)[1])


def chunks_of(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/octet-stream" id="chunk-\d+">([^<]*)</script>', page)
    return [json.loads(gzip.decompress(base64.b64decode(chunk))) for chunk in found]


def test_the_report_is_one_file_that_asks_for_nothing_else(run: Path) -> None:
    page = build_report(run)
    assert not re.search(r"\b(src|srcset|action|background)\s*=", page.split("<script")[0])
    assert all(link == "data:," or link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))
    assert not re.search(r"https?://", page)
    assert "@import" not in page and "url(http" not in page


def test_the_policy_allows_this_style_and_this_script_alone(run: Path) -> None:
    page = build_report(run)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    [style], [script] = (
        re.findall(r"<style>(.*?)</style>", page, re.S),
        re.findall(r"<script>(.*?)</script>", page, re.S),
    )
    for text in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert not re.search(r"\sstyle\s*=|\son\w+\s*=", page.split("<script")[0]), "the policy would stop them"


def test_every_trajectory_is_in_the_index_and_whole_in_its_chunk(run: Path) -> None:
    page = build_report(run)
    index, chunks = index_of(page), chunks_of(page)
    names = {(file["stage"], file["kind"]) for file in index["files"]}
    assert names == {(s, "evaluation") for s in STAGES} | {(s, "rollouts") for s in STAGES[1:]}
    assert sum(len(group["rows"]) for group in index["groups"]) == 2 * 20 * 4 + 3 * 40
    ofsd = next(i for i, f in enumerate(index["files"]) if (f["stage"], f["kind"]) == ("round1.ofsd", "rollouts"))
    group = next(g for g in index["groups"] if g["file"] == ofsd and g["id"] == "train-3")
    assert group["question"] == "What is the capital of Peru? (3)" and group["hops"] == "1"
    assert group["rows"] == [[0, 1.0, 1], [1, 1.0, 2], [2, 1.0, 3], [3, 0.0, 1]]
    chunk = chunks[group["chunk"]]
    found = chunk["groups"][group["place"]]
    assert found["golds"] == ["Lima"] and [t["sample"] for t in found["trajectories"]] == [0, 1, 2, 3]
    [query, hits] = found["trajectories"][3]["searches"][0]
    assert query == "capital of Peru 0"
    assert [chunk["passages"][number] for number, _ in hits] == [
        ["Lima", f"Lima is the capital of Peru. {n}"] for n in range(3)
    ]
    assert found["trajectories"][3]["turns"][1] == ["answer", "<think> so it is</think><answer> Quito</answer>"]


def test_the_siblings_of_a_watched_question_carry_their_role_and_kl(run: Path) -> None:
    page = build_report(run)
    index, chunks = index_of(page), chunks_of(page)
    with_kl = [group for group in index["groups"] if group["kl"] is not None]
    assert len(with_kl) == 8
    found = chunks[with_kl[0]["chunk"]]["groups"][with_kl[0]["place"]]["trajectories"]
    assert [t["role"] for t in found] == ["reference", "sibling", "sibling", "student"]
    pieces, kl, teacher = found[3]["kl"][0]
    assert pieces[:2] == ["<think>", " look"] and kl[1] == 2.31 and teacher[1] == " mayor"
    student = [value for _, values, _ in found[3]["kl"] for value in values]
    assert with_kl[0]["kl"] == pytest.approx(sum(student) / len(student), rel=1e-3)


def test_the_stage_table_and_the_tiles_have_the_figures(run: Path) -> None:
    page = build_report(run)
    assert "<h1" in page and ">my-run</h1>" in page and "0.450 → 0.790" in page
    row = re.search(r'<th scope="row">round1.ofsd</th>(.*?)</tr>', page)[1]
    cells = re.findall(r"<td>(.*?)</td>", row)
    gained = sum(is_right(2, n) and not is_right(1, n) for n in range(40))
    lost = sum(is_right(1, n) and not is_right(2, n) for n in range(40))
    assert gained and lost
    assert cells == [
        "0.790", "0.740–0.840", "0.800", f"+{gained}", f"−{lost}", "2.00", "2.53", "0.0%", "2.5%", "0.0%", "12",
        "11.0 s", "3.0 s", "2.00",
    ]  # fmt: skip
    assert "<code>ofsd.questions</code>" in page and "<code>model.revision</code>" not in page


def test_the_charts_that_the_run_has_figures_for_are_drawn(run: Path) -> None:
    page = build_report(run)
    assert re.findall(r'<figure class="card" id="chart-([\w-]+)"', page) == [
        "em", "searches", "hops", "rates", "reward", "spread", "zero-spread", "kl-reference", "ofsd-loss", "grad-norm",
        "kl-controls", "kl-parts", "privilege", "time", "memory", "speed",
    ]  # fmt: skip
    assert "<title>round1.ofsd, own reference: 0.152</title>" in page
    assert "<title>round1.ofsd, another's: 0.189</title>" in page
    assert "<title>round1.ofsd, diagnostics: 2.4 s</title>" in page
    # Of 20 questions q, q mod 5 of 4 siblings are right: 4 questions with none, 4 with all.
    assert "<title>round1.grpo, none right: 20% of 20 groups</title>" in page


def test_ids_are_unique_and_every_reference_has_one(run: Path) -> None:
    page = build_report(run).split('<script type="application/json"')[0]
    ids = Counter(re.findall(r'\sid="([^"]*)"', page))
    assert max(ids.values()) == 1
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= ids.keys()


def test_the_same_run_gives_the_same_report(run: Path) -> None:
    assert build_report(run) == build_report(run)


def test_plots_take_their_colours_from_the_page() -> None:
    chart = draw("one", "One", lambda axes: axes.plot([0, 1], [1, 2], label="up"), ("x",), [("1",)])
    assert "style=" not in chart.svg and "<style" not in chart.svg and "DOCTYPE" not in chart.svg
    colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', chart.svg))
    assert {"var(--ink)", "var(--muted)", "var(--grid)", "var(--s1)"} <= colours
    assert not any(colour.startswith("#") for colour in colours)


def test_a_label_with_a_dollar_or_markup_is_drawn_as_it_is() -> None:
    name = "$x^2$ </svg><script>"
    chart = draw("one", name, lambda axes: axes.plot([0, 1], [1, 2], label=name), ("x",), [(name,)])
    assert "$x^2$ &lt;/svg&gt;&lt;script&gt;" in chart.svg and "<script" not in chart.svg


def test_a_label_in_any_script_is_drawn_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    chart = draw("one", "文", lambda axes: axes.plot([0, 1], [1, 2], label="教師なし"), ("x",), [("1",)])
    assert "教師なし" in chart.svg and not recwarn.list


# ---- a run that goes on


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new")
    for path in [run / "summary.json", run / "metrics.jsonl", *(run / "trajectories").iterdir()]:
        path.unlink()
    page = build_report(run)
    assert "0 of 3 stages done" in page and "<figure" not in page and 'id="viewer"' not in page


def test_a_run_is_read_as_far_as_it_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "going-on")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "evaluate", "name": "base", "em": 0.45, "em_ci95": [0.4, 0.5]}) + "\n")
        file.write('{"step": 9, "stage": "ofsd", "rou')
    rollouts_file = run / "trajectories" / "round1.ofsd.rollouts.jsonl"
    whole = rollouts_file.read_bytes()
    rollouts_file.write_bytes(whole[: len(whole) - 40])
    (run / "trajectories" / "round1.ofsd.evaluation.jsonl").write_text("")
    page = build_report(run)
    assert "1 of 3 stages done" in page and '<th scope="row">base</th><td>0.450</td><td>0.400–0.500</td>' in page
    shown = [g for g in index_of(page)["groups"] if g["id"] == "train-19"]
    assert sorted(len(g["rows"]) for g in shown) == [3, 4], "the sibling that is being written is left out"
    assert "could not be read" not in page, "a line that is being written is no fault"


def test_lines_that_are_broken_are_counted_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "broken")
    file = run / "trajectories" / "base.evaluation.jsonl"
    file.write_text("{oops\n[1]\n" + json.dumps({"question": "no question"}) + "\n" + file.read_text())
    (run / "summary.json").write_text("{")
    page = build_report(run)
    assert "base.evaluation.jsonl: 2 lines could not be read." in page and "summary.json could not be read." in page
    assert sum(len(g["rows"]) for g in index_of(page)["groups"] if g["file"] is None) == 120


def test_settings_of_another_version_are_left_out_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "old")
    (run / "config.yaml").write_text("rounds: 1\nno_such_setting: 3\n")
    page = build_report(run)
    assert "The settings are left out: unknown config key no_such_setting" in page and ">demo</dd>" in page


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"high"', "true"])
def test_a_figure_that_is_no_number_is_left_out(tmp_path: Path, value: str) -> None:
    run = write_run(tmp_path / "odd")
    metrics, summary = run / "metrics.jsonl", run / "summary.json"
    metrics.write_text(re.sub(r'"(reward|loss|kl)": [\d.e-]+', rf'"\1": {value}', metrics.read_text()))
    summary.write_text(summary.read_text().replace('"em": 0.59', f'"em": {value}'))
    kl = run / "trajectories" / "round1.ofsd.kl.jsonl"
    kl.write_text(kl.read_text().replace("2.31", value))
    page = build_report(run)
    assert '<th scope="row">round1.grpo</th><td>-</td>' in page
    index_of(page), chunks_of(page)  # JSON that a browser reads: Python would take NaN, so it is looked for
    assert not any("NaN" in json.dumps(chunk) or "Infinity" in json.dumps(chunk) for chunk in chunks_of(page))


def test_kl_that_does_not_fit_its_trajectory_is_left_out(tmp_path: Path) -> None:
    texts = Texts()
    made = rollouts(2, 3, texts)
    kl = token_kl(made[:3]) + token_kl(made[3:])
    kl[0]["turns"].pop()
    kl[1]["turns"][0]["kl"].pop()
    write_lines(tmp_path / "trajectories" / "round1.ofsd.rollouts.jsonl", [t.to_dict() for t in made])
    write_lines(tmp_path / "trajectories" / "round1.ofsd.kl.jsonl", kl)
    found = read_trajectories(tmp_path)
    [chunk] = [json.loads(gzip.decompress(base64.b64decode(chunk))) for chunk in found.chunks]
    assert ["kl" in t for t in chunk["groups"][0]["trajectories"]] == [False, False, True]
    assert all("kl" in t for t in chunk["groups"][1]["trajectories"])


# ---- trajectories


def test_a_question_that_a_stage_comes_back_to_makes_a_group_of_its_own(tmp_path: Path) -> None:
    made = [t.to_dict() for t in rollouts(2, 3, Texts())]
    write_lines(tmp_path / "trajectories" / "round1.grpo.rollouts.jsonl", made + made[:3])
    found = read_trajectories(tmp_path)
    assert [(g["id"], g["visit"], len(g["rows"])) for g in found.groups] == [
        ("train-0", 0, 3), ("train-1", 0, 3), ("train-0", 1, 3),
    ]  # fmt: skip


def test_of_too_many_trajectories_the_same_questions_are_kept_in_every_file(run: Path) -> None:
    whole, part = read_trajectories(run), read_trajectories(run, budget=140)
    kept = {(g["id"], g["file"]) for g in part.groups}
    assert {(g["id"], g["file"]) for g in whole.groups if g["kl"] is not None} <= kept, "those watched stay"
    assert len(kept) < len(whole.groups)
    assert all(len(g["rows"]) == (3 if g["file"] is None else 4) for g in part.groups), "groups are whole"
    assert [f.spread for f in part.files] == [f.spread for f in whole.files], "charts are of all"
    assert any("of 280 trajectories" in note for note in part.notes) and not whole.notes


def test_stages_stand_in_the_order_of_the_run() -> None:
    names = ["round10.grpo", "round2.ofsd", "base", "round2.grpo", "round1.ofsd", "mine"]
    assert sorted(names, key=stage_order) == [
        "base",
        "round1.ofsd",
        "round2.grpo",
        "round2.ofsd",
        "round10.grpo",
        "mine",
    ]


def test_tokens_belong_to_the_part_of_the_text_they_stand_in() -> None:
    pieces = ["<think>", " find", "", " it", "</think>", "\n", "<search>", " Lima", "</", "search>"]
    assert parts_of(pieces) == [
        "tags", "think", "think", "think", "tags", "other", "tags", "search", "tags", "tags",
    ]  # fmt: skip
    unclosed = ["<think>", " hm", "<search>", " q", "</search>"]
    assert parts_of(unclosed) == ["tags", "think", "tags", "search", "tags"], "a thought without its end ends there"
    assert parts_of(["<answer>", " Li", "ma"]) == ["tags", "answer", "answer"], "also without its end"


# ---- hostile text

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & \" ' \x00\x1b[31m\u202e\ud800"


def test_hostile_text_is_data_in_html_and_in_json() -> None:
    assert escape(HOSTILE) == (
        "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; &amp; &quot; &#x27; "
        "␀␛[31m⟨U+202E⟩⟨U+D800⟩"
    )
    packed = script_json({HOSTILE: HOSTILE})
    assert packed.isascii() and not set("<>&\x00") & set(packed) and json.loads(packed) == {HOSTILE: HOSTILE}
    assert visible("one\n\ttwo é 文") == "one\n\ttwo é 文"


def test_hostile_text_stands_nowhere_in_the_page(tmp_path: Path) -> None:
    texts = Texts(*[HOSTILE] * 6)
    run = write_run(tmp_path / "<img src=x onerror=alert(2)>", questions=3, asked=3, texts=texts)
    path = write_report(run)
    page = path.read_text(encoding="utf-8")
    assert "<img" not in page and "<script>alert" not in page and "\x00" not in page and "\u202e" not in page
    assert '<h1 dir="auto">&lt;img src=x onerror=alert(2)&gt;</h1>' in page
    assert index_of(page)["groups"][0]["question"] == f"{HOSTILE} (0)"
    assert chunks_of(page)[0]["passages"][0] == [HOSTILE, f"{HOSTILE} 0"]


# ---- a sweep


def test_a_sweep_shows_its_variants_runs_and_what_failed(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", "<b>ablations</b>", "plain <i>teacher</i>", "no memory </td><script>")
    page = build_report(sweep)
    assert "&lt;b&gt;ablations&lt;/b&gt;</h1>" in page and "<i>" not in page and "no memory &lt;/td&gt;" in page
    assert "p is of a paired t-test over seeds." in page
    row = re.search(r'<th scope="row">plain &lt;i&gt;teacher&lt;/i&gt;</th>(.*?)</tr>', page)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == [
        "plain &lt;i&gt;teacher&lt;/i&gt;!", "2", "0.695", "-", "-0.100", "0.031", "0.062", "2.00", "13", "1 min 11 s",
    ]  # fmt: skip
    assert "3 of 4 runs done, 1 failed" in page and "open</a>" not in page and "<script" not in page
    assert re.findall(r'<figure class="card" id="chart-(\w+)"', page) == [
        "em", "difference", "searches", "stages", "time",
    ]  # fmt: skip
    assert "<title>default, seed 1: EM 0.800</title>" in page
    assert "seed 0: difference -0.100</title>" in page


def test_a_sweep_with_its_runs_reports_links_them_wherever_it_lies(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    page = write_report(sweep, runs=True).read_text()
    links = re.findall(r'<a href="(\./[^"]*)">open</a>', page)
    assert links == ["./v0/seed%200/report.html", "./v0/seed%201/report.html", "./v1/seed%200/report.html"]
    assert "Exact match by stage" in (sweep / "v0" / "seed 0" / "report.html").read_text()
    (tmp_path / "elsewhere").mkdir()
    moved = write_report(sweep, tmp_path / "elsewhere" / "sweep.html").read_text()
    assert 'href="./../sweep/v1/seed%200/report.html"' in moved


def test_a_sweeps_stages_stand_in_their_order_and_are_means_over_the_same_runs(tmp_path: Path) -> None:
    """A baseline of GRPO alone names stages first that come late; a run that is cut off has fewer."""
    stages = {
        "grpo": [["base", "round1.grpo", "round2.grpo", "round3.grpo"], ["base", "round1.grpo", "round2.grpo"]],
        "ofsd": [["base", "round1.grpo", "round1.ofsd", "round2.grpo"]] * 2,
    }
    variants = []
    for variant, of_runs in stages.items():
        runs = []
        for seed, names in enumerate(of_runs):
            folder = tmp_path / variant / str(seed)
            folder.mkdir(parents=True)
            shown = [{"name": name, "em": 0.1 * place + 0.01 * seed} for place, name in enumerate(names)]
            (folder / "summary.json").write_text(json.dumps({"stages": shown}))
            runs.append({"seed": seed, "folder": f"{variant}/{seed}", "state": "done", "em": 0.5, "searches": 2.0})
        variants.append({"name": variant, "em_mean": 0.5, "runs": runs})
    sweep = {"name": "s", "baseline": "grpo", "seeds": [0, 1], "variants": variants}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    figure = re.search(r'id="chart-stages".*?</figure>', build_report(tmp_path), re.DOTALL)[0]
    table = re.search(r"<table.*?</table>", figure, re.DOTALL)[0]
    assert re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", table) == [
        "variant", "base", "round1.grpo", "round1.ofsd", "round2.grpo",
        "grpo", "0.005", "0.105", "-", "0.205",
        "ofsd", "0.005", "0.105", "0.205", "0.305",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "count", "said"),
    [
        ([], 3, "3 of 5 stages done"),
        ([], 5, ""),
        (["rounds=9", "budget.updates=20"], 5, ""),
        (["rounds=9", "budget.updates=21"], 5, "5 stages done"),
    ],
)
def test_a_run_is_called_unfinished_while_a_stage_is_to_come(
    tmp_path: Path, settings: list[str], count: int, said: str
) -> None:
    names = ["base", "round1.grpo", "round1.ofsd", "round2.grpo", "round2.ofsd"][:count]
    stages = [{"name": name, "em": 0.5, "seconds": 1.0, "steps": 0 if name == "base" else 5} for name in names]
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(load_config("demo", None, settings)))
    (tmp_path / "summary.json").write_text(json.dumps({"stages": stages}))
    page = build_report(tmp_path)
    assert f"{said}: the run is going on, or was stopped" in page if said else "going on" not in page


def test_a_series_that_begins_late_has_its_name_in_the_legend() -> None:
    stages = [
        {"name": "round1.ofsd", "kl": {"pairs": 0.2, "plain": 0.0}},
        {"name": "round2.ofsd", "kl": {"pairs": 0.1, "plain": 0.0, "foreign": 0.3}},
    ]
    series = {"pairs": "own", "plain": "none", "foreign": "another's"}
    chart = grouped("kl", "KL", stages, ("kl",), series, "nats")
    assert chart is not None and ">another's</text>" in chart.svg.replace("\n", "")


def test_a_sweep_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    waiting = {"seed": 0, "folder": "a/0", "state": "waiting", "em": None, "error": None}
    sweep = {"name": "s", "baseline": "a", "seeds": [0], "variants": [{"name": "a", "runs": [waiting]}]}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    page = build_report(tmp_path)
    assert "0 of 1 runs done" in page and "<figure" not in page and "waiting" in page


# ---- the command


def console(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_command(*words, cwd=cwd)


def test_the_command_writes_the_report_and_prints_where(tmp_path: Path) -> None:
    write_run(tmp_path / "run", questions=2, asked=2)
    shown = console("report", "run", cwd=tmp_path)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "run/report.html\n", "")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    shown = console("report", "run", "--out", "here.html", cwd=tmp_path)
    assert shown.stdout == "here.html\n" and (tmp_path / "here.html").is_file()
    assert not list(tmp_path.rglob("*.staging"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("missing", "there is no folder missing; give the folder of a run"),
        ("empty", "empty holds neither a run (config.yaml, summary.json) nor a sweep (sweep.json)"),
        ("begun --out no/such/place.html", "there is no folder "),
        ("begun --out empty", "empty is a folder; give --out a file, such as empty/report.html"),
        ("begun --runs", "begun is one run, not a sweep; leave --runs out"),
        ("faulty", "cannot read faulty/sweep.json: Expecting"),
        ("other", "cannot read other/sweep.json (KeyError: 'variants'); run the sweep again"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(tmp_path: Path, words: str, message: str) -> None:
    files = {
        "empty/a.txt": "",
        "begun/config.yaml": "rounds: 1\n",
        "begun/trajectories/base.evaluation.jsonl": "",
        "faulty/sweep.json": "{",
        "other/sweep.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shown = console("report", *words.split(), cwd=tmp_path)
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith(f"error: {message}") and shown.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))


def test_reporting_loads_no_torch(run: Path) -> None:
    code = (
        "import sys, pathlib; from searche1_lite.report import build_report; build_report(pathlib.Path(sys.argv[1]))\n"
    )
    code += "print(sorted({'torch', 'transformers', 'trl', 'matplotlib.pyplot'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n" and shown.stderr == ""


def test_figures_of_a_run_come_from_its_files(run: Path) -> None:
    record = read_run(run)
    assert record.unfinished == "" and [stage["name"] for stage in record.stages] == STAGES
    assert len(record.steps) == 13 and record.changed_settings["seed"] == (7, 0) and not record.notes
    with pytest.raises(UserError, match="there is no folder"):
        build_report(run / "missing")


def test_the_generated_run_is_what_train_writes() -> None:
    """Guards the tests' own data: ids, mask and turns of a made-up episode fit together as in `Trajectory`."""
    made = trajectory(1, 0, True, 2, Texts())
    assert len(made.completion_ids) == len(made.loss_mask)
    assert all(made.loss_mask[turn.start : turn.end] == [1] * (turn.end - turn.start) for turn in made.turns)
    assert made.n_model_tokens == sum(turn.end - turn.start for turn in made.turns)
