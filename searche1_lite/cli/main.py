"""The command line: wiring only. Heavy imports happen inside the commands, so that `--help` is instant."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import searche1_lite
from searche1_lite.cli import arguments as args
from searche1_lite.runtime.errors import UserError, explain
from searche1_lite.runtime.quiet import quieten

if TYPE_CHECKING:
    from searche1_lite.config import Config

app = typer.Typer(
    help="A search agent that improves itself: GRPO and offline self-distillation over one LoRA adapter.\n\n"
    "Example: searche1-lite train --preset demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"searche1-lite {searche1_lite.__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: searche1-lite train --preset demo --out runs/demo")
def train(
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/PRESET.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in --out.")] = False,
    yes: args.Yes = False,
) -> None:
    """Train: rounds of GRPO and OFSD."""
    if resume and out and not (preset or config or overrides) and (out / "config.yaml").is_file():
        config = out / "config.yaml"  # the run's own settings
    settings, preset = _settings(preset, config, overrides)
    folder = out or Path("runs") / (preset or (config.stem.strip(".") if config else "") or "default")
    from searche1_lite.cli import api
    from searche1_lite.runtime.interrupt import Interrupted

    try:
        summary = api.train_policy(settings, folder, resume=resume, quiet=True, **_terminal(yes))
    except KeyboardInterrupt as error:
        if (folder / "config.yaml").is_file():
            # Only an `Interrupted` had the time to keep the steps of the stage too.
            kept = "what was done is kept" if isinstance(error, Interrupted) else "what was kept last is there"
            _say(f"interrupted; {kept}, go on with --resume --out {folder}")
        else:
            _say("interrupted before the first stage; the same command begins again")
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    from searche1_lite.runtime.ranks import is_first, leave

    leave()
    if not is_first():
        return
    from searche1_lite.cli.tables import stage_table

    _show(summary, False, stage_table)
    _say(f"run: {folder}")
    _write_report(folder)


@app.command("eval", epilog="Example: searche1-lite eval --preset demo --data demo:dev")
def eval_command(
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    adapter: args.Adapter = None,
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
    method: args.Method = "agent",
    out: Annotated[Path | None, typer.Option(help="Keep answers and figures in this folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evaluation that is in --out.")] = False,
    as_json: args.AsJson = False,
    yes: args.Yes = False,
) -> None:
    """Evaluate an adapter, greedily."""
    if resume and not out:
        raise UserError("--resume goes on with what is in a folder; name it with --out")
    settings, _ = _settings(preset, config, overrides)
    from searche1_lite.cli import api

    kept = "what is answered is kept; go on with the same command and --resume"
    with _interruptible(kept if out else "nothing is kept without --out DIR"):
        asked: dict[str, Any] = {"data": data, "limit": limit, "method": method, "out": out, "resume": resume}
        result = api.evaluate_policy(settings, adapter=adapter, **asked, quiet=True, **_terminal(yes))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        from searche1_lite.evaluate.table import print_evaluation

        print_evaluation(result)


@app.command(epilog='Example: searche1-lite ask --preset demo "What is the mayor of Port Mitu?"')
def ask(
    question: Annotated[
        str | None,
        typer.Argument(
            help="What to answer. Without it: a session at a terminal, or a pipe's questions, one a line, answered as "
            "JSON lines."
        ),
    ] = None,
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    adapter: args.Adapter = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base's answer beside the adapter's.")] = False,
    show_trace: Annotated[
        bool, typer.Option("--show-trace", help="On stderr, all that is written and found, as it comes.")
    ] = False,
    as_json: args.AsJson = False,
    web: args.Web = False,
    host: args.Host = "127.0.0.1",
    port: args.Port = 8642,
    token: args.Token = None,
    yes: args.Yes = False,
) -> None:
    """Answer a question, or many.

    Exits with 0 if every question was answered, 3 if one was not, 1 after a failure, 2 for wrong usage.
    """
    question, overrides = args.question_and_overrides([] if question is None else [question, *(overrides or [])])
    settings, _ = _settings(preset, config, overrides)
    from searche1_lite.cli import api
    from searche1_lite.rollout.protocol import check_question
    from searche1_lite.train.checkpoint import check_adapter_folder

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
        with _interruptible():
            api.serve_page(settings, adapter, host=host, port=port, token=token, quiet=True, **_terminal(yes))
        return
    session = question is None and sys.stdin.isatty()
    if session and (as_json or compare or not sys.stdout.isatty()):
        raise UserError("a session is for a terminal and takes neither --json nor --compare; give a question or a pipe")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what its encoding lacks is no reason to fail
    lines = None
    if question is None and not session:
        from searche1_lite.cli.pipe import QuestionLines

        # A file object of its own: sys.stdin cannot be closed at exit while a thread reads it.
        lines = QuestionLines(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), settings.engine.batch_size)
    answered = True
    with _interruptible():
        if lines is not None and not lines.wait():
            raise UserError("there is no question: neither as an argument nor on stdin; give one, or one a line")
        asker = api.open_asker(settings, adapter, quiet=True, **_terminal(yes))
        if session:
            from searche1_lite.cli.chat import Chat, open_history
            from searche1_lite.search.index import cache_folder
            from searche1_lite.serve.answer_view import plain_console

            Chat(asker, plain_console(), open_history(cache_folder() / "ask_history")).run()
        elif lines is not None:
            from searche1_lite.cli.pipe import answer_lines

            for answer in answer_lines(asker, lines, compare):
                print(json.dumps(answer.to_dict()), flush=True)
                answered = answered and answer.answered
        else:
            from searche1_lite.serve.answer_view import show_one

            answered = show_one(asker, question or "", compare, show_trace, as_json)
    raise typer.Exit(0 if answered else 3)


@app.command(epilog="Example: searche1-lite index docs.jsonl --out my-index")
def index(
    corpus: Annotated[
        Path,
        typer.Argument(
            help="JSONL (.gz too) with `id` and `contents`, whose first line is the title; or a folder of .txt and .md."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the index goes; must not exist.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads that index.")] = 2,
    words: Annotated[int, typer.Option(min=1, help="About how many words a passage of a text file has.")] = 100,
) -> None:
    """Build a BM25 index of your own corpus."""
    from searche1_lite.runtime.console import RichTasks
    from searche1_lite.search.index import build_index

    with _interruptible("what is indexed is kept, the same command goes on from there"):
        passages = build_index(corpus, out, threads, words=words, progress=RichTasks(), say=_say)
    _say(f"indexed {passages:,} passage{'' if passages == 1 else 's'}")
    typer.echo(str(out))


@app.command("serve-search", epilog="Example: searche1-lite serve-search --index my-index")
def serve_search_command(
    overrides: args.Overrides = None,
    index: Annotated[
        str | None, typer.Option(help="The index: its folder, wiki-18, or one of Pyserini's names; search.index.")
    ] = None,
    preset: args.Preset = None,
    config: args.ConfigFile = None,
    host: args.Host = "127.0.0.1",
    port: args.Port = 8000,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Processes over the same index, each with a Java of its own and one thread that searches.",
        ),
    ] = 1,
    token: args.Token = None,
    yes: args.Yes = False,
) -> None:
    """Serve a search engine, as Search-R1 does: POST /retrieve."""
    from searche1_lite.cli import api
    from searche1_lite.config import load_config

    given = {"search.index": index} if index else {}
    settings = load_config(preset, config, overrides or [], before=given)
    with _interruptible():
        api.serve_search(settings, host=host, port=port, workers=workers, token=token, **_terminal(yes))


@app.command(epilog="Example: searche1-lite doctor --gpu-gb 12")
def doctor(
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(min=1, help="Plan for a card of this size, in GiB, with bf16, not the one here."),
    ] = None,
    as_json: args.AsJson = False,
) -> None:
    """What this machine has, and whether a configuration fits it."""
    settings, _ = _settings(preset, config, overrides, gpu_gib=gpu_gb, smallest=True)
    quieten()
    from searche1_lite.bench.doctor import examine

    found = examine(settings, gpu_gb)
    from searche1_lite.cli.tables import doctor_tables

    _show(found, as_json, doctor_tables)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command("config", epilog="Example: searche1-lite config --preset demo grpo")
def config_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="A section or setting to tell of, such as grpo or grpo.steps; none: all. And values over those of the "
            "preset and the file, such as grpo.steps=20.",
            metavar="[SECTION] [KEY=VALUE]",
        ),
    ] = None,
    preset: args.Preset = None,
    config: args.ConfigFile = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML that --config reads, not tables.")] = False,
) -> None:
    """Every setting: its value, what it may be, and what it means.

    Without --preset and --config, the defaults.
    """
    from searche1_lite.config import load_config
    from searche1_lite.config.listing import as_commented_yaml, list_settings

    settings = load_config(preset, config, [word for word in words or [] if "=" in word])
    found = list_settings(settings, [word for word in words or [] if "=" not in word])
    if as_yaml:
        typer.echo(as_commented_yaml(found), nl=False)
        return
    from searche1_lite.cli.tables import settings_tables

    _show({"sections": found}, False, settings_tables)


@app.command(epilog="Example: searche1-lite bench --quick --json")
def bench(
    overrides: args.Overrides = None,
    preset: args.Preset = None,
    config: args.ConfigFile = None,
    cap_gb: Annotated[
        float | None, typer.Option(min=1, help="On a GPU, the most memory to allocate, in 10^9 bytes.")
    ] = None,
    part: args.Part = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two, for rougher figures.")] = False,
    as_json: args.AsJson = False,
) -> None:
    """Measure this machine beside baselines, or a preset's peak memory."""
    from searche1_lite.bench import bench as run_bench
    from searche1_lite.bench import check_parts
    from searche1_lite.config import load_config

    check_parts(part or ())
    settings = load_config(preset, config, overrides or []) if preset or config or overrides else None
    quieten()
    found = run_bench(settings, cap_gb, on_part=_say, parts=part or (), quick=quick)
    from searche1_lite.cli.tables import bench_tables

    _show(found, as_json, bench_tables)


