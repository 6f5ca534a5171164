"""The model card of an exported policy: what it is, what it scored, and how it has to be prompted. Pure functions.

The code in it is complete but for a search engine, and a test runs it.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import yaml

from searche1_lite.config import Config, ProtocolConfig, SearchConfig, dump_config
from searche1_lite.policy.stopping import STOP_TAGS

_LIBRARIES = ("searche1-lite", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, as a card may name it."""

    name: str
    kind: Literal["demo", "folder", "hub"]
    """`demo`: it ships with this package. `folder`: only its last part is told, it is on nobody else's machine."""
    revision: str | None = None
    pinned: bool = False
    """Whether the run asked for that revision; else it was the newest one when this was exported."""
    tokenizer_class: str = "AutoTokenizer"
    """What loads its tokenizer as its files declare it."""
    has_chat_template: bool = True
    in_four_bits: bool = True
    """Whether the adapter was trained over it in NF4."""


def model_card(title: str, base: Base, config: Config | None, summary: dict[str, Any] | None, *, merged: bool) -> str:
    """The text of `README.md`.

    Args:
        title: also where the code loads it from: the repository's or the folder's name.
        config: the run's settings, as they may be shown; None, as `summary` is, where the run is not known.
        summary: the run's, up to the exported stage.
        merged: one model, instead of an adapter.
    """
    parts = [_front_matter(base, merged), f"# {title}", _introduction(base, config, summary, merged)]
    if config is not None and summary is not None:
        parts += ["## Figures", _stage_table(summary["stages"]), _what_was_measured(config, summary, merged)]
    code = _fenced(_code(title, base, config, merged), "python")
    parts += ["## How to prompt it", _prompting(config is not None), code]
    if merged:
        parts.append(
            f"`vllm serve {title}` should serve it as any model of its architecture (not tried); ask for completions "
            f"with `stop={list(STOP_TAGS)}` and `include_stop_str_in_output=True`, and go on as above."
        )
    parts += ["## Limits", _limits(base, config, merged), "## Licence", _licence(base, merged)]
    if config is not None:
        parts += ["## Settings", _fenced(dump_config(config).rstrip(), "yaml")]
    parts += ["## Versions", _versions()]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: Base, merged: bool) -> str:
    data: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["search-agent", "grpo", "self-distillation", "lora", "searche1-lite"],
    }
    if base.kind == "hub":
        data |= {"base_model": base.name, "base_model_relation": "finetune" if merged else "adapter"}
    if base.kind == "demo":
        data["license"] = "apache-2.0"
    else:
        data |= {"license": "other", "license_name": "see-the-base-model"}
        if base.kind == "hub":
            data["license_link"] = f"https://huggingface.co/{base.name}"
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _introduction(base: Base, config: Config | None, summary: dict[str, Any] | None, merged: bool) -> str:
    when = "" if base.pinned else ", the newest when this was exported"
    at = f" (revision `{base.revision}`{when})" if base.revision else ""
    what = "A search agent: it reasons, asks a search engine, reads what comes back, and answers."
    how = f"It is a LoRA adapter over `{base.name}`{at}, trained with searche1-lite"
    if config is not None:
        in_bits = "the base in 4 bits (NF4)" if base.in_four_bits else "the base as stored"
        given = (summary or {}).get("reward", "exact match")
        reward = "the reward of exact match" if given == "exact match" else f"a reward of its own (`{given}`)"
        ofsd = " and offline self-distillation (OFSD)" if config.ofsd.enabled else ""
        how += f" by GRPO{ofsd}, over {in_bits}, with {reward}, seed {config.seed}"
    if not merged:
        return f"{what} {how}."
    arithmetic = "Here it is merged into the base's weights, in bf16."
    if base.in_four_bits:
        arithmetic += (
            " It was added to what the base's 4 bits stand for, since that is what it was trained over; added to the "
            "weights that those were quantised from, it would answer a little differently."
        )
    return f"{what} {how}. {arithmetic}"


def _stage_table(stages: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| stage | EM | 95% interval | F1 | searches/question | no search | invalid | training, s |",
        "|---|" + "---:|" * 7,
    ]
    for stage in stages:
        low, high = stage["em_ci95"]
        rows.append(
            f"| {stage['name']} | {stage['em']:.3f} | {low:.3f}-{high:.3f} | {stage['f1']:.3f} "
            f"| {stage['searches_per_question']:.2f} | {stage['no_search_rate']:.3f} | {stage['invalid_rate']:.3f} "
            f"| {stage['seconds']:.0f} |"
        )
    return "\n".join(rows)


def _what_was_measured(config: Config, summary: dict[str, Any], merged: bool) -> str:
    asked, trained = summary["evaluation"], summary["training"]
    again = " They are of the policy as it was trained; the merged weights were not measured again." if merged else ""
    return (
        f"The last row is this one. Exact match (SQuAD's normalisation) on {asked['n']} questions of "
        f"`{asked['data']}`, decoded greedily, with the retriever `{summary['retriever']}` and {config.search.k} "
        f"passages a search; trained on {trained['n']} questions of `{trained['data']}`. One seed; the intervals are "
        f"over questions.{again}"
    )


def _prompting(known: bool) -> str:
    stop = " and ".join(f"`{tag}`" for tag in STOP_TAGS)
    unknown = "" if known else " The templates are the toolkit's own: which ones it was trained with is not known here."
    return (
        "The prompt is one user message in the chat template. Generation stops at "
        f"{stop}; after a search, the documents are put behind what it wrote, and it goes on. It does well only in the "
        f"very words it was trained with, which are these.{unknown}"
    )


