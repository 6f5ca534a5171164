"""Does self-distillation pay? Four ways to spend the same time on the demo, over several seeds.

    python examples/four_rows.py --out runs/four-rows --seeds 11 12 13 14 15

Rows: GRPO only; GRPO + OFSD; GRPO + OFSD with the plain-prompt teacher (control); GRPO + plain SFT on the references.
Per seed the three rows with a second stage share the base evaluation and round 1's GRPO, which are the same to the bit.
GRPO only gets as many more steps as make up for the other rows' second stages, by the step times seen in that seed's
GRPO + OFSD run; its seconds stand in the table. An interrupted comparison goes on where it was.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from searche1_lite.checkpoint import RunFolder
from searche1_lite.config import Config, load_config
from searche1_lite.console import RichTasks
from searche1_lite.errors import UserError
from searche1_lite.evolve import run

ROWS = {
    "ofsd": ("GRPO + OFSD", []),
    "grpo": ("GRPO only", ["ofsd.enabled=false"]),
    "plain": ("GRPO + OFSD, plain-prompt teacher", ["ofsd.teacher_prompt=plain"]),
    "sft": ("GRPO + SFT on references", ["ofsd.objective=sft"]),
}
SHARED = ("base", "round1.grpo")


def seconds(summary: dict[str, Any], kind: str = "") -> float:
    """Seconds of training in stages whose names end in `kind`: with rollouts, without evaluation and diagnostics."""
    return sum(stage["seconds"] for stage in summary["stages"] if stage["name"].endswith(kind))


def row_config(row: str, seed: int, settings: list[str], model_run: dict[str, Any] | None) -> Config:
    config = load_config("demo", None, [*settings, f"seed={seed}", *ROWS[row][1]])
    if row == "grpo":
        assert model_run is not None
        config.grpo.steps = round(config.grpo.steps * seconds(model_run) / seconds(model_run, "grpo"))
    return config


def train_row(row: str, folder: Path, config: Config, donor: Path) -> dict[str, Any]:
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text())
        if len(summary["stages"]) == 1 + config.rounds * (1 + config.ofsd.enabled):
            return summary
    run_folder = RunFolder(folder, config, resume=True).start()
    if row != "ofsd":
        for name in SHARED[:1] if row == "grpo" else SHARED:
            final = folder / "checkpoints" / name
            if not final.exists():
                staging = final.with_name(f".{name}.staging")
                shutil.copytree(donor / "checkpoints" / name, staging, dirs_exist_ok=True)
                staging.rename(final)
    return run(config, run_folder, RichTasks())


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    def cell(values: list[float], digits: int) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"

    lines = ["| row | EM | searches/question | searches/correct | training s |", "|---|---|---|---|---|"]
    base = [summaries["stages"][0] for summaries in results["ofsd"]]
    stages = {"base": base} | {ROWS[row][0]: [s["stages"][-1] for s in summaries] for row, summaries in results.items()}
    spent = {"base": [0.0] * len(base)} | {
        ROWS[row][0]: [seconds(s) for s in summaries] for row, summaries in results.items()
    }
    for name, finals in stages.items():
        columns = [
            cell([stage["em"] for stage in finals], 3),
            cell([stage["searches_per_question"] for stage in finals], 2),
            cell([stage["searches_per_correct"] for stage in finals], 2),
            cell(spent[name], 0),
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all rows")
    parser.add_argument("--out", type=Path, default=Path("runs/four-rows"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="ofsd always comes first")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        row_config("ofsd", 0, arguments.settings, None)
    except UserError as error:
        parser.error(str(error))
    for seed in arguments.seeds:
        donor = arguments.out / f"ofsd-{seed}"
        model_run = None
        for row in sorted({*arguments.rows, "ofsd"}, key=list(ROWS).index):
            config = row_config(row, seed, arguments.settings, model_run)
            summary = train_row(row, arguments.out / f"{row}-{seed}", config, donor)
            model_run = model_run or summary
            results.setdefault(row, []).append(summary)
    print(table(results))


if __name__ == "__main__":
    main()
