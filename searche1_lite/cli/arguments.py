"""Options that commands share, shell completion, and telling a question from settings.

Light to import: shell completion waits for this.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from searche1_lite.runtime.errors import UserError

SERVER: Any = {"rich_help_panel": "Server"}


def offer_presets(incomplete: str) -> list[str]:
    """The shipped presets."""
    presets = (Path(__file__).parents[1] / "config" / "presets").glob("*.yaml")
    return sorted(path.stem for path in presets if path.stem.startswith(incomplete))


def offer_parts(incomplete: str) -> list[str]:
    """What `bench --part` measures."""
    return [name for name in ("memory", "rollout", "search", "round") if name.startswith(incomplete)]


def offer_yaml(incomplete: str) -> list[str]:
    """The YAML files in the folder typed so far."""
    folder, _, start = incomplete.rpartition("/")
    place = f"{folder}/" if folder or incomplete.startswith("/") else ""
    files = sorted(Path(place or ".").glob("*.y*ml"))
    return [f"{place}{file.name}" for file in files if file.name.startswith(start)]


def offer_stages(context: typer.Context, incomplete: str) -> list[str]:
    """The finished stages of the run whose folder was typed before."""
    # An option that lacks its value keeps the words before it from becoming parameters.
    words = [context.params.get("folder"), *context.args]
    adapters = [path for word in words if word for path in Path(word).glob("checkpoints/*/adapter_config.json")]
    return sorted(path.parent.name for path in adapters if path.parent.name.startswith(incomplete))


def offer_adapters(incomplete: str) -> list[str]:
    """The adapters of the runs in `runs/`; without a match the shell offers files."""
    found = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoints/*/adapter_config.json"))
    return [path for path in found if path.startswith(incomplete)]


Preset = Annotated[
    str | None, typer.Option(help="A shipped configuration, such as demo.", autocompletion=offer_presets)
]
PresetOrGpu = Annotated[
    str | None,
    typer.Option(
        help="A shipped configuration, such as demo. Default: without --config, the one for the GPU here.",
        autocompletion=offer_presets,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file of settings, merged over the preset's.", autocompletion=offer_yaml),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings over those of the preset and the file, such as grpo.steps=20 seed=1.", metavar="KEY=VALUE"
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="An adapter's folder, such as runs/demo/checkpoints/round2.ofsd. Default: the base model alone.",
        autocompletion=offer_adapters,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what is in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to large downloads without being asked.")]
Method = Annotated[Literal["agent", "rag", "no-search"], typer.Option(help="The agent, or a baseline.")]
Parts = Annotated[
    list[str] | None,
    typer.Option(
        help="What to measure: memory, rollout, search or round; repeat it for more. Default: all.",
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
Host = Annotated[str, typer.Option(help="The address to listen on; one beyond this machine needs a token.", **SERVER)]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: a free one.", **SERVER)]
Token = Annotated[
    str | None, typer.Option(help="The token that clients must send; better set SEARCHE1_LITE_TOKEN.", **SERVER)
]


def question_and_overrides(words: list[str]) -> tuple[str | None, list[str]]:
    """The question among these words, if any, and the settings: `section.key=value` or a known key.

    Raises:
        UserError: if two words are no settings.
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
