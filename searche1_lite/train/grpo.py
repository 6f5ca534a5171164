"""GRPO through TRL: its trainer, fed by our rollouts.

Vanilla GRPO (DeepSeekMath, section 4): a group of rollouts per question, reward = exact match, advantage normalised
within the group, one update per batch of fresh rollouts, clipped ratio, a small KL to the adapter of the stage's start.
Environment tokens are masked. Groups with equal rewards have no advantage: they are skipped and counted.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from searche1_lite.data.questions import check_enough
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import drop_adapter, keep_adapter_fp32, use_adapter
from searche1_lite.policy.losses import completion_hidden, token_logprobs
from searche1_lite.policy.microbatch import micro_batches
from searche1_lite.policy.model import compute_context
from searche1_lite.policy.shrinking import Limit, in_smaller_passes
from searche1_lite.rollout.reward import Reward, earned
from searche1_lite.runtime.interrupt import Stop
from searche1_lite.runtime.ranks import (
    average,
    average_gradients,
    fail_together,
    from_first,
    gather,
    merged,
    no_reduction,
    rank,
    world_size,
)
from searche1_lite.runtime.seeds import derive_seed
from searche1_lite.train.collapse import CollapseWatch, step_figures
from searche1_lite.train.session import gather_trajectories
from searche1_lite.train.stage_checkpoint import ResumableTrainer, train
from searche1_lite.train.stage_trainer import StageTraining, StepReporter, drop_printer, rows_of, trainer_arguments
from searche1_lite.train.tracking import reporting
from searche1_lite.train.update_guard import UpdateGuard, finite_or_none

REFERENCE = "ref"
"""The frozen adapter that TRL adds for the KL term."""

Answer = Callable[[Sequence[Question], int, Sequence[int | str]], list[Trajectory]]
"""Questions, rollouts a question, and the parts of the seed -> trajectories."""


class RolloutGRPOTrainer(ResumableTrainer, GRPOTrainer):
    """TRL's trainer with one batch per optimizer step, computed in micro-batches.

    Only model-written tokens are projected onto the vocabulary. Shapes: B rollouts, P prompt and C completion tokens.
    """

    scored: torch.Tensor
    """(B, C) 1 at the model-written tokens of the current micro-batch."""
    logprobs: torch.Tensor
    """(B, C) their log-probs in the last pass."""
    beta: float
    """TRL's weight of the KL to the reference."""

    def __init__(
        self, *args: Any, micro_batch_tokens: int, stop: Stop, guard: UpdateGuard | None = None, **kwargs: Any
    ) -> None:
        self.passes = Limit("grpo.micro_batch_tokens", micro_batch_tokens)
        self._stop, self._guard = stop, guard or UpdateGuard("GRPO", "grpo.learning_rate")
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch of rollouts and advantages (B,), and `trained` (B,): whether a rollout's group has an advantage.

        The reference's pass is left to `_compute_loss`, which makes it for trained rollouts only.
        """
        beta, self.beta = self.beta, 0.0
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta
        for name in ("clipped_ratio", "mean_terminated_length", "min_terminated_length", "max_terminated_length"):
            # TRL counts an episode that ends with `</answer>` instead of EOS as cut off.
            self._metrics["train"].pop(f"completions/{name}", None)
        trained = (batch["advantages"].view(-1, self.num_generations) != 0).any(dim=1)  # (questions,)
        self._metrics["train"]["skipped_groups"].append(sum(gather([int((~trained).sum())])))
        batch["trained"] = trained.repeat_interleave(self.num_generations)
        return batch

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's loss of a whole step and its gradient, in micro-batches; the mean includes the skipped rollouts.

        If every group is skipped there is no gradient, and the optimizer changes neither weights nor momentum.
        """
        model.train()
        policy = self.accelerator.unwrap_model(model)
        inputs = self._prepare_inputs(inputs)
        self._step += 1
        # A rollout without a model-written token has nothing to train on.
        written = (inputs["completion_mask"] * inputs["tool_mask"]).any(dim=1)  # (B,)
        trained = (inputs["trained"] & written).nonzero().flatten()
        if self._guard.refused:
            trained = trained[:0]
        lengths = inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=1)  # (B,)
        sizes = lengths[trained].tolist()

        def passes(budget: int) -> tuple[torch.Tensor, dict[str, float], int]:
            self._guard.forget()
            return self._passes(policy, inputs, [trained[batch] for batch in micro_batches(sizes, budget)])

        with fail_together(self._stop), no_reduction(self.accelerator):
            total, sums, tokens = in_smaller_passes(self.passes, sizes, policy, passes, "a GRPO step")
        average_gradients(policy)
        total = average(total)
        sums, tokens = merged(gather([(sums, tokens)]))
        for name, value in sums.items():
            self._metrics["train"][name].append(value / max(1, tokens))
        self._guard.see("loss", total)
        return total.nan_to_num(0.0, 0.0, 0.0)  # the Trainer's running mean would stay NaN

    def _passes(
        self, model: Any, inputs: dict[str, Any], batches: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float], int]:
        """Loss and gradient of these micro-batches; TRL's metrics summed over the scored tokens, and their number."""
        rows = len(inputs["prompt_mask"])
        total = torch.zeros((), device=inputs["prompt_mask"].device)
        figures, sums, tokens = self._metrics["train"], defaultdict[str, float](float), 0
        try:
            for batch in batches:
                self._stop.check()
                self._metrics["train"] = defaultdict(list)
                with self.compute_loss_context_manager():
                    loss = self._compute_loss(model, rows_of(inputs, batch)) * (len(batch) / rows)
                self.accelerator.backward(loss)
                total += loss.detach()
                self._guard.see("log-probs", self.logprobs)
                size = int(self.scored.sum())
                tokens += size
                for name, values in self._metrics["train"].items():
                    sums[name] += size * sum(values)
        finally:
            self._metrics["train"] = figures
        return total, sums, tokens

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of one micro-batch, with the reference's log-probs."""
        self.scored = inputs["completion_mask"] * inputs["tool_mask"]
        if self.beta and "ref_per_token_logps" not in inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, P + C)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), REFERENCE):
                found = self._get_per_token_logps_and_entropies(model, ids, mask, self.scored.shape[1])
            inputs = inputs | {"ref_per_token_logps": found[0]}
        loss = super()._compute_loss(model, inputs)
        if (sampled := inputs.get("sampling_per_token_logps")) is not None:
            gap = ((sampled - self.logprobs).abs() * self.scored).sum() / self.scored.sum().clamp(min=1)
            self._metrics["train"]["sampling_logprob_difference"].append(float(gap))
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Log-probs and entropies (B, C), 0 at environment tokens; None for TRL's auxiliary loss of experts."""
        policy = self.accelerator.unwrap_model(model)
        split, keep = input_ids.shape[1] - logits_to_keep, self.scored.bool()
        completion_ids = input_ids[:, split:]
        hidden = completion_hidden(
            policy, input_ids[:, :split], attention_mask[:, :split], completion_ids, attention_mask[:, split:], keep
        )  # (N scored tokens, hidden)
        with compute_context(policy):
            found = token_logprobs(policy.get_output_embeddings(), hidden, completion_ids[keep], self.temperature)
        # `masked_scatter` keeps the graph when nothing is scored, so that the backward pass still works.
        logprobs, entropies = (values.new_zeros(keep.shape).masked_scatter(keep, values) for values in found)
        self.logprobs = logprobs.detach()
        return logprobs, entropies, None


