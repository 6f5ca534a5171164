"""vLLM as the engine of rollouts (`engine.backend=vllm`): its scheduler and its paged cache in place of our slots.

`rollout.py` plays the same episodes with it: a turn is a request of token ids, its prompt all that the episode holds so
far. Prefix caching makes vLLM read nothing but what is new of it. Where a turn ends is decided by our token automaton,
which cuts what vLLM wrote and aborts the request; random numbers come from a seed of each turn's own.

The base is vLLM's own copy beside the trainer's: on a GPU quantised to NF4 from the same files, or plain weights with
`engine.shadow=always`; on a CPU, where vLLM has no 4-bit kernels, what the trainer's 4 bits stand for, plain. The
adapter is never added to it: after each update it is saved and passed as a LoRA request under a new id and name, by
which the prefix cache is keyed too.

What differs from the trainer: kernels, and so the order of sums and, in bf16, where they are rounded.
`sampling_logprob_difference` in `metrics.jsonl` shows how far the two are apart.
Asleep between rollouts (on a GPU), vLLM gives its memory to training, and its cache up.
"""

import importlib.util
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from searche1_lite.config import Config
from searche1_lite.policy.adapter import ADAPTER, adapter_digest, save_adapter, use_adapter
from searche1_lite.policy.memory import head_width
from searche1_lite.policy.model import model_folder, shadow_weights
from searche1_lite.policy.stopping import end_ids, tag_automaton
from searche1_lite.policy.vllm_decoder import VllmDecoder
from searche1_lite.runtime.errors import UserError

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM sets room aside for."""

BLOCK = 128
"""Tokens of the largest block that vLLM's cache may be cut into: a row wastes less than that."""


def check_installed() -> None:
    """Refuses `engine.backend=vllm` where there is no vLLM.

    Raises:
        UserError: says what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine.backend=vllm needs vLLM, which is not installed: pip install -e '.[vllm]' in the toolkit's "
            "checkout, or set engine.backend=torch"
        )


def check_vocabulary(ours: Mapping[str, int], theirs: Mapping[str, int], our_rows: int, their_rows: int) -> None:
    """Ids must mean the same to both, as nothing but ids goes to and fro.

    Args:
        ours, theirs: token -> id, of the trainer's tokenizer and of vLLM's.
        our_rows, their_rows: of the two models' output embeddings.

    Raises:
        UserError: names the first token that differs, or the two sizes.
    """
    remedy = "give model.name a folder with one tokenizer and its model, or set engine.backend=torch"
    if our_rows != their_rows:
        raise UserError(f"vLLM's model has {their_rows} tokens and the trainer's {our_rows}; {remedy}")
    differing = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if differing:
        token = min(differing, key=lambda token: (ours.get(token, our_rows), token))
        raise UserError(
            f"vLLM's vocabulary is not the trainer's: {token!r} is {theirs.get(token)} there and {ours.get(token)} "
            f"here ({len(differing)} tokens differ); {remedy}"
        )


def lora_room(rank: int) -> int:
    """The least rank vLLM sets room aside for that an adapter of `rank` fits in."""
    if rank > LORA_RANKS[-1]:
        raise UserError(
            f"model.lora_rank={rank} is more than vLLM takes; use {LORA_RANKS[-1]} at most, or set engine.backend=torch"
        )
    return next(room for room in LORA_RANKS if room >= rank)


def cache_bytes(config: Config, shape: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of a full batch of full-length episodes, which is what our own cache takes.

    Where prompts are longer, as those that show a reference are, vLLM holds requests back.
    """
    text = shape.get_text_config()
    entries = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text)
    usual = config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens
    tokens = max(config.engine.batch_size * (usual + BLOCK), longest_text(config, text) + BLOCK)
    return tokens * entries * dtype.itemsize


def longest_text(config: Config, shape: PretrainedConfig) -> int:
    """Tokens of the longest episode there can be: its prompt may show another one, or the documents of a baseline."""
    protocol = config.protocol
    documents = config.search.k * protocol.max_document_tokens
    most = protocol.max_prompt_tokens + protocol.max_completion_tokens
    most += max(protocol.max_completion_tokens, documents) + protocol.max_prompt_tokens
    return min(most, shape.get_text_config().max_position_embeddings)


