"""The commands as functions: settings in, results out; nothing is printed except through an `Interaction`.

`import searche1_lite` offers them. Heavy modules are imported when a function is called, after all checks that do not
need them.

Arguments that functions share:
    config: from `load_config`.
    adapter: a folder that `train` wrote, such as `runs/demo/checkpoints/round2.ofsd`; None: the base model alone.
    retriever: your own search engine, used in place of the one in `config.search`.
    out, resume: the output folder, in which nothing is overwritten; `resume` continues what it holds.
    host, port, token: see `searche1_lite.serve.place.listen`. Port 0: any free one. An address other than this machine
        needs a token, by default that of the environment variable SEARCHE1_LITE_TOKEN.

All raise `UserError` for unusable settings, data, adapters, folders and addresses.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searche1_lite.config import Config, default_preset, load_config
from searche1_lite.runtime.gpu import use_one_gpu
from searche1_lite.runtime.progress import SILENT, Progress, say_on_stderr
from searche1_lite.runtime.quiet import quieten
from searche1_lite.runtime.ranks import check_single_process, fail_together, local_main_first

if TYPE_CHECKING:
    from searche1_lite.rollout.reward import Reward
    from searche1_lite.search.base import Retriever
    from searche1_lite.serve.ask import Asker

Say = Callable[[str], None]
"""Receives one-line notices for the user."""


@dataclass(frozen=True)
class Interaction:
    """How a function reports to its caller and asks for consent."""

    yes: bool | Callable[[str], bool] = False
    """Consent to large downloads; or a function that gets a line with the size and returns the consent."""
    quiet: bool = False
    """Hide libraries' notices, see `quieten`."""
    progress: Progress = SILENT
    """Receives the progress; `searche1_lite.runtime.console.RichTasks()` draws bars."""
    say: Say = say_on_stderr

    def confirm(self, what: str) -> bool:
        """Whether the download described by `what` may start; refused with a `UserError` without consent."""
        if callable(self.yes):
            return self.yes(what)
        if self.yes:
            self.say(what)
            return True
        from searche1_lite.search.catalog import needs_yes

        return needs_yes(what)

    def open_retriever(self, config: Config) -> "Retriever":
        """The search engine of `config.search`; its index is built or downloaded first if necessary."""
        from searche1_lite.search.catalog import open_retriever

        return open_retriever(config.search, confirm=self.confirm, progress=self.progress, say=self.say)


_DEFAULT = Interaction()


def config_for_gpu(
    overrides: Sequence[str] = (),
    *,
    gpu_gib: float | None = None,
    smallest: bool = False,
    say: Say = say_on_stderr,
) -> tuple[Config, str]:
    """The settings of the preset for this machine's GPU, and the preset's name.

    Args:
        overrides: settings over the preset's, such as `grpo.steps=20`.
        gpu_gib: memory of the GPU to choose for, in GiB, instead of the one here.
        smallest: without a GPU use the preset for the smallest one, instead of raising `UserError`.
    """
    load_config(overrides=overrides)  # reports errors before PyTorch is loaded
    if gpu_gib is None:
        import torch

        if torch.cuda.is_available():
            gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    preset = default_preset(8 if gpu_gib is None and smallest else gpu_gib)
    say(f"preset {preset}, {'by the size of the GPU' if gpu_gib else 'without a GPU'}; --preset names another")
    return load_config(preset, overrides=overrides), preset