def earned_reward(prompts: list[str], completions: list[str], rewards: list[float], **_: Any) -> list[float]:
    """The rewards computed from model-written tokens; TRL's own decoded text is not read."""
    return rewards


def train_grpo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    answer: Answer,
    questions: Sequence[Question],
    training: StageTraining,
    *,
    on_rollouts: Callable[[list[Trajectory]], None] | None = None,
    reward: Reward | None = None,
) -> dict[str, Any]:
    """One GRPO stage; the trained adapter is changed in place.

    Args:
        answer: gives fresh rollouts of the current policy, `group_size` a question, question by question.
        questions: training questions; each step takes `questions_per_step` of them in a seeded order.
        on_rollouts: receives each step's trajectories.
        reward: replaces exact match.

    Returns:
        `{"steps", "rollout_seconds"}`, steps whose update was skipped included; `skipped`, the number of those;
        `micro_batch_tokens` where memory made it smaller; `collapse`, the signs that the watch reported, and `ended`
        (`stop` or `rollback`) where it ended the stage.

    Raises:
        UserError: if there are fewer questions than one step takes, or update after update has to be skipped.
        Interrupted: if it was stopped.
    """
    config, stage, keeper = training.config, training.config.grpo, training.keeper
    if stage.steps == 0:
        return {"steps": 0, "rollout_seconds": 0.0}
    check_enough(questions, stage)
    index, name = training.round_index, f"round{training.round_index}.grpo"
    seed = derive_seed(config.seed, "grpo", index)
    order = question_order(len(questions), stage.questions_per_step, stage.steps, seed % 2**31)
    figures = {} if keeper is None else keeper.figures
    figures.setdefault("rollout_seconds", 0.0)
    latest: dict[str, Any] = {"trajectories": [], "seconds": 0.0}  # of the current step
    guard, watch = UpdateGuard(name, "grpo.learning_rate"), CollapseWatch(name, config.collapse)

    def roll(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        began = time.monotonic()
        size = stage.group_size
        asked = [questions[int(key)] for key in prompts[::size]]
        if len(prompts) % size or [key for key in prompts[::size] for _ in range(size)] != list(prompts):
            raise RuntimeError("TRL no longer passes each prompt group_size times in a row; pin trl<1.17")
        with fail_together(training.stop):
            own = answer(asked, size, (config.seed, "grpo", index, trainer.state.global_step))
            rewards = [t.reward if reward is None else earned(reward, t) for t in own]
        trajectories = gather_trajectories(own)
        seconds = time.monotonic() - began
        figures["rollout_seconds"] += seconds
        latest.update(trajectories=trajectories, seconds=seconds)
        guard.check_rollouts(trajectories)
        own = trajectories[rank() * len(own) :][: len(own)]
        if on_rollouts is not None:
            on_rollouts(trajectories)
        kept = [t.logprobs for t in trajectories]
        return {
            "prompt_ids": [t.prompt_ids for t in own],
            "completion_ids": [t.completion_ids for t in own],
            "logprobs": None if None in kept else [t.logprobs for t in own],
            "env_mask": [t.loss_mask for t in own],
            "rewards": rewards,
        }

    def describe(logs: dict[str, Any]) -> dict[str, Any]:
        record = {"stage": "grpo", "round": index, **guard.figures(logs), **step_record(logs, **latest)}
        record |= step_figures(latest["trajectories"], stage.group_size)
        return from_first(lambda: {key: finite_or_none(value) for key, value in record.items()})

    def step_done(record: dict[str, Any]) -> None:
        training.on_step(record)
        watch.see(record)

    reporter = StepReporter(describe, replace(training, on_step=step_done))
    arguments = GRPOConfig(
        **trainer_arguments(model, training, seed, stage.steps),
        loss_type="grpo",
        scale_rewards="group",
        epsilon=stage.clip,
        beta=stage.kl_coefficient,
        num_generations=stage.group_size,
        num_iterations=1,
        per_device_train_batch_size=stage.questions_per_step // world_size() * stage.group_size,
        learning_rate=stage.learning_rate,
        warmup_steps=round(stage.warmup_ratio * stage.steps),
        max_grad_norm=stage.max_grad_norm,
    )
    try:
        with keep_adapter_fp32(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rollout_func announces that it is experimental
            trainer = RolloutGRPOTrainer(
                model=model,
                reward_funcs=earned_reward,
                args=arguments,
                train_dataset=Dataset.from_dict({"prompt": [str(index) for index in order]}),
                processing_class=tokenizer,
                callbacks=[reporter, guard, watch],
                rollout_func=roll,
                micro_batch_tokens=stage.micro_batch_tokens,
                stop=training.stop,
                guard=guard,
            )
        for name, parameter in model.named_parameters():
            if f".{REFERENCE}." in name:
                parameter.requires_grad_(False)
        drop_printer(trainer)
        if keeper is not None:
            keeper.hold(guard=guard, watch=watch, passes=trainer.passes)
        with reporting(trainer, training.tracked):
            train(trainer, keeper)
    finally:
        drop_adapter(model, REFERENCE)
        model.eval()
    result = {"steps": reporter.steps, "rollout_seconds": round(figures["rollout_seconds"], 3)}
    return result | {"skipped": guard.skipped} | trainer.passes.figures() | watch.figures()


def step_record(logs: dict[str, Any], trajectories: Sequence[Trajectory], seconds: float) -> dict[str, Any]:
    """A step's line of `metrics.jsonl`, from TRL's log and the rollouts, which took `seconds`."""
    count, tokens = len(trajectories), sum(t.n_model_tokens for t in trajectories)
    return {
        "reward": logs.get("reward"),
        "em": sum(t.reward for t in trajectories) / count,
        "kl": logs.get("kl"),
        "zero_std_fraction": logs.get("frac_reward_zero_std"),
        "skipped_groups": int(logs["skipped_groups"]),
        "sampling_logprob_difference": logs.get("sampling_logprob_difference"),
        "searches": sum(t.n_searches for t in trajectories) / count,
        "failed_searches": sum(t.n_failed_searches for t in trajectories),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "rollout_seconds": round(seconds, 3),
        "learning_rate": logs.get("learning_rate"),
    }


def question_order(count: int, batch: int, steps: int, seed: int) -> list[int]:
    """The questions' indices, `batch` a step: permutations of all `count`, without the rest that makes no batch."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(count, generator=generator).tolist()[: count - count % batch]
    return order[: steps * batch]
