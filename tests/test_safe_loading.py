"""Nothing that is loaded can run code, and what is broken or made to break is refused in one line."""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from conftest import fresh_policy
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import searche1_lite
from searche1_lite.bench.doctor import model_shape
from searche1_lite.config import Config, ModelConfig, load_config
from searche1_lite.policy.adapter import load_adapter_weights, save_adapter
from searche1_lite.policy.model import load_policy
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.yaml_file import parse_yaml, read_yaml
from searche1_lite.search.bm25 import BM25Retriever
from searche1_lite.search.download import unpack
from searche1_lite.search.store import JsonlStore
from searche1_lite.train.run_folder import RunFolder

PICKLES = (
    "adapter_model.bin",
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
)
"""Names under which libraries look for pickles."""


class _Payload:
    """What a pickle can do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self._trace,)


def malicious(trace: Path) -> bytes:
    return pickle.dumps(_Payload(trace))


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be one that a line can hold."""
    text = str(error.value)
    assert "\n" not in text.strip() and 20 < len(text) < 600
    return text


def model_config(folder: Path, **changes: object) -> ModelConfig:
    return ModelConfig(name=str(folder), lora_rank=4, lora_alpha=8, **changes)


@pytest.fixture
def base(tiny_policy_folder: Path, tmp_path: Path) -> Path:
    """A base model's folder of one's own, to spoil."""
    return Path(shutil.copytree(tiny_policy_folder, tmp_path / "base"))


@pytest.fixture
def adapter(tiny_policy_folder: Path, tmp_path: Path) -> Path:
    model, _ = fresh_policy(tiny_policy_folder)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_pickle_does_run_where_pickles_are_loaded(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    pickle.loads(malicious(tmp_path / "trace"))
    assert (tmp_path / "trace").exists()


def test_no_module_of_the_package_loads_pickles_or_whole_yaml() -> None:
    for path in Path(searche1_lite.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"} & {
                n.split(".")[0] for n in names
            }
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec"), path
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                assert "allow_pickle=True" not in ast.unparse(node), path
                assert "trust_remote_code=True" not in ast.unparse(node), path


@pytest.mark.parametrize("only", [True, False])
def test_pickles_beside_a_base_model_are_never_loaded(base: Path, tmp_path: Path, only: bool) -> None:
    trace = tmp_path / "trace"
    for name in (*PICKLES, "tokenizer.pkl", "vocab.pkl", "pytorch_model-00001-of-00001.bin"):
        (base / name).write_bytes(malicious(trace))
    if only:
        (base / "model.safetensors").unlink()
        with pytest.raises(UserError, match="only safetensors are loaded") as error:
            load_policy(model_config(base), seed=0)
        refusal(error)
    else:
        load_policy(model_config(base), seed=0)
    assert not trace.exists()


@pytest.mark.parametrize("only", [True, False])
def test_pickles_beside_an_adapter_are_never_loaded(
    tiny_policy_folder: Path, adapter: Path, tmp_path: Path, only: bool
) -> None:
    trace = tmp_path / "trace"
    for name in PICKLES:
        (adapter / name).write_bytes(malicious(trace))
    model, _ = fresh_policy(tiny_policy_folder)
    if only:
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(UserError, match="only safetensors are loaded") as error:
            load_adapter_weights(model, adapter)
        refusal(error)
    else:
        load_adapter_weights(model, adapter)
    assert not trace.exists()


def test_a_pickle_in_a_runs_folder_or_a_checkpoint_is_not_loaded(tmp_path: Path, tiny_policy_folder: Path) -> None:
    trace, config = tmp_path / "trace", Config()
    model, _ = fresh_policy(tiny_policy_folder)
    folder = RunFolder(tmp_path / "run", config, False).start()
    folder.save_checkpoint("base", model, {"stages": [{"name": "base", "em": 0.5}], "metrics_size": 0})
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "run" / "checkpoints" / "base"):
        for name in PICKLES:
            (place / name).write_bytes(malicious(trace))
    latest = RunFolder(tmp_path / "run", config, True).latest()
    assert latest is not None
    load_adapter_weights(model, latest[0])
    assert not trace.exists()