@app.command(epilog="Example: searche1-lite sweep examples/settle-it.yaml --out runs/settle-it")
def sweep(
    file: args.SweepFile,
    overrides: args.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder. Default: runs/NAME-OF-FILE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,2,3, in the place of the file's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is in --out.")] = False,
    as_json: args.AsJson = False,
    yes: args.Yes = False,
) -> None:
    """Compare variants over seeds."""
    from searche1_lite.cli import api
    from searche1_lite.evaluate.sweep.plan import parse_seeds, sweep_name

    given = parse_seeds(seeds) if seeds is not None else []
    folder = out or Path("runs") / sweep_name(file)
    with _interruptible(f"what was done is kept, go on with --resume --out {folder}"):
        result = api.run_sweep(
            file, folder, overrides=overrides or [], seeds=given, jobs=jobs, resume=resume, quiet=True, **_terminal(yes)
        )
    from searche1_lite.cli.tables import sweep_table

    _show(result, as_json, sweep_table)
    _say(f"sweep: {folder}")
    _write_report(folder)
    if any(run["state"] == "failed" for row in result["variants"] for run in row["runs"]):
        raise typer.Exit(1)


@app.command(epilog="Example: searche1-lite report runs/demo")
def report(
    folder: Annotated[Path, typer.Argument(help="A run's or a sweep's folder, such as runs/demo.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option(help="The HTML file. Default: DIR/report.html.")] = None,
    runs: Annotated[bool, typer.Option("--runs", help="For a sweep, write the reports of its runs too.")] = False,
) -> None:
    """Write the HTML report of a run or a sweep, also while it goes on."""
    from searche1_lite.report import write_report

    typer.echo(str(write_report(folder, out, runs)))


@app.command(epilog="Example: searche1-lite export runs/demo --to my-agent --merge")
def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo, or an adapter's.", metavar="DIR")],
    to: Annotated[Path, typer.Option(help="Where it goes; must be empty or not there.")],
    stage: args.Stage = None,
    merge: Annotated[bool, typer.Option("--merge", help="One bf16 model, instead of an adapter.")] = False,
    push: Annotated[str | None, typer.Option(help="Also upload it to the hub, as owner/name.", metavar="REPO")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is not private.")] = False,
    as_json: args.AsJson = False,
) -> None:
    """Export what was trained, for other programs."""
    from searche1_lite.serve.export import export_policy

    result = export_policy(folder, to, stage=stage, merge=merge, push=push, public=public, quiet=True, say=_say)
    typer.echo(json.dumps(result) if as_json else result["address"] or result["folder"])


def _settings(
    preset: str | None, config: Path | None, overrides: list[str] | None, **gpu: Any
) -> "tuple[Config, str | None]":
    """The settings and the preset's name; with neither preset nor file, `config_for_gpu`."""
    if preset or config:
        from searche1_lite.config import load_config

        return load_config(preset, config, overrides or []), preset
    from searche1_lite.cli.api import config_for_gpu

    return config_for_gpu(overrides or [], say=_say, **gpu)


def _terminal(yes: bool) -> dict[str, Any]:
    """How whoever sits there is told of the work, and asked before large downloads."""
    from searche1_lite.runtime.console import RichTasks

    return {"yes": _confirmation(yes), "progress": RichTasks(), "say": _say}


def _confirmation(yes: bool) -> Callable[[str], bool]:
    """What asks before a large download, on stderr; with `yes` it agrees unasked.

    The function it gives raises UserError where nobody can be asked, because stdin or stderr is no terminal.
    """

    def confirm(what: str) -> bool:
        if yes:
            return True
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UserError(f"{what}; add --yes to agree", exit_code=1)
        print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return confirm


@contextmanager
def _interruptible(kept: str = "") -> Iterator[None]:
    """Within, Ctrl-C ends the command with a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        _say(f"interrupted; {kept}" if kept else "interrupted")
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    except BrokenPipeError:  # whoever read the answers has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _show(found: dict[str, Any], as_json: bool, tables: Callable[[dict[str, Any]], Any]) -> None:
    """On stdout: one JSON object, or the table, or list of tables and lines, that `tables` makes of it."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    parts = tables(found)
    for part in parts if isinstance(parts, list) else [parts]:
        Console().print(part)


def _say(line: str) -> None:
    from searche1_lite.runtime.ranks import is_first

    if is_first():  # of several processes
        typer.echo(line, err=True)


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


def main() -> None:
    """The console script: one line for what the user can mend, a traceback only with SEARCHE1_LITE_DEBUG=1."""
    if "LOCAL_RANK" not in os.environ:
        # With several cards in sight TRL would spread batches over them; a run is for one, and this says which.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.platform == "linux":
        # Steps, and the buckets of the KV cache, differ in size; without this, the memory that one leaves behind is in
        # pieces too small for the next.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        app()
    except Exception as error:
        found = explain(error)
        if found is None or os.environ.get("SEARCHE1_LITE_DEBUG"):
            raise
        message, exit_code = found
        if isinstance(error, UserError) and error.reported_elsewhere:
            from searche1_lite.runtime.ranks import let_the_reporter_exit_first

            let_the_reporter_exit_first()
        else:
            from searche1_lite.runtime.ranks import place

            print(f"error: {place()}{' '.join(message.split())}", file=sys.stderr)
        sys.exit(exit_code)
