"""searche1-lite: a search agent that improves itself, on one consumer GPU.

GRPO and offline self-distillation (OFSD) in turn update one LoRA adapter over a 4-bit base model; the search engine is
BM25 through Pyserini. Importing this package is instant: nothing heavy is loaded until something is called.

    import searche1_lite as s1

    config = s1.load_config("demo")
    summary = s1.train_policy(config, "runs/demo")
    asker = s1.open_asker(config, "runs/demo/checkpoints/round2.ofsd")
    print(asker.answer("What is the mayor of Port Mitu?").answer)

Whatever the command line does is here: `train_policy` (train), `evaluate_policy` (eval), `open_asker` (ask),
`run_sweep`, `serve_page` (ask --web), `build_index`, `serve_search`, `write_report`, `export_policy`, `examine`
(doctor), `run_bench`, and `config_for_gpu` (without --preset). Mistakes that the caller can mend are `UserError`s.
"""

import os
from typing import TYPE_CHECKING, Any

# Training is nobody else's business: TRL would tell the hub of every trainer that is made.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from searche1_lite.bench import bench as run_bench
    from searche1_lite.bench.doctor import examine
    from searche1_lite.cli.api import (
        config_for_gpu,
        evaluate_policy,
        open_asker,
        run_sweep,
        serve_page,
        serve_search,
        train_policy,
    )
    from searche1_lite.config import Config, load_config
    from searche1_lite.data.trajectory import Passage, Question, Trajectory
    from searche1_lite.report import write_report
    from searche1_lite.rollout.reward import Reward, Written
    from searche1_lite.runtime.errors import UserError
    from searche1_lite.runtime.quiet import quieten
    from searche1_lite.search.base import Retriever
    from searche1_lite.search.index import build_index
    from searche1_lite.serve.ask import Answer, Asker
    from searche1_lite.serve.export import export_policy

__all__ = [
    "Answer",
    "Asker",
    "Config",
    "Passage",
    "Question",
    "Retriever",
    "Reward",
    "Trajectory",
    "UserError",
    "Written",
    "build_index",
    "config_for_gpu",
    "evaluate_policy",
    "examine",
    "export_policy",
    "load_config",
    "open_asker",
    "quieten",
    "run_bench",
    "run_sweep",
    "serve_page",
    "serve_search",
    "train_policy",
    "write_report",
]

_MODULES = {
    "Answer": "serve.ask",
    "Asker": "serve.ask",
    "Config": "config",
    "Passage": "data.trajectory",
    "Question": "data.trajectory",
    "Retriever": "search.base",
    "Reward": "rollout.reward",
    "Trajectory": "data.trajectory",
    "UserError": "runtime.errors",
    "Written": "rollout.reward",
    "build_index": "search.index",
    "config_for_gpu": "cli.api",
    "evaluate_policy": "cli.api",
    "examine": "bench.doctor",
    "export_policy": "serve.export",
    "load_config": "config",
    "open_asker": "cli.api",
    "quieten": "runtime.quiet",
    "run_bench": "bench",
    "run_sweep": "cli.api",
    "serve_page": "cli.api",
    "serve_search": "cli.api",
    "train_policy": "cli.api",
    "write_report": "report",
}
"""Where each name is. None may be a module's too: once that is imported, it would stand in the name's place."""


def __getattr__(name: str) -> Any:
    """A name of `__all__`, from its module, which is imported now (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), "bench" if name == "run_bench" else name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
