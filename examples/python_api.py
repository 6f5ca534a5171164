"""Train, ask and evaluate from Python, on the demo.

python examples/python_api.py runs/python
"""

import sys

import searche1_lite as s1


def main(out: str) -> None:
    s1.quieten()
    shorter = ["rounds=1", "grpo.steps=2", "ofsd.questions=64", "data.evaluation_limit=60"]
    config = s1.load_config("demo", overrides=shorter)
    for stage in s1.train_policy(config, out)["stages"]:
        print(f"{stage['name']}: {stage['em']:.2f} right, {stage['searches_per_question']:.2f} searches a question")
    adapter = f"{out}/checkpoints/round1.ofsd"
    answer = s1.open_asker(config, adapter).answer("What is the mayor of the birthplace of Feda Vifa?")
    print(f"{answer.question} {answer.answer}; searched for {[search.query for search in answer.searches]}")
    print(f"dev questions: {s1.evaluate_policy(config, adapter=adapter, data='demo:dev', limit=60)['em']:.2f} right")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
