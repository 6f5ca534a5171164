"""Every setting, one dataclass per section; `searche1-lite config` prints the docstrings."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from searche1_lite.runtime.errors import UserError

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def _names(value: Any) -> Any:
    """Accepts `a`, `a,b` and `[a, b]`; `none` and null are an empty list."""
    if value is None or value in ("none", ["none"]):
        return []
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names


Trackers = Annotated[list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(_names)]


@dataclass(config=_STRICT)
class ModelConfig:
    """The base model and the LoRA adapter."""

    name: str = "Qwen/Qwen2.5-3B"
    """`demo` for the shipped policy, a folder, or a name on the hub."""
    revision: Annotated[str, Field(pattern=r"^\w[\w+-]*([./]\w[\w+-]*)*$", max_length=200)] | None = None
    """Revision on the hub, for reproducible runs."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit base with double quantisation. `none`: the base as stored."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, with all of your permissions. Off, a model that needs such code is
    refused."""
    lora_rank: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """The adapter's output is scaled by `lora_alpha / lora_rank`."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, far less memory."""


@dataclass(config=_STRICT)
class SearchConfig:
    """The search engine: a corpus, an existing index, or a search server."""

    corpus: str | None = None
    """`demo` for the shipped fictional wiki, a JSONL file (`.gz` too) with `id` and `contents`, or a folder of text
    files. Its index is built in the cache folder on first use."""
    index: str | None = None
    """An existing index instead: a Lucene index's folder, one of Pyserini's prebuilt indexes by name, such as
    `wikipedia-dpr-100w`, or `wiki-18` for Search-R1's. An index without texts takes them from `corpus`."""
    k: PositiveInt = 3
    """Passages per search; each is cut to `protocol.max_document_tokens`."""
    k1: Annotated[float, Field(ge=0.0)] = 0.9
    """BM25: saturation of term frequency; 0: term frequency is ignored."""
    b: Fraction = 0.4
    """BM25: length normalization; 0: none."""
    threads: PositiveInt = 2
    """Threads per batch of queries. With several workers, `serve-search` uses one thread each."""
    url: str | None = None
    """A search server instead, `serve-search` or another one with Search-R1's protocol, such as
    `http://127.0.0.1:8000/retrieve`. Its token is read from SEARCHE1_LITE_SEARCH_TOKEN."""
    timeout_seconds: PositiveFloat = 30.0
    """Time limit of one request to `url`, from the connection to the last byte."""
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    """Further attempts after a request to `url` fails to connect, times out, or gets HTTP 429 or 5xx; the pauses double
    from half a second to half a minute."""
    on_failure: Literal["stop", "empty"] = "stop"
    """After the last attempt. `stop`: the run ends; continue with --resume. `empty`: the search failed, and
    the policy gets `protocol.search_failed_message`."""

    def __post_init__(self) -> None:
        if self.url is None:
            return
        # A server replaces a preset's demo corpus.
        for key, value in (("index", self.index), ("corpus", None if self.corpus == "demo" else self.corpus)):
            if value is not None:
                raise UserError(
                    f"search.url={self.url} and search.{key}={value} exclude each other; set one of them to null"
                )


