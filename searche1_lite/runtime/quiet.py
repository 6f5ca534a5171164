"""What libraries would print of themselves. Light to import: they are loaded by the call."""

import logging
import os
import sys
import warnings
from contextlib import redirect_stdout


def quieten() -> None:
    """Keeps libraries' progress bars and notices off the terminal; set SEARCHE1_LITE_DEBUG=1 to see them."""
    if os.environ.get("WANDB_MODE") == "offline":
        with redirect_stdout(sys.stderr):  # transformers prints a line about it as it is imported
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

        enable_progress_bars()  # transformers has turned off those of downloads too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
