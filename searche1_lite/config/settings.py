"""Every setting, one dataclass per concern; a section's meaning is its docstring, a setting's the text below it.

`searche1-lite config` prints them from here, and `config.py` reads them from YAML and overrides.
"""

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
    """`a`, `a,b` and `[a, b]` name the same things; `none` and null name nothing."""
    if value is None or value in ("none", ["none"]):
        return []
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names


Trackers = Annotated[list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(_names)]


@dataclass(config=_STRICT)
class ModelConfig:
    """The base model, and the LoRA adapter that is trained on it."""

    name: str = "Qwen/Qwen2.5-3B"
    """`demo` for the shipped policy, a folder, or a hub name."""
    revision: Annotated[str, Field(pattern=r"^\w[\w+-]*([./]\w[\w+-]*)*$", max_length=200)] | None = None
    """Hub revision, for a run that can be repeated."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: 4-bit base with double quantisation. `none`: the base as stored."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, which can do whatever you can. Off, no such code is fetched or
    run, and a model that needs it is refused."""
    lora_rank: PositiveInt = 16
    """Rank of the adapter's matrices."""
    lora_alpha: PositiveInt = 32
    """What the adapter adds is multiplied by this over `lora_rank`."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, far less memory."""


@dataclass(config=_STRICT)
class SearchConfig:
    """What is searched, and how: a corpus, a ready index, or a search server."""

    corpus: str | None = None
    """`demo` for the shipped fictional wiki, a JSONL file (`.gz` too) with `id` and `contents`, or a folder of text
    files. Its index is built on first use, in the cache folder."""
    index: str | None = None
    """A ready index instead: a Lucene index's folder, one of Pyserini's prebuilt indexes by name, such as
    `wikipedia-dpr-100w`, or `wiki-18` for Search-R1's. One that stores no text takes it from `corpus`."""
    k: PositiveInt = 3
    """Passages a search; each is cut to `protocol.max_document_tokens`."""
    k1: Annotated[float, Field(ge=0.0)] = 0.9
    """BM25: how much it counts that a passage has a word several times; 0: not at all."""
    b: Fraction = 0.4
    """BM25: how much a passage's length counts against it; 0: not at all."""
    threads: PositiveInt = 2
    """Threads that answer one batch of queries. Where `serve-search` has several workers, each has one."""
    url: str | None = None
    """A search server instead, of `serve-search` or another one of Search-R1's protocol, such as
    `http://127.0.0.1:8000/retrieve`. The token that it may ask for is read from SEARCHE1_LITE_SEARCH_TOKEN."""
    timeout_seconds: PositiveFloat = 30.0
    """What one request to `url` may take, from the connection to the last byte."""
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    """More tries where a request to `url` finds no connection, times out, or the server is busy or failing (429, 5xx);
    the pauses between them double from half a second to half a minute."""
    on_failure: Literal["stop", "empty"] = "stop"
    """What a search is that `url` did not answer in the end. `stop`: the end of the run, which goes on with --resume.
    `empty`: a marked empty result, told to the policy with `protocol.search_failed_message`, and counted."""

    def __post_init__(self) -> None:
        if self.url is None:
            return
        # A preset's demo corpus says nothing about a server given over it.
        for key, value in (("index", self.index), ("corpus", None if self.corpus == "demo" else self.corpus)):
            if value is not None:
                raise UserError(
                    f"search.url={self.url} and search.{key}={value} both say what is searched; set one of them to null"
                )


