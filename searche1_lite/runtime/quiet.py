"""Silences libraries. Light to import: the libraries are imported by the call."""

import logging
import os
import sys
import warnings
from contextlib import redirect_stdout


def quieten() -> None:
    """Hides libraries' progress bars and warnings, unless SEARCHE1_LITE_DEBUG is set."""
    if os.environ.get("WANDB_MODE") == "offline":
        with redirect_stdout(sys.stderr):  # transformers prints a line about it when imported
            import transformers.integrations.integration_utils  # noqa: F401
    if os.environ.get("SEARCHE1_LITE_DEBUG"):
        return
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if sys.stderr.isatty():
        from huggingface_hub.utils import enable_progress_bars

        enable_progress_bars()  # transformers disables those of downloads too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
