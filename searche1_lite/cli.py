"""The command line: wiring only. Heavy imports happen inside the commands, so that `--help` is instant."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from searche1_lite.errors import UserError
from searche1_lite.quiet import quieten

if TYPE_CHECKING:
    from searche1_lite.ask import Asker
    from searche1_lite.config import Config, SearchConfig
    from searche1_lite.search.base import Retriever

app = typer.Typer(
    help="A search agent that improves itself: GRPO and offline self-distillation over one LoRA adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Preset = Annotated[str | None, typer.Option(help="A shipped configuration, such as demo.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file, merged over the preset.")]
Adapter = Annotated[Path | None, typer.Option(help="An adapter folder, such as runs/demo/checkpoints/round2.ofsd.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, such as grpo.steps=20 seed=1.", metavar="KEY=VALUE")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to large downloads.")]


@app.command()
def train(
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/PRESET.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in --out.")] = False,
    yes: Yes = False,
) -> None:
    """Train: rounds of GRPO and OFSD. Example: searche1-lite train --preset demo --out runs/demo"""
    if resume and out and not (preset or config or overrides) and (out / "config.yaml").is_file():
        config = out / "config.yaml"  # the run's own settings
    settings, preset = _settings(preset, config, overrides)
    folder_path = out or Path("runs") / (preset or (config.stem.strip(".") if config else "") or "default")
    from searche1_lite.benchmarks import load_run_questions
    from searche1_lite.checkpoint import RunFolder
    from searche1_lite.tracking import check_trackers

    check_trackers(settings.logging)
    _check_one_gpu()
    questions = load_run_questions(settings, _say)  # faulty files are refused before a folder is made
    folder = RunFolder(folder_path, settings, resume)
    folder.claim()
    _prepare_search(settings.search, yes)
    quieten()
    from searche1_lite.console import RichTasks, stage_table
    from searche1_lite.evolve import run
    from searche1_lite.interrupt import Interrupted

    try:
        summary = run(settings, folder, RichTasks(), questions)
    except KeyboardInterrupt as error:
        if (folder_path / "config.yaml").is_file():
            # Only an `Interrupted` had the time to keep the steps of the stage too.
            kept = "what was done is kept" if isinstance(error, Interrupted) else "what was kept last is there"
            _say(f"interrupted; {kept}, go on with --resume --out {folder_path}")
        else:
            _say("interrupted before the first stage; the same command begins again")
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    from rich.console import Console

    Console().print(stage_table(summary))
    _say(f"run: {folder_path}")
    _write_report(folder_path)


@app.command("eval")
def eval_command(
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    adapter: Adapter = None,
    data: Annotated[
        str | None,
        typer.Option(help="Questions, such as nq, hotpotqa:dev, all (seven sets), demo or a JSONL file; joined by +."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of each data set, a seeded subset of this size; 0: all. Default: all of --data; without --data, what "
            "`train` evaluates on (data.evaluation_limit).",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="agent, or a baseline: rag, no-search.")] = "agent",
    out: Annotated[Path | None, typer.Option(help="Keep answers and figures in this folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evaluation that is in --out.")] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:
    """Evaluate an adapter, greedily. Example: searche1-lite eval --preset demo --data demo:dev"""
    if resume and not out:
        raise UserError("--resume goes on with what is in a folder; name it with --out")
    settings, _ = _settings(preset, config, overrides)
    from searche1_lite.benchmarks import load_questions, named, order_by_data_set
    from searche1_lite.checkpoint import check_adapter_folder
    from searche1_lite.methods import method_settings, parse_method, retriever_for

    chosen = parse_method(method)
    if adapter:
        check_adapter_folder(adapter)
    name = named(data or settings.data.evaluation, "data.evaluation (or --data)")
    if data is None and limit is None:
        questions = load_questions(name, "test", settings.data.evaluation_limit, settings.seed, _say)
    else:
        questions = load_questions(name, "test", limit or 0, settings.seed, _say, limit_each=True)
    questions = order_by_data_set(questions)
    folder = None
    if out:
        from searche1_lite.evaluation_folder import EvaluationFolder, describe

        folder = EvaluationFolder(out, settings, describe(chosen, adapter, name, questions), questions, resume)
    result = folder.result() if folder else None
    if result is None:
        if chosen != "no-search":
            _prepare_search(settings.search, yes)
        quieten()
        from searche1_lite.console import RichTasks
        from searche1_lite.evaluation import run_evaluation
        from searche1_lite.loaded_run import Run

        try:
            work = Run(method_settings(settings, chosen), RichTasks(), adapter, retriever_for(chosen))
            result = run_evaluation(work, questions, chosen, folder) | {
                "method": chosen,
                "retriever": None if chosen == "no-search" else work.retriever.name,
                "model": settings.model.name,
                "adapter": str(adapter) if adapter else None,
                "data": name,
            }
        except KeyboardInterrupt as error:
            kept = "what is answered is kept; go on with the same command and --resume"
            _say(f"interrupted; {kept if out else 'nothing is kept without --out DIR'}")
            raise typer.Exit(getattr(error, "exit_code", 130)) from None
        if folder:
            folder.finish(result)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from searche1_lite.evaluation_table import print_evaluation

        print_evaluation(result)


@app.command()
def ask(
    question: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. Without it: a session at a terminal, or a pipe's questions, one a line, answered as "
            "JSON lines."
        ),
    ] = None,
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    adapter: Adapter = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base's answer beside the adapter's.")] = False,
    show_trace: Annotated[
        bool, typer.Option("--show-trace", help="On stderr, all that is written and found, as it comes.")
    ] = False,
    as_json: AsJson = False,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser, with all that a session has.")] = False,
    host: Annotated[
        str, typer.Option(help="With --web: the address to be reached at; beyond this machine only with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --web: the port; 0: a free one.")] = 8642,
    token: Annotated[
        str | None, typer.Option(help="With --web: what the page asks for; better given as SEARCHE1_LITE_TOKEN.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Answer a question, or many. Example: searche1-lite ask --preset demo "What is the mayor of Port Mitu?"

    Exits with 0 if every question was answered, 3 if one was not, 1 after a failure, 2 for wrong usage.
    """
    question, settings_given = _question_and_overrides([question, *(overrides or [])] if question is not None else [])
    settings, _ = _settings(preset, config, settings_given)
    from searche1_lite.checkpoint import check_adapter_folder
    from searche1_lite.protocol import check_question

    if question is not None:
        question = check_question(question, settings.protocol)
    elif show_trace:
        raise UserError("--show-trace is for one question; give it")
    if adapter:
        check_adapter_folder(adapter)
    elif compare:
        raise UserError("--compare holds an adapter beside the base; name one with --adapter")
    if web:
        if question is not None or compare or show_trace or as_json:
            raise UserError("--web takes its questions on the page, and --compare is there; leave the rest out")
        _ask_on_a_page(settings, adapter, yes, host, port, token)
        return
    session = question is None and sys.stdin.isatty()
    if session and (as_json or compare or not sys.stdout.isatty()):
        raise UserError("a session is for a terminal and takes neither --json nor --compare; give a question or a pipe")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what its encoding lacks is no reason to fail
    lines = None
    if question is None and not session:
        from searche1_lite.pipe import QuestionLines

        # A file object of its own: sys.stdin cannot be closed at exit while a thread reads it.
        lines = QuestionLines(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), settings.engine.batch_size)
    try:
        if lines is not None and not lines.wait():
            raise UserError("there is no question: neither as an argument nor on stdin, one a line")
        asker = _open_asker(settings, adapter, yes)
        if session:
            from searche1_lite.answer_view import plain_console
            from searche1_lite.chat import Chat, open_history
            from searche1_lite.search.index import cache_folder

            Chat(asker, plain_console(), open_history(cache_folder() / "ask_history")).run()
            return
        if lines is not None:
            from searche1_lite.pipe import answer_lines

            answered = True
            for answer in answer_lines(asker, lines, compare):
                print(json.dumps(answer.to_dict()), flush=True)
                answered = answered and answer.answered
        else:
            from searche1_lite.answer_view import show_one

            answered = show_one(asker, question or "", compare, show_trace, as_json)
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read the answers has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    raise typer.Exit(0 if answered else 3)


