"""The training signal of self-distillation: the KL between teacher and student, before and after a stage of OFSD.

The teacher is the same policy, shown the better rollout of the pair (`pairs`), nothing (`plain`: zero, up to rounding)
or another question's rollout (`foreign`). The pairs are the stage's own. If `pairs` does not fall, the policy learned
nothing from them; if `foreign` is as large as `pairs`, it may learn only from the form of the prompt.

python examples/inspect_signal.py runs/signal
"""

import json
import sys
from pathlib import Path

import searche1_lite as s1


def main(out: str) -> None:
    s1.quieten()
    from searche1_lite.train.diagnostics import watch
    from searche1_lite.train.pairs import select_pairs

    shorter = ["rounds=1", "grpo.steps=2", "ofsd.questions=48", "data.evaluation_limit=20"]
    config = s1.load_config("demo", overrides=shorter)
    s1.train_policy(config, out)
    lines = Path(out, "trajectories", "round1.ofsd.rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    rollouts = [s1.Trajectory.from_dict(json.loads(line)) for line in lines]
    found = select_pairs(rollouts, config.ofsd.students)
    pairs, counts = found.chosen[:24], found.counts
    print(f"{counts['pairs']} pairs from {counts['questions']} questions; mean KL a token, in nats:")
    checkpoints = Path(out, "checkpoints")
    asker = s1.open_asker(config, checkpoints / "round1.grpo")
    for when, stage in (("before", "round1.grpo"), ("after", "round1.ofsd")):
        asker.use(checkpoints / stage)
        means, _ = watch(asker.work.model, asker.work.protocol, rollouts, pairs, config)
        print(f"{when:>6}: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
    print(
        "good: pairs falls; where foreign is as large, the lesson may be in the prompt's form; plain is always about 0"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