def _code(title: str, base: Base, config: Config | None, merged: bool) -> str:
    protocol, k = (config.protocol, config.search.k) if config is not None else (ProtocolConfig(), SearchConfig().k)
    opening, closing = protocol.information_template.split("{documents}")
    values = {
        "imports": _imports(base, merged),
        "load": _loading(title, base, merged),
        "tokenizer_class": base.tokenizer_class,
        "title": repr(title),
        "prompt": repr(protocol.plain_template.replace("{max_searches}", str(protocol.max_searches))),
        "document": repr(protocol.document_template),
        "document_tokens": str(protocol.max_document_tokens),
        "render": _RENDERED if base.has_chat_template else "prompt",
        "turns": str(protocol.max_searches + 1),
        "turn_tokens": str(protocol.max_turn_tokens),
        "stop": repr(list(STOP_TAGS)),
        "k": str(k),
        "opening": repr(opening),
        "closing": repr(closing),
        "nothing": repr(protocol.no_result_message),
        "max_searches": str(protocol.max_searches),
        "no_more": repr(protocol.no_more_searches_message),
    }
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], _CODE)


def _imports(base: Base, merged: bool) -> str:
    if merged:
        return f"from transformers import AutoModelForCausalLM, {base.tokenizer_class}"
    imports = (
        "from peft import PeftModel\n"
        f"from transformers import AutoModelForCausalLM, BitsAndBytesConfig, {base.tokenizer_class}"
    )
    if base.kind == "demo":
        imports += "\n\nfrom searche1_lite.policy.model import resolve_model  # the demo's base comes with that package"
    return imports


def _loading(title: str, base: Base, merged: bool) -> str:
    if merged:
        return f'model = AutoModelForCausalLM.from_pretrained({title!r}, dtype="auto", device_map={{"": device}})'
    name = {"hub": repr(base.name), "folder": repr(f"PATH/OF/{base.name}"), "demo": "resolve_model('demo')"}[base.kind]
    revision = f", revision={base.revision!r}" if base.revision else ""
    bits = ""
    if base.in_four_bits:
        bits = "\n    quantization_config=BitsAndBytesConfig("
        bits += '\n        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,'
        bits += "\n        bnb_4bit_compute_dtype=dtype,\n    ),"
    return f"""dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
base = AutoModelForCausalLM.from_pretrained(
    {name}{revision}, dtype=dtype, device_map={{"": device}},{bits}
)
model = PeftModel.from_pretrained(base, {title!r})"""


_RENDERED = """tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )"""

_CODE = '''import torch
@imports@

device = "cuda" if torch.cuda.is_available() else "cpu"
@load@
model.eval()
tokenizer = @tokenizer_class@.from_pretrained(@title@)


def search(query):
    """Your search engine: pairs of title and text, the best first."""
    raise NotImplementedError


def encode(text):
    return tokenizer.encode(text, add_special_tokens=False)


def encode_document(rank, title, text):
    document = @document@.replace("{rank}", str(rank)).replace("{title}", title).replace("{text}", text)
    document = document.replace("<", "‹").replace(">", "›")  # it may not hold tags
    return encode(document)[:@document_tokens@]


def answer(question):
    prompt = @prompt@
    prompt = prompt.replace("{question}", question)
    ids = encode(@render@)
    for searches in range(1, @turns@ + 1):
        given = torch.tensor([ids], device=device)
        written = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
            max_new_tokens=@turn_tokens@, stop_strings=@stop@, tokenizer=tokenizer,
        )[0, len(ids):].tolist()
        text = tokenizer.decode(written)
        if "</search>" not in text:
            found = text.rpartition("<answer>")[2].partition("</answer>")
            return found[0].strip() if found[1] else None
        query = text.rpartition("<search>")[2].partition("</search>")[0].strip()
        documents = [encode_document(rank, *found) for rank, found in enumerate(search(query)[:@k@], start=1)]
        ids += written + encode(@opening@) + (sum(documents, []) or encode(@nothing@)) + encode(@closing@)
        if searches == @max_searches@:
            ids += encode(@no_more@)
    return None
'''


def _limits(base: Base, config: Config | None, merged: bool) -> str:
    lines = [
        "It was rewarded for its short answers and nothing else: it may be wrong in a convincing way, and what it "
        "finds is only as good as what it searches.",
        "The figures hold for this retriever and this corpus.",
        "The code above asks greedily, one question at a time, and turns angle brackets of documents into look-alikes; "
        "the toolkit also keeps a tokenizer's other control tokens out of documents, and corrects a turn that is "
        "neither a search nor an answer.",
    ]
    if merged:
        lines.append("bf16 rounds the merged weights: where two answers are nearly as likely, it may give the other.")
    elif base.kind == "folder":
        lines.append(f"The base `{base.name}` was a folder where this was trained; you need the very same one.")
    if base.kind == "demo":
        lines.append("The demo's world is made up and its policy tiny: it is of no use in the real one.")
    if config is None:
        lines.append("The run that trained it was not at hand when it was exported: how good it is, is not known.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(base: Base, merged: bool) -> str:
    if base.kind == "demo":
        return "Apache-2.0, as the toolkit and the demo's base."
    derived = "contains the base's weights, changed" if merged else "is of use only with the base"
    return (
        f"Not stated here: this {derived}, so the terms of `{base.name}` apply to it. Whoever passes it on has to "
        "check them, and to replace `license: other` above with what follows from them."
    )


def _versions() -> str:
    found = []
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return f"Exported with {', '.join(found)}."


def _fenced(text: str, language: str) -> str:
    """A code block whose fence no line of `text` can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
