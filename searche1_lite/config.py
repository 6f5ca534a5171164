"""Every setting, one dataclass per concern, read once at the edge.

`load_config` merges a preset, a YAML file and `key=value` overrides, in that order, and refuses unknown keys and
impossible values with one line that names the key.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from searche1_lite.errors import UserError
from searche1_lite.yaml_file import as_yaml, parse_yaml, read_yaml

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
    lora_alpha: PositiveInt = 32
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: slower, far less memory."""


@dataclass(config=_STRICT)
class SearchConfig:
    corpus: str | None = None
    """`demo` for the shipped fictional wiki, a JSONL file (`.gz` too) with `id` and `contents`, or a folder of text
    files. Its index is built on first use, in the cache folder."""
    index: str | None = None
    """A ready index instead: a Lucene index's folder, one of Pyserini's prebuilt indexes by name, such as
    `wikipedia-dpr-100w`, or `wiki-18` for Search-R1's. One that stores no text takes it from `corpus`."""
    k: PositiveInt = 3
    """Passages a search; each is cut to `protocol.max_document_tokens`."""
    k1: Annotated[float, Field(ge=0.0)] = 0.9
    b: Fraction = 0.4
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
    document_template: str = "Doc {rank} (Title: {title}) {text}\n"
    no_result_message: str = "No results."
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
    max_invalid_turns: Count = 1
    """Corrections before the episode is given up."""
    max_prompt_tokens: PositiveInt = 2048
    max_turn_tokens: PositiveInt = 500
    """Tokens the policy may write in one turn."""
    max_document_tokens: PositiveInt = 160
    """Each passage is cut to this."""
    max_completion_tokens: PositiveInt = 3072
    """Tokens of a whole episode after the prompt, documents included."""


@dataclass(config=_STRICT)
class DataConfig:
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
    steps: Count = 100
    """Optimizer steps a round."""
    questions_per_step: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = 5
    """Rollouts a question."""
    learning_rate: PositiveFloat = 1e-5
    warmup_ratio: Fraction = 0.1
    clip: PositiveFloat = 0.2
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.001
    """Weight of the KL to the adapter as the stage began; 0 leaves the reference pass out."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens per forward and backward pass, of prompts, completions and padding; a longer trajectory goes alone."""
    max_grad_norm: PositiveFloat = 1.0


@dataclass(config=_STRICT)
class OFSDStageConfig:
    enabled: bool = True
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
    warmup_ratio: Fraction = 0.1
    max_grad_norm: PositiveFloat = 1.0
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


DEFAULT_PRESETS = {8: "qwen2.5-3b-8gb", 12: "qwen2.5-3b-12gb", 16: "qwen2.5-3b-16gb", 24: "qwen2.5-3b-24gb"}
"""What `train` without a preset or a file takes, by the GPU's memory in GB."""


def default_preset(gpu_gib: float | None) -> str:
    """The preset for a GPU of this size.

    Raises:
        UserError: without a GPU, or with one too small.
    """
    if gpu_gib is None:
        raise UserError(
            "no NVIDIA GPU found, and no preset or config given; try --preset demo, which needs none, or name one of "
            f"{', '.join(preset_names())} (`searche1-lite doctor` tells why a GPU is not seen)"
        )
    # A card's usable memory is a little less than its name says.
    fitting = [size for size in DEFAULT_PRESETS if size <= gpu_gib * 1.06]
    if not fitting:
        raise UserError(f"the GPU has {gpu_gib:.1f} GiB, and no preset is made for less than 8; give one with --preset")
    return DEFAULT_PRESETS[max(fitting)]


_SECTIONS = [item.name for item in fields(Config) if is_dataclass(item.type)]

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> Config:
    """The run's settings: a preset, then a YAML file, then `key.sub=value` overrides; the last one said counts.

    A corpus takes the place of an index that was named alone by one of those before it, such as a preset's Wikipedia.

    Args:
        before: settings under nested or dotted keys that count less than the overrides, and more than the file.
        after: such settings that count more than all else.

    Raises:
        UserError: unknown preset, key or file, broken YAML, or an impossible value; names it and what is allowed.
    """
    data: dict[str, Any] = {}
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"no preset {preset!r}; there are: {', '.join(preset_names())}")
        _merge(data, read_yaml(PRESETS / f"{preset}.yaml"))
    if file is not None:
        _lay_over(data, read_yaml(Path(file)))
    _lay_over(data, _nested(before or {}))
    given: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
            raise UserError(f"{override!r} is not an override; write key=value, such as grpo.steps=20")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value in {override!r} is not valid YAML; quote it") from error
        _merge(given, _nested({key.strip(): value}))
    _lay_over(data, given)
    _lay_over(data, _nested(after or {}))
    return parse_config(data)