@dataclass(config=_STRICT)
class ProtocolConfig:
    """The texts that policy and environment exchange, and the limits of an episode."""

    plain_template: str = (
        "Answer the question below. Think inside <think> and </think> each time you get new information. If you lack "
        "knowledge, search with <search> query </search>; the results come back between <information> and "
        "</information>. You may search up to {max_searches} times. When you know enough, give only the short answer "
        "inside <answer> and </answer>, for example <answer> Lima </answer>.\nQuestion: {question}"
    )
    """The user message of the plain prompt P_S. `{question}` is replaced; the chat template is applied."""
    privileged_template: str = (
        "Answer the question below. Think inside <think> and </think> each time you get new information. If you lack "
        "knowledge, search with <search> query </search>; the results come back between <information> and "
        "</information>. You may search up to {max_searches} times. When you know enough, give only the short answer "
        "inside <answer> and </answer>, for example <answer> Lima </answer>.\nHere is an efficient solution of this "
        "very question, for guidance:\n{reference}\nNow solve it yourself, with no more searches than it needs.\n"
        "Question: {question}"
    )
    """The user message of the privileged prompt P_T. `{question}` and `{reference}` are replaced."""
    direct_template: str = (
        "Answer the question below from what you know. Think inside <think> and </think>, then give only the short "
        "answer inside <answer> and </answer>, for example <answer> Lima </answer>.\nQuestion: {question}"
    )
    """The user message of `eval --method no-search`. `{question}` is replaced."""
    rag_template: str = (
        "Answer the question below with the help of the passages between <information> and </information>. Think "
        "inside <think> and </think>, then give only the short answer inside <answer> and </answer>, for example "
        "<answer> Lima </answer>.\n<information>{documents}</information>\nQuestion: {question}"
    )
    """The user message of `eval --method rag`. `{question}` and `{documents}`, the results of one search for the
    question, are replaced; the documents do not count towards `max_prompt_tokens`."""
    information_template: str = "\n\n<information>{documents}</information>\n\n"
    """The environment's text after a search. `{documents}` is replaced."""
    document_template: str = "Doc {rank} (Title: {title}) {text}\n"
    """One passage of `{documents}`. `{rank}`, from 1, `{title}` and `{text}` are replaced."""
    no_result_message: str = "No results."
    """Replaces the documents after a search without results."""
    search_failed_message: str = "The search failed; nothing was looked up."
    """Replaces the documents after a failed search (`search.on_failure=empty`)."""
    correction_message: str = (
        "\nThat was neither a search nor an answer. To search, write <search> query </search>. To answer, write "
        "<answer> answer </answer>.\n"
    )
    """The environment's text after a turn that is neither a search nor an answer."""
    no_more_searches_message: str = "\nNo searches are left. Answer now, inside <answer> and </answer>.\n"
    """The environment's text after the last search allowed."""
    max_searches: Count = 4
    """Most searches of an episode."""
    max_invalid_turns: Count = 1
    """Corrections before an episode ends."""
    max_prompt_tokens: PositiveInt = 2048
    """Most tokens of a plain prompt; a longer question is refused."""
    max_turn_tokens: PositiveInt = 500
    """Most tokens of one turn of the policy."""
    max_document_tokens: PositiveInt = 160
    """Each passage is cut to this many tokens."""
    max_completion_tokens: PositiveInt = 3072
    """Most tokens of an episode after the prompt, documents included."""


@dataclass(config=_STRICT)
class DataConfig:
    """The questions."""

    train: str | None = None
    """Questions to train on: `demo`; a set by name, such as `nq`, `hotpotqa:train`, or `search-r1` for Search-R1's
    mixture of both; a JSONL file (`id`, `question`, `golden_answers`); or several of them joined by `+`."""
    train_limit: Count = 0
    """Train on a seeded subset of this size; 0: all."""
    evaluation: str | None = None
    """Questions to evaluate on, in the same form; never trained on."""
    evaluation_limit: Count = 0
    """Evaluate on a seeded subset of this size; 0: all."""


@dataclass(config=_STRICT)
class EngineConfig:
    """How rollouts are computed."""

    backend: Literal["torch", "vllm"] = "torch"
    """The engine of rollouts. `vllm` is an extra to install and holds its own copy of the base."""
    batch_size: PositiveInt = 64
    """Episodes decoded in parallel."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of rollouts; evaluation is greedy."""
    shadow: Literal["auto", "always", "never"] = "auto"
    """Compute rollouts with a dequantized copy of the weights, the adapter merged: faster for large batches, but takes
    memory. `auto`: if the memory plan has room for it. vLLM's own copy on a GPU is in 4 bits unless `always`, and the
    adapter is never merged into it."""


@dataclass(config=_STRICT)
class GRPOStageConfig:
    """A round's GRPO stage."""

    steps: Count = 100
    """Optimizer steps per round."""
    questions_per_step: PositiveInt = 16
    """Questions per optimizer step, each with a group of rollouts."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Rollouts per question."""
    learning_rate: PositiveFloat = 1e-5
    """Learning rate after the warm-up; constant."""
    warmup_ratio: Fraction = 0.1
    """Share of the stage's steps in which the learning rate rises from 0."""
    clip: PositiveFloat = 0.2
    """Clip range of the probability ratio (epsilon)."""
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.001
    """Weight of the KL to the adapter at the start of the stage; 0 skips the reference pass."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass, with prompts and padding; a longer trajectory is a batch of its own."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""


@dataclass(config=_STRICT)
class OFSDStageConfig:
    """A round's OFSD stage (offline self-distillation)."""

    enabled: bool = True
    """Off, a round is GRPO only."""
    questions: PositiveInt = 512
    """Training questions answered again to find pairs."""
    rollouts: Annotated[int, Field(ge=2)] = 5
    """K: fresh rollouts per question."""
    epochs: PositiveInt = 1
    """Passes over the pairs."""
    batch_size: PositiveInt = 16
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass, with prompts, completions and padding; a longer pair is a batch of its
    own. A pair counts with the longer of its two passes, the teacher's if a reference is shown."""
    learning_rate: PositiveFloat = 1e-5
    """Learning rate after the warm-up; constant."""
    warmup_ratio: Fraction = 0.1
    """Share of the stage's steps in which the learning rate rises from 0."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    objective: Literal["distill", "sft"] = "distill"
    """`distill`: KL to the teacher along the student's tokens. `sft`: cross-entropy on the reference (a baseline)."""
    teacher: Literal["snapshot", "base", "live"] = "snapshot"
    """`snapshot`: the adapter at the stage's start, frozen. `base`: adapter disabled. `live`: the trained adapter."""
    teacher_prompt: Literal["privileged", "plain", "foreign"] = "privileged"
    """`privileged`: the question with its reference. `plain`: the control. `foreign`: another question's reference."""
    reference: Literal["efficient", "random_correct", "most_different", "random"] = "efficient"
    """Which rollout of the student's group is the reference. `efficient`: the correct one with the fewest searches, the
    method. `random_correct`: any correct one but the student. `most_different`: the correct one that differs most from
    the student. `random`: any one but the student, right or wrong: no privilege. The students are the same in all."""
    reference_documents: bool = True
    """Show the reference with the documents it retrieved."""
    students: Literal["any", "wrong", "correct"] = "any"
    """Which rollouts may be students: any less efficient or wrong one, only wrong ones, only correct ones."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student), the method. The others are ablations (JSD with weight 0.5)."""
    clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Pointwise clip of `forward_kl`, in nats: the most that one vocabulary entry adds to a token's loss; 0: none. A
    small clip (0.05) can reverse the gradient of a clipped token."""
    top_k: Count = 0
    """`forward_kl` over the teacher's k likeliest tokens, the rest as one; 0: the full vocabulary."""
    tokens: Literal["all", "search"] = "all"
    """Model-written tokens in the loss: all, or only those of search turns."""


