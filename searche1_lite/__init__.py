"""searche1-lite: a search agent that improves itself, on one consumer GPU.

GRPO and offline self-distillation (OFSD) in turn update one LoRA adapter over a 4-bit base model; the search engine is
BM25 through Pyserini. Importing this package is instant: nothing heavy is loaded until a command needs it.
"""

import os

# Training is nobody else's business: TRL would tell the hub of every trainer that is made.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
