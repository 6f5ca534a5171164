"""What stands on the command line: the options that commands share, what Tab offers, and settings among other words.

Light to import: a shell waits for what Tab offers, so that only names of files and folders are looked at.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from searche1_lite.runtime.errors import UserError


def offer_presets(incomplete: str) -> list[str]:
    """The shipped presets that begin so."""
    presets = (Path(__file__).parents[1] / "config" / "presets").glob("*.yaml")
    return sorted(path.stem for path in presets if path.stem.startswith(incomplete))


def offer_methods(incomplete: str) -> list[str]:
    """Ways of answering, of `eval --method`."""
    return [name for name in ("agent", "rag", "no-search") if name.startswith(incomplete)]


def offer_parts(incomplete: str) -> list[str]:
    """What `bench --part` measures."""
    return [name for name in ("memory", "rollout", "search", "round") if name.startswith(incomplete)]


def offer_yaml(incomplete: str) -> list[str]:
    """YAML files whose path begins so; none, for the shell to offer all files, where there are only folders."""
    folder, _, start = incomplete.rpartition("/")
    place = f"{folder}/" if folder or incomplete.startswith("/") else ""
    files = sorted(Path(place or ".").glob("*.y*ml"))
    return [f"{place}{file.name}" for file in files if file.name.startswith(start)]


def offer_stages(context: typer.Context, incomplete: str) -> list[str]:
    """The finished stages of the run whose folder is among the words before."""
    # An option that lacks its value keeps the words before it from becoming parameters.
    words = [context.params.get("folder"), *context.args]
    adapters = [path for word in words if word for path in Path(word).glob("checkpoints/*/adapter_config.json")]
    return sorted(path.parent.name for path in adapters if path.parent.name.startswith(incomplete))


def offer_adapters(incomplete: str) -> list[str]:
    """The adapters of the runs in `runs/`; none, for the shell to offer files, where the path leads elsewhere."""
    found = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoints/*/adapter_config.json"))
    return [path for path in found if path.startswith(incomplete)]


Preset = Annotated[
    str | None, typer.Option(help="A shipped configuration, such as demo.", autocompletion=offer_presets)
]
PresetOrGpu = Annotated[
    str | None,
    typer.Option(
        help="A shipped configuration, such as demo. Default: without --config, the one made for the GPU here.",
        autocompletion=offer_presets,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file of settings, merged over the preset's.", autocompletion=offer_yaml),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="An adapter's folder, such as runs/demo/checkpoints/round2.ofsd. Default: the bare base.",
        autocompletion=offer_adapters,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings over those of the preset and the file, such as grpo.steps=20 seed=1.", metavar="KEY=VALUE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to large downloads, which are asked about otherwise.")]

Method = Annotated[
    str, typer.Option(help="The agent, or a baseline: agent, rag or no-search.", autocompletion=offer_methods)
]
Part = Annotated[
    list[str] | None,
    typer.Option(
        help="What to measure: memory, rollout, search or round; give it again for more. Default: all.",
        autocompletion=offer_parts,
    ),
]
Stage = Annotated[
    str | None,
    typer.Option(help="One of the run's stages, such as round1.grpo. Default: its last.", autocompletion=offer_stages),
]
SweepFile = Annotated[
    Path,
    typer.Argument(
        help="A YAML file of variants and seeds, such as examples/settle-it.yaml.", autocompletion=offer_yaml
    ),
]
Web = Annotated[
    bool, typer.Option("--web", help="A page in the browser, with all that a session has.", rich_help_panel="Server")
]
Host = Annotated[
    str,
    typer.Option(help="The address to be reached at; beyond this machine only with a token.", rich_help_panel="Server"),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.", rich_help_panel="Server")]
Token = Annotated[
    str | None,
    typer.Option(help="What whoever comes has to show; better given as SEARCHE1_LITE_TOKEN.", rich_help_panel="Server"),
]


def question_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The question among these words, if there is one, and the settings.

    A word is a setting if it looks like one, `section.key=value` or a key that there is.

    Raises:
        UserError: if two words are neither.
    """
    from searche1_lite.config import Config, flatten

    known = flatten(Config())

    def is_setting(word: str) -> bool:
        key = re.match(r"(\w+(?:\.\w+)*)=", word)
        return key is not None and ("." in key[1] or key[1] in known)

    questions = [word for word in words if not is_setting(word)]
    if len(questions) > 1:
        raise UserError(f"{questions[1]!r} is neither a setting nor part of the question; put the question in quotes")
    return (questions[0] if questions else None), [word for word in words if is_setting(word)]