@dataclass(config=_STRICT)
class BudgetConfig:
    """Limits of training, to compare runs at equal cost. The rounds end when the first is reached."""

    updates: Count = 0
    """Optimizer updates of GRPO and OFSD together; 0: no limit."""
    seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds of training, rollouts included, evaluation and diagnostics not; 0: no limit. The update that reaches
    it is the last."""


@dataclass(config=_STRICT)
class CollapseConfig:
    """When a GRPO stage counts as collapsed, by means over its last steps, and what happens then. A null threshold is
    off. The rates must also have risen by 0.2 since the stage's first step."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """`warn`: a line on the terminal, once per stage and metric. `stop`: the stage ends, is saved and evaluated, and
    ends the run. `rollback`: the stage ends, the adapter becomes that of the best earlier evaluated stage, and the run
    continues with the next stage."""
    window: PositiveInt = 5
    """Steps of a mean; nothing is checked before that many."""
    unanswered: Fraction | None = 0.5
    """Share of episodes without an answer."""
    invalid: Fraction | None = 0.5
    """Share of episodes with a turn that is neither a search nor an answer."""
    no_search: Fraction | None = 0.9
    """Share of episodes without a search."""
    repetition: Fraction | None = 0.5
    """Share of the policy's token 4-grams that occurred earlier in their episode."""
    all_wrong: Fraction | None = 0.95
    """Share of groups without a correct rollout. Groups that are all correct are no sign of a collapse."""
    kl: PositiveFloat | None = 1.0
    """KL to the adapter at the start of the stage, in nats per token; not available with `grpo.kl_coefficient` 0."""
    reward_drop: Fraction | None = 0.5
    """Loss relative to the best mean reward so far; less than 0.1 of reward is never a drop."""


@dataclass(config=_STRICT)
class LoggingConfig:
    """What a run reports; a resumed run may have other values, since none of it affects training."""

    report_to: Trackers = field(default_factory=list)
    """The Trainer's `report_to`: `tensorboard`, `trackio`, `wandb`, or several; each an extra to install."""
    project: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)] | None = None
    """The project in wandb and trackio; null: `WANDB_PROJECT` for wandb, else `searche1-lite`."""
    samples: Count = 4
    """Trajectories per table of samples on the terminal; 0: no tables."""
    samples_every: Count = 0
    """GRPO steps between two tables; 0: one table per stage."""


@dataclass(config=_STRICT)
class CheckpointConfig:
    """What a run saves to continue from; a resumed run may have other values, since none of it affects training."""

    every_steps: Count = 10
    """Optimizer steps between two checkpoints within a stage; 0: only at its end, and when it is interrupted."""
    keep_stages: Count = 0
    """Number of last stages whose checkpoints are kept, besides the one with the best EM; 0: all."""


@dataclass(config=_STRICT)
class Config:
    """A whole run."""

    seed: Count = 0
    """Seed of all random numbers of a run."""
    rounds: PositiveInt = 2
    """Rounds of GRPO and OFSD; fewer where `budget` ends them."""
    model: ModelConfig = field(default_factory=ModelConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    grpo: GRPOStageConfig = field(default_factory=GRPOStageConfig)
    ofsd: OFSDStageConfig = field(default_factory=OFSDStageConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