def _ask_on_a_page(
    settings: "Config", adapter: Path | None, yes: bool, host: str, port: int, token: str | None
) -> None:
    from searche1_lite.serving import find_token, listen

    place = listen(host, port, find_token(token))  # before the model is loaded, in which time it is not answered yet
    try:
        asker = _open_asker(settings, adapter, yes)
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None
    from searche1_lite.web.app import serve_page

    serve_page(asker, place)


def _open_asker(settings: "Config", adapter: Path | None, yes: bool) -> "Asker":
    """Java and the index are opened while the model is loaded; what has to be fetched first is asked about before."""
    from concurrent.futures import ThreadPoolExecutor

    from searche1_lite.console import RichTasks, confirmation
    from searche1_lite.search.catalog import describe_source, open_retriever

    def open_search() -> "Retriever":
        return open_retriever(settings.search, confirm=confirmation(yes), progress=RichTasks(), say=_say)

    at_hand, _ = describe_source(settings.search)
    with ThreadPoolExecutor(1, "open-search") as side:
        retriever = side.submit(open_search) if at_hand == "ok" else open_search()
        quieten()
        from searche1_lite.ask import Asker
        from searche1_lite.loaded_run import Run

        return Asker(Run(settings, RichTasks(quiet=True), adapter, retriever), adapter)