class VllmEngine:
    """One vLLM in this process, for all rollouts of a run.

    Args:
        config: of the run.
        model: the trainer's policy.
        tokenizer: the trainer's.

    Raises:
        UserError: if vLLM is missing or cannot serve this model, or its vocabulary is another one.
    """

    def __init__(self, config: Config, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_installed()
        # In this process: nothing is started that would need a main module or a GPU of its own, and steps are in order.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer has these threads too
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        embeddings = model.get_base_model().get_output_embeddings().weight
        cuda = embeddings.device.type == "cuda"
        self.ends = end_ids(model, tokenizer)
        self.automaton = tag_automaton(tokenizer, embeddings.shape[0])
        self._model, self._sleeps = model, cuda
        self._base = self._update = None  # type: TemporaryDirectory[str] | None
        self._digest: str | None = None
        self._lora: Any = None
        self._loras, self._requests = itertools.count(1), itertools.count()
        quantized = cuda and config.model.quantization == "nf4" and config.engine.shadow != "always"
        folder = source = model_folder(config.model)
        if config.model.quantization == "nf4" and not quantized:
            self._base = TemporaryDirectory(prefix="vllm-base-")
            folder = Path(self._base.name)
            save_plain_base(model, folder)
        shape = model.get_base_model().config
        longest = longest_text(config, shape)
        if cuda:  # it wants this much to be free; what it takes is its weights and the cache that it is told to make
            free, total = torch.cuda.mem_get_info()
            special: dict[str, Any] = {"gpu_memory_utilization": 0.95 * free / total}
        else:  # what vLLM 0.32 does after a part of a prompt, with a seed, is for GPUs alone and fails here
            special = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, longest)}
        room = lora_room(model.peft_config[ADAPTER].r)
        try:
            from vllm import EngineArgs, LLMEngine

            self._engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=str(folder),
                    tokenizer=str(source),
                    trust_remote_code=config.model.trust_remote_code,
                    dtype=str(embeddings.dtype).removeprefix("torch."),
                    quantization="bitsandbytes" if quantized else None,
                    max_model_len=longest,
                    max_num_seqs=config.engine.batch_size,
                    kv_cache_memory_bytes=cache_bytes(config, shape, embeddings.dtype),
                    enable_prefix_caching=True,
                    enable_lora=True,
                    max_loras=1,
                    max_lora_rank=room,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    enforce_eager=not cuda,
                    enable_sleep_mode=cuda,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **special,
                )
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as many kinds as there are things that it cannot serve
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"vLLM cannot serve {config.model.name!r}: {reason} (set engine.backend=torch to do without it)",
                exit_code=1,
            ) from error
        theirs = self._engine.get_tokenizer().get_vocab()
        check_vocabulary(tokenizer.get_vocab(), theirs, embeddings.shape[0], self._engine.model_config.get_vocab_size())
        self.sleep()

    def decoder(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int,
        columns: int,
        *,
        temperature: float = 1.0,
        greedy: bool = False,
        logprobs: bool = False,
    ) -> VllmDecoder:
        """For a rollout with the policy as it is now; the arguments are those of `engine.Decoder`.

        Raises:
            UserError: if the episodes may become longer than vLLM was started for.
        """
        most = self._engine.model_config.max_model_len
        if columns > most:
            raise UserError(
                f"an episode of {columns} tokens is more than the {most} that vLLM was started for; "
                "lower protocol.max_completion_tokens, or set engine.backend=torch"
            )
        if self._sleeps and self._engine.is_sleeping():
            self._engine.wake_up()
        lora = self._adapter_of(model)
        return VllmDecoder(self, lora, slots, temperature=temperature, greedy=greedy, logprobs=logprobs)

    def _adapter_of(self, model: PeftModel) -> Any:
        """The LoRA request for the policy as it is now; None where it computes what the base does."""
        from vllm.lora.request import LoRARequest

        if any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)):
            return None
        if model.active_adapter != ADAPTER:
            raise ValueError(f"vLLM acts with the adapter {ADAPTER!r}, not with {model.active_adapter!r}")
        digest = adapter_digest(model)
        if digest == self._digest:
            return self._lora
        if self._lora is not None:
            self._engine.remove_lora(self._lora.lora_int_id)
        if self._update is not None:
            self._update.cleanup()
        self._engine.reset_prefix_cache()  # no request would find what is there any more; it is room
        self._lora, self._update, self._digest = None, None, digest
        if digest is not None:
            number = next(self._loras)
            self._update = TemporaryDirectory(prefix=f"vllm-adapter-{number}-")
            save_adapter(model, Path(self._update.name))
            self._lora = LoRARequest(f"update-{number}", number, self._update.name)
            self._engine.add_lora(self._lora)
        return self._lora

    def ask(self, ids: Sequence[int], settings: Mapping[str, Any], lora: Any) -> str:
        """Adds a request; its name."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        name = str(next(self._requests))
        parameters = SamplingParams(**settings, output_kind=RequestOutputKind.DELTA)
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=list(ids)), parameters, lora_request=lora)
        return name

    def step(self) -> list[tuple[str, list[int], list[float], bool]]:
        """What each request got: its name, ids, log-probs if asked for, and whether that was all."""
        found = []
        for output in self._engine.step():
            (one,) = output.outputs
            ids = list(one.token_ids)
            places = zip(ids, one.logprobs or (), strict=False)
            found.append((output.request_id, ids, [place[token].logprob for token, place in places], output.finished))
        return found

    def abort(self, names: list[str]) -> None:
        """Ends requests."""
        if names:
            self._engine.abort_request(names)

    def sleep(self) -> None:
        """Gives the GPU's memory back until the next rollout; weights wait in the computer's memory."""
        if self._sleeps:
            self._engine.sleep(level=1)


def save_plain_base(model: PeftModel, folder: Path) -> None:
    """Writes what the base computes with, without 4 bits and without adapter, in the compute dtype."""
    base = model.get_base_model()
    with torch.no_grad(), use_adapter(model, None), shadow_weights(model):
        weights = {name: value.detach().cpu().contiguous() for name, value in base.state_dict().items()}
    settings = {key: value for key, value in base.config.to_dict().items() if key != "quantization_config"}
    output = base.get_output_embeddings()
    settings["tie_word_embeddings"] = tied = output.weight is base.get_input_embeddings().weight
    if tied:
        heads = {id(module): name for name, module in base.named_modules()}
        del weights[f"{heads[id(output)]}.weight"]
    type(base.config).from_dict(settings).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
