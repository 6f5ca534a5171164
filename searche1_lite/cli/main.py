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
from searche1_lite.runtime.errors import UserError, explain, first_line
from searche1_lite.runtime.gpu import set_cuda_defaults
from searche1_lite.runtime.progress import say_on_stderr as _say
from searche1_lite.runtime.quiet import quieten

if TYPE_CHECKING:
    from searche1_lite.cli.api import Interaction
    from searche1_lite.config import Config

app = typer.Typer(
    help="A search agent that improves itself: GRPO and offline self-distillation over one LoRA adapter.\n\n"
    "Example: searche1-lite train --preset demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
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
    resume: args.Resume = False,
    yes: args.Yes = False,
) -> None:
    """Train: rounds of GRPO and OFSD."""
    if resume and out and not (preset or config or overrides) and (out / "config.yaml").is_file():
        config = out / "config.yaml"  # the run's own settings
    settings, preset = _settings(preset, config, overrides)
    folder = out or Path("runs") / (preset or (config.stem.strip(".") if config else "") or "default")
    from searche1_lite.cli import api
    from searche1_lite.runtime.interrupt import Interrupted
    from searche1_lite.runtime.ranks import is_first, leave

    def kept(error: BaseException) -> str:
        if not (folder / "config.yaml").is_file():
            return "before the first stage; start again with the same command"
        # Only an `Interrupted` leaves time to save the steps of the stage.
        work = "finished work" if isinstance(error, Interrupted) else "the last save"
        return f"{work} is kept, continue with --resume --out {folder}"

    with _interruptible(kept):
        summary = api.train_policy(settings, folder, resume=resume, interaction=_terminal(yes))
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
    out: Annotated[Path | None, typer.Option(help="Keep answers and metrics in this folder.")] = None,
    resume: args.Resume = False,
    as_json: args.AsJson = False,
    yes: args.Yes = False,
) -> None:
    """Evaluate an adapter, greedily."""
    if resume and not out:
        raise UserError("--resume continues what is in a folder; name it with --out")
    settings, _ = _settings(preset, config, overrides)
    from searche1_lite.cli import api

    kept = "answers are kept; continue with the same command and --resume" if out else "nothing is kept without --out"
    with _interruptible(lambda error: kept):
        result = api.evaluate_policy(
            settings, adapter=adapter, data=data, limit=limit, method=method, out=out, resume=resume,
            interaction=_terminal(yes),
        )  # fmt: skip
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
            help="The question. Without it: a session at a terminal, or questions from a pipe, one a line, answered as "
            "JSON lines."
        ),
    ] = None,
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    adapter: args.Adapter = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base's answer beside the adapter's.")] = False,
    show_trace: Annotated[
        bool, typer.Option("--show-trace", help="On stderr, everything written and found, as it comes.")
    ] = False,
    as_json: args.AsJson = False,
    web: Annotated[
        bool, typer.Option("--web", help="A page in the browser, with all of a session's functions.", **args.SERVER)
    ] = False,
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
    from searche1_lite.train.run_folder import check_adapter_folder

    session = question is None and sys.stdin.isatty()
    if question is not None:
        question = check_question(question, settings.protocol)
    elif show_trace:
        raise UserError("--show-trace is for one question; give it")
    if adapter:
        check_adapter_folder(adapter)
    elif compare:
        raise UserError("--compare shows an adapter beside the base; name one with --adapter")
    if web:
        if question is not None or compare or show_trace or as_json:
            raise UserError("--web takes its questions on the page, which also compares; leave the other options out")
        with _interruptible():
            api.serve_page(settings, adapter, host=host, port=port, token=token, interaction=_terminal(yes))
        return
    if session and (as_json or compare or not sys.stdout.isatty()):
        raise UserError("a session is for a terminal and takes neither --json nor --compare; give a question or a pipe")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the encoding lacks must not end the command
    lines = None
    if question is None and not session:
        from searche1_lite.cli.pipe import QuestionLines

        # A file object of its own: sys.stdin cannot be closed at exit while a thread reads it.
        lines = QuestionLines(os.fdopen(os.dup(sys.stdin.fileno()), "rb"), settings.engine.batch_size)
    answered = True
    with _interruptible():
        if lines is not None and not lines.wait():
            raise UserError("there is no question: neither as an argument nor on stdin; give one, or one a line")
        asker = api.open_asker(settings, adapter, interaction=_terminal(yes))
        if question is not None:
            from searche1_lite.serve.answer_view import show_one

            answered = show_one(asker, question, compare, show_trace, as_json)
        elif lines is not None:
            from searche1_lite.cli.pipe import answer_lines

            for answer in answer_lines(asker, lines, compare):
                print(json.dumps(answer.to_dict()), flush=True)
                answered = answered and answer.answered
        else:
            from searche1_lite.cli.chat import Chat, open_history
            from searche1_lite.search.index import cache_folder
            from searche1_lite.serve.answer_view import plain_console

            Chat(asker, plain_console(), open_history(cache_folder() / "ask_history")).run()
    raise typer.Exit(0 if answered else 3)