@dataclass(config=_STRICT)
class ProtocolConfig:
    """What policy and environment say to each other, and how long an episode may become."""

    plain_template: str = (
        "Answer the question below. Think inside <think> and </think> each time you get new information. If you lack "
        "knowledge, search with <search> query </search>; the results come back between <information> and "
        "</information>. You may search up to {max_searches} times. When you know enough, give only the short answer "
        "inside <answer> and </answer>, for example <answer> Lima </answer>.\nQuestion: {question}"
    )
    """The user message of the plain prompt P_S. `{question}` is replaced; the chat template does the rest."""
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
    """The user message of `eval --method rag`. `{question}` and `{documents}`, what one search for the question finds,
    are replaced; the documents are not counted in `max_prompt_tokens`."""
    information_template: str = "\n\n<information>{documents}</information>\n\n"
    """What the environment says after a search. `{documents}` is replaced."""
    document_template: str = "Doc {rank} (Title: {title}) {text}\n"
    """One passage of `{documents}`. `{rank}`, from 1, `{title}` and `{text}` are replaced."""
    no_result_message: str = "No results."
    """In the place of documents after a search that found nothing."""
    search_failed_message: str = "The search failed; nothing was looked up."
    """In the place of documents after a search that could not be made (`search.on_failure=empty`)."""
    correction_message: str = (
        "\nThat was neither a search nor an answer. To search, write <search> query </search>. To answer, write "
        "<answer> answer </answer>.\n"
    )
    """What the environment says after a turn that was neither a search nor an answer."""
    no_more_searches_message: str = "\nNo searches are left. Answer now, inside <answer> and </answer>.\n"
    """What the environment says after the last search allowed."""
    max_searches: Count = 4
    """Searches of an episode."""
    max_invalid_turns: Count = 1
    """Corrections before the episode is given up."""
    max_prompt_tokens: PositiveInt = 2048
    """Tokens of a plain prompt; a question that exceeds them is refused."""
    max_turn_tokens: PositiveInt = 500
    """Tokens the policy may write in one turn."""
    max_document_tokens: PositiveInt = 160
    """Each passage is cut to this."""
    max_completion_tokens: PositiveInt = 3072
    """Tokens of a whole episode after the prompt, documents included."""


@dataclass(config=_STRICT)
class DataConfig:
    """The questions."""

    train: str | None = None
    """Questions to train on: `demo`; a set by name, such as `nq`, `hotpotqa:train`, or `search-r1` for Search-R1's
    mixture of both; a JSONL file (`id`, `question`, `golden_answers`); or several of them joined by `+`."""
    train_limit: Count = 0
    """Train on a seeded subset of this size; 0: all."""
    evaluation: str | None = None
    """Questions to evaluate on, named in the same way; never trained on."""
    evaluation_limit: Count = 0
    """Evaluate on a seeded subset of this size; 0: all."""


@dataclass(config=_STRICT)
class EngineConfig:
    """How rollouts are computed."""

    backend: Literal["torch", "vllm"] = "torch"
    """What rollouts are computed with. `vllm`: vLLM, an extra, with a copy of the base of its own."""
    batch_size: PositiveInt = 64
    """Episodes decoded side by side."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of rollouts; evaluation is greedy."""
    shadow: Literal["auto", "always", "never"] = "auto"
    """Compute rollouts with a plain copy of the 4-bit weights, the adapter added: faster for many rows, but it takes
    memory. `auto`: where the memory plan has room for it. vLLM keeps its own copy in 4 bits on a GPU unless `always`,
    and never adds the adapter."""


@dataclass(config=_STRICT)
class GRPOStageConfig:
    """A round's stage of GRPO."""

    steps: Count = 100
    """Optimizer steps a round."""
    questions_per_step: PositiveInt = 16
    """Questions of an optimizer step, each with its group of rollouts."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Rollouts a question."""
    learning_rate: PositiveFloat = 1e-5
    """Of the optimizer, after the warm-up; it stays so."""
    warmup_ratio: Fraction = 0.1
    """Share of the stage's steps in which the learning rate rises from 0."""
    clip: PositiveFloat = 0.2
    """How far from 1 the ratio of a token's probabilities, now and when it was sampled, may count."""
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.001
    """Weight of the KL to the adapter as the stage began; 0 leaves the reference pass out."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass, of prompts, completions and padding; a longer trajectory goes alone."""
    max_grad_norm: PositiveFloat = 1.0
    """A gradient that is longer than this is shortened to it."""