def train_policy(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    retriever: "Retriever | None" = None,
    reward: "Reward | None" = None,
    interaction: Interaction = _DEFAULT,
) -> dict[str, Any]:
    """Trains: rounds of GRPO and OFSD, as `searche1-lite train`, but without writing the report (see `write_report`).

    Args:
        reward: GRPO's reward instead of exact match: a function of `Written`, the model's own words. The rollouts that
            OFSD takes as correct, and all metrics, still use exact match.

    Returns:
        The content of the run's `summary.json`: `seed`, `model`, `retriever`, `reward`, `training`, `evaluation` and
        `stages`, each stage with its `name`, `em`, `em_ci95`, `searches_per_question`, `seconds` and more.
    """
    from searche1_lite.data.questions import load_run_questions
    from searche1_lite.train.processes import join
    from searche1_lite.train.run_folder import RunFolder
    from searche1_lite.train.tracking import check_trackers

    check_trackers(config.logging)
    use_one_gpu()
    join(config)
    with local_main_first():
        questions = load_run_questions(config, interaction.say)  # before a folder is made
    with fail_together():
        folder = RunFolder(Path(out), config, resume)
        folder.claim()
    try:
        with local_main_first():
            retriever = retriever or interaction.open_retriever(config)
        if interaction.quiet:
            quieten()
        from searche1_lite.train.rounds import run_training

        return run_training(config, folder, interaction.progress, questions, retriever=retriever, reward=reward)
    finally:
        folder.release()  # a notebook keeps an error, and with it everything that its frames refer to


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
    interaction: Interaction = _DEFAULT,
) -> dict[str, Any]:
    """Answers questions greedily and scores the answers, as `searche1-lite eval`.

    Args:
        data: a data set's name, `all`, `demo` or a JSONL file, several joined by `+`; default:
            `config.data.evaluation`.
        limit: size of a seeded subset of each data set; 0: all. Default: all of `data`; without `data`, what `train`
            evaluates on.
        method: `agent`, or a baseline: `rag` or `no-search`.

    Returns:
        `em`, `em_ci95`, `f1`, `n`, `searches_per_question`, `no_search_rate` and more, with `method`, `retriever`,
        `model`, `adapter` and `data`.
    """
    from searche1_lite.data.questions import load_questions, named, order_by_data_set
    from searche1_lite.evaluate.baselines import method_settings, parse_method, retriever_for

    chosen = parse_method(method)
    adapter = _checked_adapter(adapter)
    name = named(data or config.data.evaluation, "data.evaluation (or --data)")
    if data is None and limit is None:
        questions = load_questions(name, "test", config.data.evaluation_limit, config.seed, interaction.say)
    else:
        questions = load_questions(name, "test", limit or 0, config.seed, interaction.say, limit_each=True)
    questions = order_by_data_set(questions)
    folder = None
    if out is not None:
        from searche1_lite.evaluate.saved import EvaluationFolder, describe

        asked = describe(chosen, adapter, name, questions) | {"retriever": retriever and retriever.name}
        folder = EvaluationFolder(Path(out), config, asked, questions, resume)
        if (kept := folder.result()) is not None:
            return kept
    use_one_gpu()
    check_single_process("an evaluation")
    retriever = retriever_for(chosen) or retriever or interaction.open_retriever(config)
    if interaction.quiet:
        quieten()
    from searche1_lite.evaluate.run import run_evaluation
    from searche1_lite.search.base import fingerprint_of
    from searche1_lite.train.session import Session

    work = Session(method_settings(config, chosen), interaction.progress, adapter, retriever)
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
    interaction: Interaction = _DEFAULT,
) -> "Asker":
    """Loads the policy to answer questions, as `searche1-lite ask`: `open_asker(...).answer("...").answer`."""
    from searche1_lite.search.catalog import describe_source

    adapter = _checked_adapter(adapter)
    use_one_gpu()
    check_single_process("asking")

    def open_search() -> "Retriever":
        return retriever or interaction.open_retriever(config)

    # Java and the index open while the model loads; a download needs the user's consent first.
    ready = retriever is not None or describe_source(config.search)[0] == "ok"
    with ThreadPoolExecutor(1, "open-search") as side:
        opened = side.submit(open_search) if ready else open_search()
        if interaction.quiet:
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
    interaction: Interaction = _DEFAULT,
) -> None:
    """Serves the page of `searche1-lite ask --web` until Ctrl-C or SIGTERM."""
    from searche1_lite.serve.place import find_token, listen

    place = listen(host, port, find_token(token))  # before the model is loaded
    asker = open_asker(config, adapter, retriever=retriever, interaction=interaction)
    from searche1_lite.serve.web.app import serve_page as serve

    serve(asker, place)


def serve_search(
    config: Config,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    token: str | None = None,
    interaction: Interaction = _DEFAULT,
) -> None:
    """Serves the search engine of `config.search`, as `searche1-lite serve-search`, until Ctrl-C or SIGTERM.

    Args:
        workers: processes over the same index, each with its own Java machine.
    """
    from searche1_lite.search.catalog import describe_source
    from searche1_lite.serve.place import find_token, listen

    place = listen(host, port, find_token(token))  # before the index is opened
    from searche1_lite.serve.search_server import serve_search as serve

    search = config.search
    if search.url is None and (search.index is None or describe_source(search)[0] != "ok"):
        interaction.open_retriever(config)  # builds or downloads the index once, with progress
    serve(search, place, workers)


def run_sweep(
    file: Path | str,
    out: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    resume: bool = False,
    interaction: Interaction = _DEFAULT,
) -> dict[str, Any]:
    """Compares variants over seeds, as `searche1-lite sweep`, but without writing the report (see `write_report`).

    Each run has its own process, which imports the caller's script: it needs `if __name__ == "__main__":`.

    Args:
        file: a YAML file of variants and seeds, such as `examples/settle-it.yaml`.
        out: the sweep's folder; default: `runs/NAME-OF-FILE`.
        overrides: settings of all variants, such as `grpo.steps=4`.
        seeds: instead of the file's.
        jobs: number of runs at the same time.

    Returns:
        The content of `sweep.json`: `name`, `baseline`, `seeds`, and `variants` with their metrics, differences and
        runs. A run that fails does not end the others: its `state` is `failed`.
    """
    from searche1_lite.data.questions import load_run_questions
    from searche1_lite.evaluate.sweep.plan import load_plan
    from searche1_lite.train.tracking import check_trackers

    plan = load_plan(Path(file), overrides, seeds)
    use_one_gpu()
    check_single_process("a sweep")

    def distinct(*sections: str) -> list[Config]:
        """One of the runs' settings for each combination of values in these sections."""
        configs = [run.config for run in plan.runs]
        return list({repr([getattr(config, name) for name in sections]): config for config in configs}.values())

    # Errors that runs share are reported once, and shared files are downloaded once.
    for config in distinct("data", "grpo"):
        load_run_questions(config, interaction.say)
    for config in distinct("logging"):
        check_trackers(config.logging)
    for config in distinct("search"):
        interaction.open_retriever(config)
    if interaction.quiet:
        quieten()
    from searche1_lite.evaluate.sweep.runs import check_room
    from searche1_lite.evaluate.sweep.runs import run_sweep as run_plan

    check_room(plan, jobs)
    folder = Path(out) if out is not None else Path("runs") / plan.name
    return run_plan(plan, folder, jobs, interaction.say, resume)


def _checked_adapter(adapter: Path | str | None) -> Path | None:
    if adapter is None:
        return None
    from searche1_lite.train.run_folder import check_adapter_folder

    check_adapter_folder(Path(adapter))
    return Path(adapter)