@app.command(epilog="Example: searche1-lite index docs.jsonl --out my-index")
def index(
    corpus: Annotated[
        Path,
        typer.Argument(
            help="JSONL (.gz too) with `id` and `contents`, whose first line is the title; or a folder of .txt and .md."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The index's folder; must not exist.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads that index.")] = 2,
    words: Annotated[int, typer.Option(min=1, help="Approximate words per passage of a text file.")] = 100,
) -> None:
    """Build a BM25 index of your own corpus."""
    from searche1_lite.runtime.console import RichTasks
    from searche1_lite.search.index import build_index

    with _interruptible(lambda error: "indexed passages are kept, continue with the same command"):
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
            min=1, max=64, help="Processes over the same index, each with its own Java and one search thread."
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
        api.serve_search(settings, host=host, port=port, workers=workers, token=token, interaction=_terminal(yes))


@app.command(epilog="Example: searche1-lite doctor --gpu-gb 12")
def doctor(
    overrides: args.Overrides = None,
    preset: args.PresetOrGpu = None,
    config: args.ConfigFile = None,
    gpu_gb: Annotated[
        float | None,
        typer.Option(min=1, help="Plan for a card of this size, in GiB, with bf16, instead of the one here."),
    ] = None,
    as_json: args.AsJson = False,
) -> None:
    """Check this machine, and whether a configuration fits it."""
    settings, _ = _settings(preset, config, overrides, gpu_gib=gpu_gb, smallest=True)
    quieten()
    from searche1_lite.bench.doctor import examine
    from searche1_lite.cli.tables import doctor_tables

    found = examine(settings, gpu_gb)
    _show(found, as_json, doctor_tables)
    raise typer.Exit(0 if found["ok"] else 1)


@app.command("config", epilog="Example: searche1-lite config --preset demo grpo")
def config_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="A section or setting to show, such as grpo or grpo.steps; none: all. And values over those of the "
            "preset and the file, such as grpo.steps=20.",
            metavar="[SECTION] [KEY=VALUE]",
        ),
    ] = None,
    preset: args.Preset = None,
    config: args.ConfigFile = None,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML that --config reads, instead of tables.")] = False,
) -> None:
    """Every setting: its value, its type or choices, and its meaning.

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
    part: args.Parts = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two, for less precise results.")] = False,
    as_json: args.AsJson = False,
) -> None:
    """Measure this machine beside baselines, or a preset's peak memory."""
    from searche1_lite.bench import check_parts, run_bench
    from searche1_lite.config import load_config

    check_parts(part or ())
    settings = load_config(preset, config, overrides or []) if preset or config or overrides else None
    quieten()
    from searche1_lite.cli.tables import bench_tables

    _show(run_bench(settings, cap_gb, on_part=_say, parts=part or (), quick=quick), as_json, bench_tables)


