"""What the commands do, as functions: settings in, results out, nothing printed but what `say` and `progress` are told.

They are what `import searche1_lite` offers, beside functions that other modules have as they are. Everything heavy is
imported when one is called, and after what can be refused without it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searche1_lite.config import Config, default_preset, load_config
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT, Progress, say_on_stderr
from searche1_lite.runtime.quiet import quieten
from searche1_lite.runtime.ranks import check_single_process, fail_together, is_launched, local_main_first
from searche1_lite.train.processes import join

if TYPE_CHECKING:
    from searche1_lite.rollout.reward import Reward
    from searche1_lite.search.base import Retriever
    from searche1_lite.serve.ask import Asker

Say = Callable[[str], None]
"""Told, in a line, what the user should know."""
Agree = bool | Callable[[str], bool]
"""Whether large downloads are agreed to; or what is asked, with a line that says how large."""


def config_for_gpu(
    overrides: Sequence[str] = (),
    *,
    gpu_gib: float | None = None,
    smallest: bool = False,
    say: Say = say_on_stderr,
) -> tuple[Config, str]:
    """The settings of the preset that is made for the GPU here, and the preset's name.

    Args:
        overrides: settings over the preset's, such as `grpo.steps=20`.
        gpu_gib: for a GPU with this much memory, in GiB, in the place of the one here.
        smallest: without a GPU take the preset for the smallest one, instead of refusing.

    Raises:
        UserError: without a GPU, with one too small, or for settings that will not do.
    """
    load_config(overrides=overrides)  # faults are told before PyTorch is loaded
    if gpu_gib is None:
        import torch

        if torch.cuda.is_available():
            gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    preset = default_preset(8 if gpu_gib is None and smallest else gpu_gib)
    say(f"preset {preset}, {'by' if gpu_gib else 'without'} the size of the GPU; --preset names another")
    return load_config(preset, overrides=overrides), preset


def train_policy(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    retriever: "Retriever | None" = None,
    reward: "Reward | None" = None,
    yes: Agree = False,
    quiet: bool = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> dict[str, Any]:
    """Trains: rounds of GRPO and OFSD, as `searche1-lite train`. No report is written; `write_report` does that.

    Args:
        config: from `load_config`.
        out: the run's folder. Nothing in it is overwritten.
        resume: go on with the run that is there.
        retriever: a search engine of your own, in the place of what `config.search` names.
        reward: what GRPO rewards, in the place of exact match: a function of `Written`, the model's own words. Which
            rollouts OFSD takes for right, and all figures, stay by exact match.
        yes: agree to large downloads; or a function that is asked.
        quiet: keep libraries' notices off the terminal, see `quieten`.
        progress: told how far it is; `searche1_lite.runtime.console.RichTasks()` draws bars.

    Returns:
        The run's summary, as in its `summary.json`: `seed`, `model`, `retriever`, `reward`, `training`, `evaluation`
        and `stages`, each stage with its `name`, `em`, `em_ci95`, `searches_per_question`, `seconds` and more.

    Raises:
        UserError: for settings, data or a folder that will not do.
    """
    from searche1_lite.data.questions import load_run_questions
    from searche1_lite.train.checkpoint import RunFolder
    from searche1_lite.train.tracking import check_trackers

    check_trackers(config.logging)
    _prepare_process()
    join(config)
    with local_main_first():
        questions = load_run_questions(config, say)  # faulty files are refused before a folder is made
    with fail_together():
        folder = RunFolder(Path(out), config, resume)
        folder.claim()
    try:
        with local_main_first():
            retriever = retriever or _open(config, yes, progress, say)
        if quiet:
            quieten()
        from searche1_lite.train.rounds import run_training

        return run_training(config, folder, progress, questions, retriever=retriever, reward=reward)
    finally:
        folder.release()  # a notebook holds on to an error, and so to all that was there when it was raised


def evaluate_policy(
    config: Config,
    *,
    adapter: Path | str | None = None,
    data: str | None = None,
    limit: int | None = None,
    method: str = "agent",
    out: Path | str | None = None,
    resume: bool = False,
    retriever: "Retriever | None" = None,
    yes: Agree = False,
    quiet: bool = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> dict[str, Any]:
    """Answers questions greedily and measures how well, as `searche1-lite eval`.

    Args:
        adapter: a folder that `train` wrote, such as `runs/demo/checkpoints/round2.ofsd`; None: the bare base.
        data: a data set's name, `all`, `demo` or a JSONL file, several joined by `+`; default:
            `config.data.evaluation`.
        limit: of each data set, a seeded subset of this size; 0: all. Default: all of `data`; without `data`, what
            `train` evaluates on.
        method: `agent`, or a baseline: `rag` or `no-search`.
        out: keep answers and figures in this folder.
        resume: go on with the evaluation that is there.
        retriever: a search engine of your own, in the place of what `config.search` names.
        yes: agree to large downloads; or a function that is asked.
        quiet: keep libraries' notices off the terminal, see `quieten`.

    Returns:
        `em`, `em_ci95`, `f1`, `n`, `searches_per_question`, `no_search_rate` and more, with `method`, `retriever`,
        `model`, `adapter` and `data`.

    Raises:
        UserError: for settings, data, an adapter or a folder that will not do.
    """
    from searche1_lite.data.questions import load_questions, named, order_by_data_set
    from searche1_lite.evaluate.baselines import method_settings, parse_method, retriever_for
    from searche1_lite.train.checkpoint import check_adapter_folder

    chosen = parse_method(method)
    adapter = None if adapter is None else Path(adapter)
    if adapter:
        check_adapter_folder(adapter)
    name = named(data or config.data.evaluation, "data.evaluation (or --data)")
    if data is None and limit is None:
        questions = load_questions(name, "test", config.data.evaluation_limit, config.seed, say)
    else:
        questions = load_questions(name, "test", limit or 0, config.seed, say, limit_each=True)
    questions = order_by_data_set(questions)
    folder = None
    if out is not None:
        from searche1_lite.evaluate.evaluation_folder import EvaluationFolder, describe

        asked = describe(chosen, adapter, name, questions)
        own = {"retriever": retriever and retriever.name}
        folder = EvaluationFolder(Path(out), config, asked | own, questions, resume)
        if (kept := folder.result()) is not None:
            return kept
    _prepare_process("an evaluation")
    retriever = retriever_for(chosen) or retriever or _open(config, yes, progress, say)
    if quiet:
        quieten()
    from searche1_lite.evaluate.evaluation import run_evaluation
    from searche1_lite.search.base import fingerprint_of
    from searche1_lite.train.session import Session

    work = Session(method_settings(config, chosen), progress, adapter, retriever)
    if folder:
        folder.searches(fingerprint_of(work.retriever))
    result = run_evaluation(work, questions, chosen, folder) | {
        "method": chosen,
        "retriever": None if chosen == "no-search" else work.retriever.name,
        "model": config.model.name,
        "adapter": str(adapter) if adapter else None,
        "data": name,
    }
    if folder:
        folder.finish(result)
    return result


def open_asker(
    config: Config,
    adapter: Path | str | None = None,
    *,
    retriever: "Retriever | None" = None,
    yes: Agree = False,
    quiet: bool = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> "Asker":
    """The policy in memory, to be asked: `open_asker(config, folder).answer("...").answer`, as `searche1-lite ask`.

    Args:
        adapter: a folder that `train` wrote; None: the bare base.
        retriever: a search engine of your own, in the place of what `config.search` names.
        yes: agree to large downloads; or a function that is asked.
        quiet: keep libraries' notices off the terminal, see `quieten`.
        progress: told how far a download or an index is; answers are quick, and tell nothing.

    Raises:
        UserError: for settings or an adapter that will not do.
    """
    from searche1_lite.search.catalog import describe_source
    from searche1_lite.train.checkpoint import check_adapter_folder

    adapter = None if adapter is None else Path(adapter)
    if adapter:
        check_adapter_folder(adapter)
    _prepare_process("asking")

    def open_search() -> "Retriever":
        return retriever or _open(config, yes, progress, say)

    # Java and the index are opened while the model is loaded; what has to be fetched first is asked about before.
    at_hand = "ok" if retriever else describe_source(config.search)[0]
    with ThreadPoolExecutor(1, "open-search") as side:
        opened = side.submit(open_search) if at_hand == "ok" else open_search()
        if quiet:
            quieten()
        from searche1_lite.serve.ask import Asker
        from searche1_lite.train.session import Session

        return Asker(Session(config, SILENT, adapter, opened), adapter)


def serve_page(
    config: Config,
    adapter: Path | str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8642,
    token: str | None = None,
    retriever: "Retriever | None" = None,
    yes: Agree = False,
    quiet: bool = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> None:
    """Serves the page of `searche1-lite ask --web` until Ctrl-C or SIGTERM.

    Args:
        adapter, retriever, yes, quiet, progress, say: see `open_asker`.
        host: the address to be reached at; beyond this machine only with a token.
        port: 0: a free one.
        token: what the page asks for; default: what SEARCHE1_LITE_TOKEN says.

    Raises:
        UserError: for settings, an adapter, an address or a token that will not do.
    """
    from searche1_lite.serve.guards import find_token, listen

    place = listen(host, port, find_token(token))  # before the model is loaded, in which time it is not answered yet
    asker = open_asker(config, adapter, retriever=retriever, yes=yes, quiet=quiet, progress=progress, say=say)
    from searche1_lite.serve.web.app import serve_page as serve

    serve(asker, place)


def serve_search(
    config: Config,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    token: str | None = None,
    yes: Agree = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> None:
    """Serves what `config.search` names, as `searche1-lite serve-search`, until Ctrl-C or SIGTERM.

    Args:
        host: the address to be reached at; beyond this machine only with a token.
        port: 0: a free one.
        workers: processes over the same index, each with a Java machine of its own.
        token: what clients have to show; default: what SEARCHE1_LITE_TOKEN says.
        yes: agree to large downloads; or a function that is asked.

    Raises:
        UserError: for settings, an index, an address or a token that will not do.
    """
    from searche1_lite.serve.guards import find_token, listen

    place = listen(host, port, find_token(token))  # what is wrong with it is told before the index is opened
    from searche1_lite.search.catalog import describe_source
    from searche1_lite.serve.search_workers import serve_search as serve

    search = config.search
    ready = search.url is not None or (search.index is not None and describe_source(search)[0] == "ok")
    if not ready:  # it is built or fetched here, once, with progress
        _open(config, yes, progress, say)
    serve(search, place, workers)


def run_sweep(
    file: Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    resume: bool = False,
    yes: Agree = False,
    quiet: bool = False,
    progress: Progress = SILENT,
    say: Say = say_on_stderr,
) -> dict[str, Any]:
    """Compares variants over seeds, as `searche1-lite sweep`. No report is written; `write_report` does that.

    Each run is in a process of its own that imports the caller's script: it needs `if __name__ == "__main__":`.

    Args:
        file: a YAML file of variants and seeds, such as `examples/settle-it.yaml`.
        out: the sweep's folder; default: `runs/NAME-OF-FILE`.
        overrides: settings of all variants, such as `grpo.steps=4`.
        seeds: in the place of the file's.
        jobs: runs at the same time.
        resume: go on with the sweep that is there.
        yes: agree to large downloads; or a function that is asked.
        quiet: keep libraries' notices off the terminal, see `quieten`.

    Returns:
        What `sweep.json` holds: `name`, `baseline`, `seeds`, and `variants` with their figures, differences and runs.

    Raises:
        UserError: for a file, settings, data or a folder that will not do. A run that fails does not end the others:
            its `state` is `failed`.
    """
    from searche1_lite.data.questions import load_run_questions
    from searche1_lite.evaluate.sweep.plan import load_plan
    from searche1_lite.train.tracking import check_trackers

    plan = load_plan(Path(file), overrides, seeds)
    _prepare_process("a sweep")
    # Faults that all runs have in common are told once, and what they download is fetched once.
    for alike in {repr((run.config.data, run.config.grpo)): run.config for run in plan.runs}.values():
        load_run_questions(alike, say)
    for logging in {repr(run.config.logging): run.config.logging for run in plan.runs}.values():
        check_trackers(logging)
    for alike in {repr(run.config.search): run.config for run in plan.runs}.values():
        _open(alike, yes, progress, say)
    if quiet:
        quieten()
    from searche1_lite.evaluate.sweep.runs import check_room
    from searche1_lite.evaluate.sweep.runs import run_sweep as run_plan

    check_room(plan, jobs)
    return run_plan(plan, Path(out) if out is not None else Path("runs") / plan.name, jobs, say, resume)


def _open(config: Config, yes: Agree, progress: Progress, say: Say) -> "Retriever":
    from searche1_lite.search.catalog import needs_yes, open_retriever

    def agree(what: str) -> bool:
        say(what)
        return True

    confirm = yes if callable(yes) else agree if yes else needs_yes
    return open_retriever(config.search, confirm=confirm, progress=progress, say=say)


def _prepare_process(alone: str | None = None) -> None:
    """What has to be so before PyTorch looks at the GPUs; refuses several of them for one process.

    With several in sight TRL would spread batches over them.

    Args:
        alone: what is done, if it is not for several processes.
    """
    launched = is_launched()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "," in os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if several and not launched:
        raise UserError(
            "a run is for one GPU; set CUDA_VISIBLE_DEVICES to one of them, or start a process for each with "
            "`accelerate launch -m searche1_lite train ...`"
        )
    if alone is not None:
        check_single_process(alone)
    if sys.platform == "linux":
        # Steps, and the buckets of the KV cache, differ in size; without this, the memory that one leaves behind is in
        # pieces too small for the next.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if launched:
        return  # each process has a GPU of its own
    if "torch" not in sys.modules:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        return
    import torch

    if torch.cuda.device_count() > 1:
        raise UserError("a run is for one GPU, and several are in sight; set CUDA_VISIBLE_DEVICES to one of them first")