def _lay_over(data: dict[str, Any], given: dict[str, Any]) -> None:
    """`_merge`, where a corpus that is given now is what will be searched."""
    there, now = data.get("search"), given.get("search")
    if isinstance(there, dict) and isinstance(now, dict) and there.get("corpus") is None and now.get("corpus"):
        there.pop("index", None)  # where a corpus is there already, the two belong together
    _merge(data, given)


def parse_config(data: dict[str, Any]) -> Config:
    """A `Config` from nested dictionaries, checked; see `load_config` for the errors."""
    _check_keys(data, Config, "")
    try:
        config = TypeAdapter(Config).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        # Beyond section and key, Pydantic names the branch of a union that failed.
        depth = 2 if first["loc"][0] in _SECTIONS else 1
        key = ".".join(str(part) for part in first["loc"][:depth])
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{key}={first['input']!r} is impossible: {reason}") from error
    _check_together(config)
    return config


def dump_config(config: Config) -> str:
    """The settings as YAML that `load_config` reads back as the same."""
    return as_yaml(asdict(config))


def flatten(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key, as an override names it."""
    flat: dict[str, Any] = {}
    for key, value in asdict(config).items():
        flat |= (
            {f"{key}.{inner}": setting for inner, setting in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


_WITHOUT_EFFECT = ("logging.", "checkpoint.", "search.timeout_seconds", "search.retries")


def what_counts(config: Config) -> dict[str, Any]:
    """`flatten`, without the settings that change nothing in what a run comes to."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(_WITHOUT_EFFECT)}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the dots of their keys taken for sections."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        _merge(nested, value)
    return nested


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)  # later ones are merged into it, and `other` may serve for other runs


def _check_keys(data: dict[str, Any], section: type, prefix: str) -> None:
    known = {item.name: item for item in fields(section)}
    for key, value in data.items():
        if key not in known:
            raise UserError(f"unknown config key {prefix}{key}; {_hint(str(key), prefix, list(known))}")
        kind = known[key].type
        if isinstance(kind, type) and is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(
                    f"{prefix}{key} is a section; set one of its keys, such as {prefix}{key}.{fields(kind)[0].name}"
                )
            _check_keys(value, kind, f"{prefix}{key}.")
        elif isinstance(value, bool) and kind is not bool:
            # Pydantic would read true as 1.
            choices = f"; choose {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
            raise UserError(
                f"{prefix}{key}={str(value).lower()} is impossible: this is not a true/false setting{choices}"
            )


def _hint(key: str, prefix: str, known: list[str]) -> str:
    """What an unknown key was meant to be: a neighbour misspelt, or a key of another section."""
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [dotted for dotted in flatten(Config()) if dotted.rpartition(".")[2] == key]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else f"known here: {', '.join(known)}"


def _check_together(config: Config) -> None:
    """Refuses values that are each possible and together are not."""
    for key in ("clip", "top_k"):
        if getattr(config.ofsd, key) and (config.ofsd.divergence, config.ofsd.objective) != ("forward_kl", "distill"):
            raise UserError(f"ofsd.{key} is for ofsd.divergence=forward_kl and ofsd.objective=distill; set it to 0")
    for key, needed in {
        "plain_template": ["{question}"],
        "privileged_template": ["{question}", "{reference}"],
        "direct_template": ["{question}"],
        "rag_template": ["{question}", "{documents}"],
        "information_template": ["{documents}"],
        "document_template": ["{text}"],
    }.items():
        for placeholder in needed:
            if getattr(config.protocol, key).count(placeholder) != 1:
                raise UserError(f"protocol.{key} must contain {placeholder} exactly once")
    if config.protocol.max_turn_tokens > config.protocol.max_completion_tokens:
        raise UserError(
            f"protocol.max_turn_tokens={config.protocol.max_turn_tokens} must be at most "
            f"protocol.max_completion_tokens={config.protocol.max_completion_tokens}"
        )