@app.command(epilog="Example: searche1-lite sweep examples/settle-it.yaml --out runs/settle-it")
def sweep(
    file: args.SweepFile,
    overrides: args.Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder. Default: runs/NAME-OF-FILE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,2,3, instead of the file's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    resume: args.Resume = False,
    as_json: args.AsJson = False,
    yes: args.Yes = False,
) -> None:
    """Compare variants over seeds."""
    from searche1_lite.cli import api
    from searche1_lite.evaluate.sweep.plan import parse_seeds, sweep_name

    given = parse_seeds(seeds) if seeds is not None else []
    folder = out or Path("runs") / sweep_name(file)
    with _interruptible(lambda error: f"finished work is kept, continue with --resume --out {folder}"):
        result = api.run_sweep(
            file, folder, overrides=overrides or [], seeds=given, jobs=jobs, resume=resume, interaction=_terminal(yes)
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
    """Write the HTML report of a run or a sweep, finished or not."""
    from searche1_lite.report import write_report

    typer.echo(str(write_report(folder, out, runs)))


@app.command(epilog="Example: searche1-lite export runs/demo --to my-agent --merge")
def export(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as runs/demo, or an adapter's.", metavar="DIR")],
    to: Annotated[Path, typer.Option(help="The folder to write; must be empty or not exist.")],
    stage: args.Stage = None,
    merge: Annotated[bool, typer.Option("--merge", help="One bf16 model, instead of an adapter.")] = False,
    push: Annotated[str | None, typer.Option(help="Also upload it to the hub, as owner/name.", metavar="REPO")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: a new repository is not private.")] = False,
    as_json: args.AsJson = False,
) -> None:
    """Export a trained adapter or model for other programs."""
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


def _terminal(yes: bool) -> "Interaction":
    """Reports and questions on stderr."""
    from searche1_lite.cli.api import Interaction
    from searche1_lite.runtime.console import RichTasks

    return Interaction(yes=lambda what: yes or _confirm(what), quiet=True, progress=RichTasks(), say=_say)


def _confirm(what: str) -> bool:
    """Asks before a large download.

    Raises:
        UserError: if stdin or stderr is not a terminal.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{what}; add --yes to agree", exit_code=1)
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


@contextmanager
def _interruptible(kept: Callable[[BaseException], str] | None = None) -> Iterator[None]:
    """Within, Ctrl-C ends the command with a line; `kept` gives what it says of the work so far."""
    try:
        yield
    except KeyboardInterrupt as error:
        _say(f"interrupted; {kept(error)}" if kept else "interrupted")
        raise typer.Exit(getattr(error, "exit_code", 130)) from None
    except BrokenPipeError:  # the reader of stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _show(found: dict[str, Any], as_json: bool, tables: Callable[[dict[str, Any]], Any]) -> None:
    """Prints one JSON object, or what `tables` makes of it, on stdout."""
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    parts = tables(found)
    for part in parts if isinstance(parts, list) else [parts]:
        Console().print(part)


def _write_report(folder: Path) -> None:
    """Writes the report of a finished run or sweep, which stays complete if that fails."""
    from searche1_lite.report import write_report

    try:
        _say(f"report: {write_report(folder)}")
    except Exception as error:
        if os.environ.get("SEARCHE1_LITE_DEBUG"):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        _say(f"the report could not be written ({reason}); all other files are; try `report {folder}`")


def main() -> None:
    """The console script: one line for an error that the user can fix; SEARCHE1_LITE_DEBUG=1 shows the traceback."""
    set_cuda_defaults()
    try:
        app()
    except Exception as error:
        found = explain(error)
        if found is None or os.environ.get("SEARCHE1_LITE_DEBUG"):
            raise
        message, exit_code = found
        from searche1_lite.runtime.ranks import let_the_reporter_exit_first, place

        if isinstance(error, UserError) and error.reported_elsewhere:
            let_the_reporter_exit_first()
        else:
            print(f"error: {place()}{' '.join(message.split())}", file=sys.stderr)
        sys.exit(exit_code)
