"""searche1-lite: a search agent that improves itself, on one consumer GPU.

GRPO and offline self-distillation (OFSD) in turn update one LoRA adapter over a 4-bit base model; the search engine is
BM25 through Pyserini. Importing this package is instant: nothing heavy is loaded until something is called.

    import searche1_lite as s1

    config = s1.load_config("demo")
    summary = s1.train(config, "runs/demo")
    asker = s1.open_asker(config, "runs/demo/checkpoints/round2.ofsd")
    print(asker.answer("What is the mayor of Port Mitu?").answer)

Whatever the command line does is here: `train`, `evaluate_policy` (eval), `open_asker` (ask), `run_sweep`,
`serve_page` (ask --web), `build_index`, `serve_search`, `write_report`, `export_policy`, `examine` (doctor),
`run_bench`, and `config_for_gpu` (without --preset). Mistakes that the caller can mend are `UserError`s.
"""

import os
from typing import TYPE_CHECKING, Any

# Training is nobody else's business: TRL would tell the hub of every trainer that is made.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from searche1_lite.api import (
        config_for_gpu,
        evaluate_policy,
        open_asker,
        run_sweep,
        serve_page,
        serve_search,
        train,
    )
    from searche1_lite.ask import Answer, Asker
    from searche1_lite.bench import bench as run_bench
    from searche1_lite.config import Config, load_config
    from searche1_lite.doctor import examine
    from searche1_lite.errors import UserError
    from searche1_lite.export import export_policy
    from searche1_lite.quiet import quieten
    from searche1_lite.report import write_report
    from searche1_lite.reward import Reward, Written
    from searche1_lite.search.base import Passage, Retriever
    from searche1_lite.search.index import build_index
    from searche1_lite.trajectory import Question, Trajectory

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
    "train",
    "write_report",
]

_MODULES = {
    "Answer": "ask",
    "Asker": "ask",
    "Config": "config",
    "Passage": "search.base",
    "Question": "trajectory",
    "Retriever": "search.base",
    "Reward": "reward",
    "Trajectory": "trajectory",
    "UserError": "errors",
    "Written": "reward",
    "build_index": "search.index",
    "config_for_gpu": "api",
    "evaluate_policy": "api",
    "examine": "doctor",
    "export_policy": "export",
    "load_config": "config",
    "open_asker": "api",
    "quieten": "quiet",
    "run_bench": "bench",
    "run_sweep": "api",
    "serve_page": "api",
    "serve_search": "api",
    "train": "api",
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