def _question_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The question among these words, if there is one, and the settings.

    A word is a setting if it looks like one, `section.key=value` or a key that there is.
    """
    from searche1_lite.config import Config, flatten

    known = flatten(Config())

    def is_setting(word: str) -> bool:
        key = re.match(r"(\w+(?:\.\w+)*)=", word)
        return key is not None and ("." in key[1] or key[1] in known)

    questions = [word for word in words if not is_setting(word)]
    if len(questions) > 1:
        raise UserError(f"{questions[1]!r} is neither a setting nor part of the question; put the question in quotes")
    return (questions[0] if questions else None), [word for word in words if is_setting(word)]


@app.command()
def index(
    corpus: Annotated[
        Path,
        typer.Argument(
            help="JSONL (.gz too) with `id` and `contents`, whose first line is the title; or a folder of .txt and .md."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the index goes; must not exist.")],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    words: Annotated[int, typer.Option(min=1, help="About how many words a passage of a text file has.")] = 100,
) -> None:
    """Build a BM25 index of your own corpus. Example: searche1-lite index docs.jsonl --out my-index"""
    from searche1_lite.console import RichTasks
    from searche1_lite.search.index import build_index

    try:
        build_index(corpus, out, threads, words=words, progress=RichTasks(), say=_say)
    except KeyboardInterrupt:
        _say("interrupted; what is indexed is kept, the same command goes on from there")
        raise typer.Exit(130) from None
    typer.echo(str(out))


@app.command("serve-search")
def serve_search_command(
    overrides: Overrides = None,
    index: Annotated[
        str | None, typer.Option(help="The index: its folder, wiki-18, or one of Pyserini's names; search.index.")
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    host: Annotated[
        str, typer.Option(help="The address to be reached at; beyond this machine only with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes over the same index, each with a Java machine of its own.")
    ] = 1,
    token: Annotated[
        str | None, typer.Option(help="What clients have to show; better given as SEARCHE1_LITE_TOKEN.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Serve a search engine, as Search-R1 does: POST /retrieve. Example: searche1-lite serve-search --index my-index"""
    from searche1_lite.config import load_config
    from searche1_lite.serving import find_token, listen

    given = {"search.index": index} if index else {}
    search = load_config(preset, config, overrides or [], before=given).search
    place = listen(host, port, find_token(token))  # what is wrong with it is told before the index is opened
    from searche1_lite.search.catalog import describe_source
    from searche1_lite.search.workers import serve_search

    try:
        ready = search.url is not None or (search.index is not None and describe_source(search)[0] == "ok")
        if not ready:  # it is built or fetched here, once, with progress
            _prepare_search(search, yes)
        serve_search(search, place, workers)
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(130) from None