def header(entries: dict, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def spoilt_weights(good: Path, trace: Path) -> dict[str, bytes]:
    """Files that are no sound safetensors, by what is wrong."""
    content = good.read_bytes()
    huge = {"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    return {
        "a pickle": malicious(trace),
        "garbage": os.urandom(4096),
        "empty": b"",
        "cut off": content[: len(content) // 2],
        "a header length past the end": struct.pack("<Q", 2**63) + content[8:],
        "a header length of 4 GB": header({}, 2**32),
        "sizes of exabytes": header(huge),
        "offsets that overlap": header(
            {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("x", "y")}
        )
        + b"\0" * 16,
        "negative sizes": header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + b"\0" * 4,
        "a header nested deeply": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "other tensors": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
    }


FAULTS = list(spoilt_weights(Path(__file__), Path("trace")))


@pytest.mark.parametrize("fault", FAULTS)
def test_spoilt_adapter_weights_are_refused(
    tiny_policy_folder: Path, adapter: Path, tmp_path: Path, fault: str, tiny_policy: tuple
) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(spoilt_weights(path, tmp_path / "trace")[fault])
    with pytest.raises(UserError, match="adapter") as error:
        load_adapter_weights(tiny_policy[0], adapter)
    refusal(error)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_spoilt_base_weights_are_refused(base: Path, tmp_path: Path, fault: str) -> None:
    path = base / "model.safetensors"
    path.write_bytes(spoilt_weights(path, tmp_path / "trace")[fault])
    with pytest.raises(UserError, match="cannot load the model") as error:
        load_policy(model_config(base), seed=0)
    refusal(error)
    assert not (tmp_path / "trace").exists()


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_weights_that_are_no_numbers_is_refused_and_changes_nothing(
    tiny_policy_folder: Path, adapter: Path, value: float
) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    changed(
        adapter / "adapter_model.safetensors", lambda weights: next(iter(weights.values())).view(-1)[3:4].fill_(value)
    )
    with pytest.raises(UserError, match="NaN") as error:
        load_adapter_weights(model, adapter)
    refusal(error)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_base_with_weights_that_are_no_numbers_is_refused(base: Path, name: str, quantization: str) -> None:
    changed(base / "model.safetensors", lambda weights: weights[name].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN or infinity") as error:
        load_policy(model_config(base, quantization=quantization), seed=0)
    refusal(error)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("what", ["shape", "missing"])
def test_a_base_whose_tensors_do_not_fit_its_configuration_is_refused(base: Path, what: str, quantization: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        tensor = weights.pop(name)
        if what == "shape":
            weights[name] = tensor[:3].clone()

    changed(base / "model.safetensors", spoil)
    with pytest.raises(UserError, match="cannot load the model") as error:
        load_policy(model_config(base, quantization=quantization), seed=0)
    refusal(error)


def with_settings(folder: Path, file: str, **settings: object) -> None:
    data = json.loads((folder / file).read_text()) | settings
    (folder / file).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("megatron_config", {"x": 1}),
        ("megatron_core", "os"),
        ("target_modules", "(a+)+$"),
        ("target_modules", ["q_proj", "(a|a)*"]),
        ("target_modules", []),
        ("exclude_modules", "(a+)+$"),
        ("rank_pattern", {"(a+)+$": 4}),
        ("layer_replication", [[0, 10_000]]),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("loftq_config", {"loftq_bits": 4}),
        ("use_dora", True),
        ("an_unknown_setting", True),
        ("r", 10**12),
        ("r", 0),
        ("r", True),
        ("r", "4"),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 2.0),
        ("bias", "all"),
        ("revision", ["x"]),
        ("base_model_name_or_path", 7),
    ],
)
def test_an_adapters_settings_beyond_plain_lora_are_refused(
    tiny_policy_folder: Path, adapter: Path, key: str, value: object
) -> None:
    with_settings(adapter, "adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=key) as error:
        load_policy(model_config(tiny_policy_folder), adapter=adapter, seed=0)
    refusal(error)


def test_an_adapter_as_peft_writes_it_is_read_as_peft_reads_it(tiny_policy_folder: Path, adapter: Path) -> None:
    theirs, (model, _) = (
        LoraConfig.from_pretrained(adapter),
        load_policy(model_config(tiny_policy_folder), adapter=adapter, seed=0),
    )
    ours = model.peft_config["default"]
    assert (ours.r, ours.lora_alpha, ours.lora_dropout, ours.bias) == (
        theirs.r,
        theirs.lora_alpha,
        theirs.lora_dropout,
        theirs.bias,
    )
    assert set(ours.target_modules) == set(theirs.target_modules)


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{", '{"r": ' + "9" * 5000 + "}", "\xff", ""])
@pytest.mark.parametrize("file", ["adapter_config.json", "config.json", "tokenizer_config.json", "tokenizer.json"])
def test_broken_json_is_refused(base: Path, adapter: Path, file: str, content: str) -> None:
    folder = adapter if file == "adapter_config.json" else base
    (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_policy(model_config(base), adapter=adapter if folder is adapter else None, seed=0)
    refusal(error)


@pytest.mark.parametrize("shard", ["../../model.safetensors", "/etc/passwd", 5, "x\0.safetensors", "a" * 300, None])
def test_a_list_of_shards_names_files_of_the_folder_only(base: Path, shard: object) -> None:
    (base / "model.safetensors").rename(base.parent / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(UserError, match="cannot load the model") as error:
        load_policy(model_config(base), seed=0)
    refusal(error)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_base_that_asks_for_code_from_the_hub_is_refused(base: Path, key: str) -> None:
    with_settings(base, "config.json", **{key: "attacker/kernel"})
    with pytest.raises(UserError, match="asks for code") as error:
        load_policy(model_config(base), seed=0)
    refusal(error)


def bring_code(base: Path, trace: Path) -> None:
    """Has the folder name Python files of its own for configuration, model and tokenizer."""
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\n"
    (base / "configuration_own.py").write_text(
        code + "from transformers import Qwen2Config\nclass OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    (base / "modeling_own.py").write_text(
        code + "from transformers import Qwen2ForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    (base / "tokenization_own.py").write_text(
        code
        + "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    with_settings(
        base,
        "config.json",
        model_type="own",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    )


def test_a_models_own_code_runs_only_if_the_user_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    bring_code(base, trace)
    assert Config().model.trust_remote_code is False
    with pytest.raises(UserError, match="cannot load the model") as error:
        load_policy(model_config(base), seed=0)
    refusal(error)
    with pytest.raises(UserError):
        model_shape(Config(model=model_config(base)))
    assert not trace.exists()
    model, _ = load_policy(model_config(base, trust_remote_code=True), seed=0)
    assert trace.exists() and type(model.get_base_model()).__name__ == "OwnModel"


def test_code_beside_a_known_model_or_its_tokenizer_does_not_run(base: Path, tmp_path: Path) -> None:
    trace, known = tmp_path / "trace", json.loads((base / "config.json").read_text())["model_type"]
    bring_code(base, trace)
    with_settings(base, "config.json", model_type=known)
    with_settings(
        base,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    for declared in ("OwnTokenizer", "PreTrainedTokenizerFast"):
        with_settings(base, "tokenizer_config.json", tokenizer_class=declared)
        _, tokenizer = load_policy(model_config(base), seed=0)
        assert type(tokenizer).__module__.startswith("transformers.") and not trace.exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "python object": "seed: !!python/object/apply:pathlib.Path.touch [trace]",
    "python module": "seed: !!python/module:os",
    "python name": "seed: !!python/name:os.system",
    "alias bomb": BOMB,
    "alias bomb for one setting": BOMB + "\nmodel: {name: *i}",
    "endless alias": "model: &a {name: *a}",
    "nested lists": "seed: " + "[" * 50_000,
    "nested mappings": "seed: " + "{a: " * 50_000,
    "nested by indent": "\n".join(" " * depth + "a:" for depth in range(600)),
    "impossible date": "seed: 2001-99-99",
    "tag that does not fit": "seed: !!int x",
    "another tag that does not fit": "seed: !!timestamp x",
    "bool tag that does not fit": "seed: !!bool x",
    "many digits": "seed: " + "9" * 10_000,
    "NUL": "seed: \0",
    "key that is a list": "? [a]\n: 1",
    "key that stands twice": "seed: 1\nseed: 2",
    "two documents": "seed: 1\n---\nseed: 2",
    "a mebibyte of anything": "# " + "x" * 2**20,
}


@pytest.mark.parametrize("what", YAML)
def test_hostile_yaml_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(YAML[what])
    with pytest.raises(UserError) as error:
        load_config(None, tmp_path / "config.yaml")
    refusal(error)
    if what != "a mebibyte of anything" and "\n" not in YAML[what] and YAML[what].startswith("seed: "):
        with pytest.raises(UserError):
            load_config(None, None, ["seed=" + YAML[what].removeprefix("seed: ")])
    assert not (tmp_path / "trace").exists()


def test_yaml_of_any_bytes_is_refused_or_read_and_honest_anchors_work(tmp_path: Path) -> None:
    for content in (b"\xff\xfe\x00", b"\x80", os.urandom(200)):
        (tmp_path / "x.yaml").write_bytes(content)
        with pytest.raises(UserError):
            load_config(None, tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("settings: &s {a: 1}\nvariants: {x: *s, y: {<<: *s, b: 2}}")
    assert read_yaml(tmp_path / "x.yaml")["variants"]["y"] == {"a": 1, "b": 2}
    assert parse_yaml("a") == "a"


def archive(place: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(place, "w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return place


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, b"" if fields.get("type") else data


LINKS = {
    "up": member("index/../../escaped"),
    "absolute": member("/tmp/searche1-escaped"),
    "a link to elsewhere": member("index/link", type=tarfile.SYMTYPE, linkname="/etc"),
    "a link upwards": member("index/link", type=tarfile.SYMTYPE, linkname="../../.."),
    "a hard link to elsewhere": member("index/link", type=tarfile.LNKTYPE, linkname="../../escaped"),
    "a device": member("index/device", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": member("index/pipe", type=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("trick", LINKS)
def test_an_archive_writes_only_where_it_is_unpacked(trick: str, tmp_path: Path) -> None:
    packed = archive(tmp_path / "x.tar.gz", member("index/a"), LINKS[trick])
    with pytest.raises(UserError, match="cannot be unpacked|holds 2 folders") as error:
        unpack(packed, tmp_path / "cache" / "out")
    refusal(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "x.tar.gz"]
    assert not any((tmp_path / "cache").iterdir()) and not Path("/tmp/searche1-escaped").exists()


def test_an_archive_whose_one_folder_is_a_link_is_refused(tmp_path: Path) -> None:
    packed = archive(tmp_path / "x.tar.gz", member("index", type=tarfile.SYMTYPE, linkname="."))
    with pytest.raises(UserError, match="folders where an index is one"):
        unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_where_an_index_or_its_table_should_be_is_not_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "index").mkdir()
    for name in ("segments_1", "_0.cfs", "docs.pkl"):
        (tmp_path / "index" / name).write_bytes(malicious(trace))
    with pytest.raises(UserError, match="cannot be read") as error:
        BM25Retriever(tmp_path / "index")
    refusal(error)
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "contents": "Lima"}\n')
    JsonlStore(corpus, tmp_path / "cache")
    (table,) = (tmp_path / "cache").glob("*.npy")
    numpy.save(table, numpy.array([_Payload(trace), _Payload(trace)], dtype=object), allow_pickle=True)
    for content in (table.read_bytes(), malicious(trace), b"garbage", b""):
        table.write_bytes(content)
        with pytest.raises(UserError, match="is damaged") as error:
            JsonlStore(corpus, tmp_path / "cache")
        refusal(error)
    assert not trace.exists()
