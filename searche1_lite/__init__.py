"""searche1-lite: a search agent that improves itself, on one consumer GPU.

GRPO and offline self-distillation (OFSD) in turn update one LoRA adapter over a 4-bit base model; the search engine is
BM25 through Pyserini. Importing this package is instant: each name is imported when it is first used.

    import searche1_lite as s1

    config = s1.load_config("demo")
    summary = s1.train_policy(config, "runs/demo")
    asker = s1.open_asker(config, "runs/demo/checkpoints/round2.ofsd")
    print(asker.answer("What is the mayor of Port Mitu?").answer)

Each command has a function: `train_policy` (train), `evaluate_policy` (eval), `open_asker` (ask), `run_sweep`,
`serve_page` (ask --web), `build_index`, `serve_search`, `write_report`, `export_policy`, `examine` (doctor),
`run_bench`, and `config_for_gpu` (without --preset). Errors that the caller can fix are `UserError`s.
"""

import ast
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# TRL would report every trainer to the hub.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from searche1_lite.bench import run_bench as run_bench
    from searche1_lite.bench.doctor import examine as examine
    from searche1_lite.cli.api import Interaction as Interaction
    from searche1_lite.cli.api import config_for_gpu as config_for_gpu
    from searche1_lite.cli.api import evaluate_policy as evaluate_policy
    from searche1_lite.cli.api import open_asker as open_asker
    from searche1_lite.cli.api import run_sweep as run_sweep
    from searche1_lite.cli.api import serve_page as serve_page
    from searche1_lite.cli.api import serve_search as serve_search
    from searche1_lite.cli.api import train_policy as train_policy
    from searche1_lite.config import Config as Config
    from searche1_lite.config import load_config as load_config
    from searche1_lite.data.trajectory import Passage as Passage
    from searche1_lite.data.trajectory import Question as Question
    from searche1_lite.data.trajectory import Trajectory as Trajectory
    from searche1_lite.report import write_report as write_report
    from searche1_lite.rollout.reward import Reward as Reward
    from searche1_lite.rollout.reward import Written as Written
    from searche1_lite.runtime.errors import UserError as UserError
    from searche1_lite.runtime.quiet import quieten as quieten
    from searche1_lite.search.base import Retriever as Retriever
    from searche1_lite.search.index import build_index as build_index
    from searche1_lite.serve.ask import Answer as Answer
    from searche1_lite.serve.ask import Asker as Asker
    from searche1_lite.serve.export import export_policy as export_policy


def _public_names() -> dict[str, tuple[str, str]]:
    """Each name that this file imports for type checkers, with its module and its name there."""
    block = next(node for node in ast.parse(Path(__file__).read_bytes()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}


# No name may also be a module's, which would replace it once imported.
_NAMES = _public_names()
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _NAMES[name]
    value = globals()[name] = getattr(import_module(module), original)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