def _prepare_search(search: "SearchConfig", yes: bool) -> None:
    """Builds or fetches what the search needs before anything heavy is loaded, so that it is asked about at once."""
    from searche1_lite.console import RichTasks, confirmation
    from searche1_lite.search.catalog import open_retriever

    open_retriever(search, confirm=confirmation(yes), progress=RichTasks(), say=_say)


def _check_one_gpu() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "," in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        raise UserError("a run is for one GPU; set CUDA_VISIBLE_DEVICES to one of them, and start one process")


def _write_report(folder: Path) -> None:
    """At the end of a run or a sweep, which is complete whether its report can be written or not."""
    from searche1_lite.report import write_report

    try:
        _say(f"report: {write_report(folder)}")
    except Exception as error:
        if os.environ.get("SEARCHE1_LITE_DEBUG"):
            raise
        reason = " ".join(str(error).split())
        _say(f"the report could not be written ({type(error).__name__}: {reason}); all else is; see `report {folder}`")


def _say(line: str) -> None:
    typer.echo(line, err=True)


@app.command()
def doctor(
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    gpu_gb: Annotated[
        float | None, typer.Option(min=1, help="Plan for a card of this size, in GiB, instead of the one here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine has, and whether a configuration fits it. Example: searche1-lite doctor --gpu-gb 12"""
    settings, _ = _settings(preset, config, overrides, gpu_gb, smallest=True)
    quieten()
    from searche1_lite.doctor import examine

    found = examine(settings, gpu_gb)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        from rich.console import Console

        from searche1_lite.console import doctor_tables

        for part in doctor_tables(found):
            Console().print(part)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command()
def bench(
    overrides: Overrides = None,
    preset: Preset = None,
    config: ConfigFile = None,
    cap_gb: Annotated[
        float | None, typer.Option(min=1, help="On a GPU, the most memory to allocate, in 10^9 bytes.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="What to measure: memory, rollout, search or round; give it again for more; default: all."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two, for rougher figures.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios, to a .png, .svg or .pdf file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine beside baselines, or a preset's peak memory. Example: searche1-lite bench --quick --json"""
    from searche1_lite.bench import bench as run_bench
    from searche1_lite.bench import check_parts
    from searche1_lite.bench.plot import check_plot_file, save_plot
    from searche1_lite.config import load_config

    check_parts(part or ())
    if plot:
        check_plot_file(plot)
    settings = load_config(preset, config, overrides or []) if preset or config or overrides else None
    quieten()
    found = run_bench(settings, cap_gb, on_part=_say, parts=part or (), quick=quick)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        from rich.console import Console

        from searche1_lite.console import bench_tables

        for table in bench_tables(found):
            Console().print(table)
    if plot:
        save_plot(found, plot)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file of variants and seeds, such as examples/settle-it.yaml.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder; default: runs/NAME-OF-FILE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,2,3, in the place of the file's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is in --out.")] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:
    """Compare variants over seeds. Example: searche1-lite sweep examples/settle-it.yaml --out runs/settle-it"""
    from searche1_lite.sweep.plan import load_plan, parse_seeds

    plan = load_plan(file, overrides or [], parse_seeds(seeds) if seeds is not None else [])
    folder = out or Path("runs") / plan.name
    _check_one_gpu()
    from searche1_lite.benchmarks import load_run_questions
    from searche1_lite.tracking import check_trackers

    # Faults that all runs have in common are told once, and what they download is fetched once.
    for alike in {
        repr((run.config.data, run.config.grpo)): run.config for run in plan.runs[: len(plan.titles)]
    }.values():
        load_run_questions(alike, _say)
    for alike in {repr(run.config.logging): run.config.logging for run in plan.runs}.values():
        check_trackers(alike)
    for alike in {repr(run.config.search): run.config.search for run in plan.runs}.values():
        _prepare_search(alike, yes)
    quieten()
    from searche1_lite.sweep.runs import check_room, run_sweep

    check_room(plan, jobs)
    try:
        result = run_sweep(plan, folder, jobs, _say, resume)
    except KeyboardInterrupt as error:
        _say(f"interrupted; what was done is kept, go on with --resume --out {folder}")
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from rich.console import Console

        from searche1_lite.console import sweep_table

        Console().print(sweep_table(result))
    _say(f"sweep: {folder}")
    _write_report(folder)
    if any(run["state"] == "failed" for row in result["variants"] for run in row["runs"]):
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's or a sweep's folder, such as runs/demo.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: DIR/report.html.")] = None,
    runs: Annotated[bool, typer.Option("--runs", help="For a sweep, write the reports of its runs too.")] = False,
) -> None:
    """Write the HTML report of a run or a sweep, also while it goes on. Example: searche1-lite report runs/demo"""
    from searche1_lite.report import write_report

    typer.echo(str(write_report(folder, out, runs)))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo, or an adapter's.", metavar="DIR")],
    to: Annotated[Path, typer.Option(help="Where it goes; must be empty or not there.")],
    stage: Annotated[str | None, typer.Option(help="One of the run's stages; default: its last.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="One bf16 model, instead of an adapter.")] = False,
    push: Annotated[str | None, typer.Option(help="Also upload it to the hub, as owner/name.", metavar="REPO")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is not private.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export what was trained, for other programs. Example: searche1-lite export runs/demo --to my-agent --merge"""
    from searche1_lite.export import check_target, export_policy, find_source

    find_source(folder, stage)  # faults are told before anything heavy is loaded
    check_target(to, folder)
    if public and push is None:
        raise UserError("--public is for --push; name the repository with it")
    quieten()
    result = export_policy(folder, to, stage=stage, merge=merge, push=push, public=public, say=_say)
    typer.echo(json.dumps(result) if as_json else result["address"] or result["folder"])


def _settings(
    preset: str | None,
    config: Path | None,
    overrides: list[str] | None,
    gpu_gib: float | None = None,
    smallest: bool = False,
) -> "tuple[Config, str | None]":
    """The settings and the preset's name; with neither preset nor file, the preset for the GPU here (or `gpu_gib`).

    Args:
        smallest: without a GPU take the preset for the smallest one, instead of refusing.
    """
    from searche1_lite.config import default_preset, load_config

    settings = load_config(preset, config, overrides or [])  # faults are told before PyTorch is loaded
    if preset or config:
        return settings, preset
    if gpu_gib is None:
        import torch

        if torch.cuda.is_available():
            gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    preset = default_preset(8 if gpu_gib is None and smallest else gpu_gib)
    _say(f"preset {preset}, {'by' if gpu_gib else 'without'} the size of the GPU; --preset names another")
    return load_config(preset, None, overrides or []), preset


def main() -> None:
    """The console script: one line for what the user can mend, a traceback only with SEARCHE1_LITE_DEBUG=1."""
    if "LOCAL_RANK" not in os.environ:
        # With several cards in sight TRL would spread batches over them; a run is for one, and this says which.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.platform == "linux":
        # The KV cache grows token by token; without this, the memory it leaves behind is too small for what comes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        app()
    except (UserError, OSError) as error:
        if os.environ.get("SEARCHE1_LITE_DEBUG"):
            raise
        message, exit_code = str(error), 1
        if isinstance(error, UserError):
            exit_code = error.exit_code
        elif error.errno == errno.ENOSPC:
            place = f": {error.filename}" if error.filename else ""
            message = f"no space left on the disk{place}; make room; what was kept is whole, `train` and `eval` go on "
            message += "from it with --resume"
        elif error.filename is not None:  # a folder that may not be written to, ...
            message = f"{error.strerror}: {error.filename}; make room or give another place"
        _fail(message, exit_code)
    except RuntimeError as error:
        # PyTorch is not imported here for the names of its errors.
        if os.environ.get("SEARCHE1_LITE_DEBUG") or "CUDA" not in str(error):
            raise
        if type(error).__name__ == "OutOfMemoryError":
            _fail("the GPU's memory ran out; `searche1-lite doctor` says what to lower. Finished stages are kept", 1)
        _fail(f"the GPU failed: {str(error).strip().splitlines()[0]}; look at `searche1-lite doctor`", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)
