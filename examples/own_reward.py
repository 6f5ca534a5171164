"""Your own reward instead of exact match: a correct answer earns less the more searches it took.

A reward is a function of the policy's own text (`Written`: question, golden answers, turns, queries, answer). It does
not include retrieved documents, so no document can change a reward. Only GRPO uses it; evaluation and OFSD's pairs use
exact match.

python examples/own_reward.py runs/own-reward
"""

import sys

import searche1_lite as s1
from searche1_lite.rollout.reward import exact_match


def right_and_brief(written: s1.Written) -> float:
    """1 for a right answer without a search, 0.1 less for each search, never less than a wrong one's 0."""
    right = exact_match(written.answer, written.golden_answers)
    return right * max(0.1, 1.0 - 0.1 * len(written.queries))


def main(out: str) -> None:
    s1.quieten()
    shorter = ["rounds=1", "grpo.steps=6", "ofsd.enabled=false", "data.evaluation_limit=100"]
    summary = s1.train_policy(s1.load_config("demo", overrides=shorter), out, reward=right_and_brief)
    print(f"rewarded by {summary['reward']}")
    for stage in summary["stages"]:
        print(f"{stage['name']}: {stage['em']:.2f} right, {stage['searches_per_question']:.2f} searches a question")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