@dataclass(config=_STRICT)
class OFSDStageConfig:
    """A round's stage of offline self-distillation."""

    enabled: bool = True
    """Off, a round is GRPO alone."""
    questions: PositiveInt = 512
    """Training questions answered afresh to find pairs."""
    rollouts: Annotated[int, Field(ge=2)] = 5
    """K: fresh rollouts a question."""
    epochs: PositiveInt = 1
    """Passes over the pairs."""
    batch_size: PositiveInt = 16
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass, of prompts, completions and padding; a longer pair goes alone. A pair
    counts with the longer of its two passes, which is the teacher's where a reference is shown."""
    learning_rate: PositiveFloat = 1e-5
    """Of the optimizer, after the warm-up; it stays so."""
    warmup_ratio: Fraction = 0.1
    """Share of the stage's steps in which the learning rate rises from 0."""
    max_grad_norm: PositiveFloat = 1.0
    """A gradient that is longer than this is shortened to it."""
    objective: Literal["distill", "sft"] = "distill"
    """`distill`: KL to the teacher along the student's tokens. `sft`: cross-entropy on the reference (a baseline)."""
    teacher: Literal["snapshot", "base", "live"] = "snapshot"
    """`snapshot`: the adapter as the stage began, frozen. `base`: adapter disabled. `live`: the adapter as it moves."""
    teacher_prompt: Literal["privileged", "plain", "foreign"] = "privileged"
    """`privileged`: the question with its reference. `plain`: the control. `foreign`: another question's reference."""
    reference: Literal["efficient", "random_correct", "most_different", "random"] = "efficient"
    """Which rollout of the student's group is the reference. `efficient`: the correct one with the fewest searches, the
    method. `random_correct`: any correct one but the student. `most_different`: the correct one that differs most from
    the student. `random`: any one but the student, whatever it earned: no privilege. All have the same students."""
    reference_documents: bool = True
    """Show the reference with the documents it retrieved."""
    students: Literal["any", "wrong", "correct"] = "any"
    """Which siblings may be students: any less efficient or wrong one, only wrong ones, only correct ones."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student), the method. The others are ablations (JSD with weight 0.5)."""
    clip: Annotated[float, Field(ge=0.0)] = 0.0
    """Pointwise clip of `forward_kl`, in nats: the most that one vocabulary entry adds to a token's loss; 0: none. A
    small one (0.05) can turn the gradient of a clipped token round."""
    top_k: Count = 0
    """`forward_kl` over the teacher's likeliest tokens, the rest as one; 0: the full vocabulary, exactly."""
    tokens: Literal["all", "search"] = "all"
    """Which model-written tokens are in the loss: all, or only those of search turns."""


@dataclass(config=_STRICT)
class BudgetConfig:
    """What training may spend, so that runs compare at equal cost. The rounds end with whichever is used up first."""

    updates: Count = 0
    """Optimizer updates of GRPO and OFSD together; 0: no limit."""
    seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds of training, rollouts included, evaluation and diagnostics not; 0: no limit. The update in which they run
    out is the last."""


@dataclass(config=_STRICT)
class CollapseConfig:
    """When a GRPO stage counts as collapsed, by means over its last steps, and what is done then. A threshold of null
    is never reached. The rates must also have risen by 0.2 since the stage's first step."""

    action: Literal["warn", "stop", "rollback"] = "warn"
    """`warn`: a line on the terminal, once a stage for each figure. `stop`: then the stage ends, is kept and evaluated,
    and the run ends with it. `rollback`: the stage ends, the adapter becomes that of the best evaluated stage before
    it, and the run goes on with the next one."""
    window: PositiveInt = 5
    """Steps that a mean is over; none is looked at before there are so many."""
    unanswered: Fraction | None = 0.5
    """Share of episodes without an answer."""
    invalid: Fraction | None = 0.5
    """Share of episodes with a turn that is neither a search nor an answer."""
    no_search: Fraction | None = 0.9
    """Share of episodes without a search."""
    repetition: Fraction | None = 0.5
    """Share of the policy's 4-grams of tokens that their episode had before."""
    all_wrong: Fraction | None = 0.95
    """Share of groups in which no rollout is right. Groups that are all right are no sign of a collapse."""
    kl: PositiveFloat | None = 1.0
    """KL to the adapter as the stage began, in nats a token; there is none with `grpo.kl_coefficient` 0."""
    reward_drop: Fraction | None = 0.5
    """Share of the best mean reward that was lost since; less than 0.1 of reward is never a drop."""


@dataclass(config=_STRICT)
class LoggingConfig:
    """How a run is watched; none of it changes what a run does, so a resumed one may have other values."""

    report_to: Trackers = field(default_factory=list)
    """The Trainer's `report_to`: `tensorboard`, `trackio`, `wandb`, or several; each is an extra to install."""
    project: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)] | None = None
    """The runs' project in wandb and trackio; null: `WANDB_PROJECT` for wandb, else `searche1-lite`."""
    samples: Count = 4
    """Trajectories in a table of samples on the terminal; 0: no tables."""
    samples_every: Count = 0
    """Show the table after every so many GRPO steps; 0: once a stage."""


@dataclass(config=_STRICT)
class CheckpointConfig:
    """What of a run is kept to go on from. It changes nothing that a run does: a resumed one may have other values."""

    every_steps: Count = 10
    """Optimizer steps between two checkpoints within a stage; 0: only one at its end, and one where it is stopped."""
    keep_stages: Count = 0
    """Stages whose checkpoints are kept: the last so many, and the one with the best EM; 0: all."""


@dataclass(config=_STRICT)
class Config:
    """A whole run."""

    seed: Count = 0
    """Every random number of a run follows from it."""
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
