"""Whatever is wrong with the input: one line says what, where and what to do; code 2, and nothing is half-written."""

import builtins
import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from datetime import timedelta

import huggingface_hub.constants
import pyarrow
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from pyarrow import parquet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed

import darwinlm
from darwinlm import cli
from darwinlm.config.loading import load_recipe, parse_override
from darwinlm.errors import UserError
from darwinlm.models.checkpoint import Checkpoint
from darwinlm.models.pruned import load
from darwinlm.pipeline import prune
from darwinlm.plan import check_target
from darwinlm.run.directory import RunDirectory
from darwinlm.run.lock import RunLock
from darwinlm.runtime import dist, files, progress
from darwinlm.runtime.files import naming_disk_faults, new_folder

SMALL = [
    "data.sequence_length=16",
    "data.calibration_tokens=64",
    "data.train_tokens=32",
    "data.validation_tokens=32",
    "data.test_tokens=32",
    "database.levels=3",
    "search.generations=1",
    "search.offspring=2",
    "search.trial_tokens=[16, 16]",
    "search.score_tokens=[16, 32]",
    "recovery.tokens=16",
    "workload.prompt_tokens=8",
    "workload.new_tokens=2",
]


@pytest.fixture(autouse=True)
def as_before():
    """The command line sets up a process of its own; here it is a guest."""
    handler, propagate = signal.getsignal(signal.SIGTERM), progress.log.propagate
    yield
    signal.signal(signal.SIGTERM, handler)
    progress.log.propagate = propagate
    progress.log.handlers.clear()


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "good.txt"
    file.write_text("".join(f"word{number} " for number in range(300)))
    return file


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(code, stderr):
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.removeprefix("error: ").strip()


@pytest.fixture
def refused_command(tmp_path, capsys, monkeypatch):
    """Run `darwinlm` and see that it is refused with `message` (a regular expression) and writes nothing."""
    fail = cli._fail

    def checked_fail(message):
        assert "\n" not in message  # the command line would hide it, but in Python the message is seen as it is
        return fail(message)

    monkeypatch.setattr(cli, "_fail", checked_fail)

    def run(message, command):
        before = contents(tmp_path)
        code = cli.exit_code(command)
        printed = capsys.readouterr()
        assert re.search(message, one_line(code, printed.err)), printed.err
        assert printed.out == ""
        assert contents(tmp_path) == before

    return run


@pytest.fixture
def refused(refused_command, checkpoint, text, tmp_path):
    """The same of `darwinlm prune`, with good input but for what is given."""

    def run(message, *, model=None, target="0.8", data=None, out=None, recipe=None, settings=()):
        command = ["prune", str(model or checkpoint("llama")), "--target", target, "--data", str(data or text)]
        command += ["--out", str(out or tmp_path / "out"), *(["--recipe", str(recipe)] if recipe else [])]
        for setting in [*SMALL, *settings]:
            command += ["--set", setting]
        refused_command(message, command)

    return run


# ---- the model


@pytest.mark.parametrize("model", ["./nothing", "/nowhere/at/all", "owner/nothing", "a/b/c", "not a name?", "x" * 300])
def test_a_model_that_is_nowhere(model, refused):
    refused(f"model '{re.escape(model)}': not a local folder, and not found on the Hub", model=model)


def test_blocks_longer_than_the_context(refused):
    refused(
        r"data\.sequence_length=256 exceeds the model's maximum of 128 positions",
        settings=["data.sequence_length=256", "data.validation_tokens=256", "data.train_tokens=512"],
    )


def test_a_tokenizer_of_another_model(refused, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    config_of(folder, vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=None)

    def shorten(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:100].clone()

    weights_of(folder, shorten)
    refused(r"its tokenizer produces the id \d+, but it has only 100 embeddings", model=folder)


def config_of(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def weights_of(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_one(weights, value):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder, index):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_gguf(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def only_adapter(folder, settings):
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")


FAMILIES = "supported families: arcee, cohere, [a-z0-9_, ]+, vaultgemma$"
UP = r"model\.layers\.1\.mlp\.up_proj\.weight"
MODELS = {
    "empty folder": (
        lambda d: [f.unlink() for f in d.iterdir()],
        "has no config.json with a model_type; give a folder",
    ),
    "only a GGUF": (
        only_gguf,
        r"contains GGUF files \(.*\), which are not supported; give the folder or Hub id",
    ),
    "LoRA adapter": (
        lambda d: only_adapter(d, {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}),
        r"is a LoRA adapter of 'owner/base', not a whole model; merge it into its base model \(PEFT",
    ),
    "LoRA adapter of nothing": (lambda d: only_adapter(d, []), "is a LoRA adapter, not a whole model; merge it"),
    "MLX in 4 bits": (
        lambda d: config_of(d, quantization={"group_size": 64, "bits": 4}),
        "is quantized to 4 bits for MLX; use the original unquantized checkpoint",
    ),
    "config no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        r"its config.json cannot be read: .*config\.json",
    ),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "has no config.json with a model_type"),
    "words for a number": (
        lambda d: config_of(d, hidden_size="big"),
        "config.json cannot be used: .*'hidden_size' exp",
    ),
    "unsupported family": (
        lambda d: config_of(d, model_type="gpt2"),
        f"model type 'gpt2' is not supported; {FAMILIES}",
    ),
    "unheard-of family": (lambda d: config_of(d, model_type="foo"), f"model type 'foo' is not supported; {FAMILIES}"),
    "encoder": (
        lambda d: config_of(d, model_type="bert", architectures=["BertModel"]),
        f"model type 'bert' .*{FAMILIES}",
    ),
    "remote code": (
        lambda d: config_of(d, model_type="foo", auto_map={"AutoConfig": "code.Config"}),
        f"model type 'foo' is not supported; {FAMILIES}",
    ),
    "classifier": (
        lambda d: config_of(d, architectures=["LlamaForSequenceClassification"]),
        r"is a LlamaForSequenceClassification, not a causal language model \(…ForCausalLM\)",
    ),
    "GPTQ": (
        lambda d: config_of(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized; use the original unquantized checkpoint",
    ),
    "MXFP4": (
        lambda d: config_of(d, quantization_config={"quant_method": "mxfp4"}),
        r"is quantized \(MXFP4\); convert it to bfloat16 with transformers and give that folder",
    ),
    "GGUF in the config": (
        lambda d: config_of(d, quantization_config={"quant_method": "gguf"}),
        "is quantized; use the original unquantized checkpoint",
    ),
    "unknown activation": (
        lambda d: config_of(d, hidden_act="foo"),
        "config.json.*: KeyError: 'foo'",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        r"weights cannot be loaded: no model.safetensors \(only safetensors files are supported; convert GGUF",
    ),
    "only pickled weights": (
        only_pickle,
        r"weights cannot be loaded: .*convert .* pickled .bin files, which can run code\)",
    ),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5_000]),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a shard too few": (
        lambda d: sharded(d, {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}),
        r"model-00002-of-00002.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a shard from elsewhere": (
        lambda d: sharded(d, {"weight_map": {"lm_head.weight": "../other.safetensors"}}),
        r"model.safetensors.index.json cannot be read \(it lists files outside its folder.*\); download the whole",
    ),
    "an index of nothing": (lambda d: sharded(d, []), "model.safetensors.index.json cannot be read .*; download the"),
    "a weight too few": (
        lambda d: weights_of(d, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        f"its files are missing {UP}; download the whole checkpoint",
    ),
    "a layer too few": (
        lambda d: config_of(d, num_hidden_layers=4),
        r"its files are missing model\.layers\.3\.self_attn\.q_proj\.weight and \d+ more weights; download",
    ),
    "another shape": (
        lambda d: config_of(d, intermediate_size=32),
        r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \[64, 48\] in its files, but .* implies \[32, 48\]",
    ),
    "NaN": (lambda d: weights_of(d, lambda w: set_one(w, torch.nan)), f"{UP} contains NaN or Inf; repair the"),
    "Inf": (lambda d: weights_of(d, lambda w: set_one(w, torch.inf)), f"{UP} contains NaN or Inf; repair the"),
    "no layers": (
        lambda d: config_of(d, num_hidden_layers=0),
        r"num_hidden_layers=0 in its config.json must be 1 to 10,000$",
    ),
    "layers without end": (
        lambda d: config_of(d, num_hidden_layers=10**12),
        r"num_hidden_layers=1000000000000 in its config.json must be 1 to 10,000$",
    ),
    "no heads": (lambda d: config_of(d, num_attention_heads=0), "config.json"),
    "a negative size": (lambda d: config_of(d, intermediate_size=-1), "config.json"),
    "a size without end": (lambda d: config_of(d, hidden_size=10**30), "config.json"),
    "an unknown rotation": (lambda d: config_of(d, rope_parameters={"rope_type": "foo"}), "config.json"),
    "a rotation of words": (lambda d: config_of(d, rope_parameters="fast"), "config.json"),
    "layer types of another length": (lambda d: config_of(d, layer_types=["full_attention"]), "config.json"),
    "whole numbers for a type": (lambda d: config_of(d, dtype="int8"), "dtype torch.int8 in its config.json is not"),
    "an unknown type": (lambda d: config_of(d, dtype="float99"), "config.json cannot be used: .*float99"),
    "weights of whole numbers": (
        lambda d: weights_of(
            d, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 48, dtype=torch.int8)})
        ),
        f"{UP} has dtype I8; use the original unquantized checkpoint",
    ),
    "weights of eight bits": (
        lambda d: weights_of(
            d, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 48).to(torch.float8_e4m3fn)})
        ),
        f"{UP} has dtype F8_E4M3; use the original unquantized checkpoint",
    ),
    "weights that are no weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a pickle under another name": (
        lambda d: torch.save({"a": torch.ones(1)}, d / "model.safetensors"),
        r"model.safetensors cannot be read \(.*\); download the whole checkpoint",
    ),
    "a generation config that is a list": (
        lambda d: (d / "generation_config.json").write_text("[1]"),
        "its generation_config.json cannot be used: ",
    ),
    "no tokenizer": (lambda d: [f.unlink() for f in d.glob("token*")], "its tokenizer cannot be loaded: .*tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded: .*line 1"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_pruned(case, refused, checkpoint, tmp_path):
    damage, message = MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    damage(folder)
    refused(f"model '{re.escape(str(folder))}'.*{message}", model=folder)


def test_a_file_for_a_model(refused, text):
    refused("good.txt' is a file; give a folder in Hugging Face format, or a Hub model id", model=text)
    text.write_bytes(b"GGUF")
    refused(
        r"good.txt' is a GGUF file \(.*\), which is not supported; give the folder or Hub id",
        model=text,
    )


def test_a_gated_model_of_the_hub(refused, monkeypatch):
    def get_config_dict(source):
        # As transformers raises it; the cause would need an answer of the Hub to be made in the ordinary way.
        raise OSError("You are trying to access a gated repo.\nMake sure") from GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", get_config_dict)
    refused("access is gated; request it at https://huggingface.co/owner/it, then log in with `hf", model="owner/it")


def test_a_model_of_the_hub_with_pickled_weights_only(refused, checkpoint, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--owner--it"
    shutil.copytree(checkpoint("llama"), cached / "snapshots" / "1")
    only_pickle(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    refused("model 'owner/it': its weights cannot be loaded: .*convert GGUF, or pickled .bin", model="owner/it")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def fail(*arguments, **named):
        raise ConnectionError("the Hub\nis away")

    monkeypatch.setattr("darwinlm.models.checkpoint.snapshot_download", fail)
    with pytest.raises(UserError, match=r"^model 'owner/it': its weights cannot be downloaded: the Hub is away$"):
        Checkpoint("owner/it")


def test_a_model_whose_files_go_away_while_it_is_read(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    found = Checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors cannot be read \(No such file.*; download the whole"):
        found.read(["lm_head.weight"], torch.device("cpu"))


def test_a_head_that_computes_what_is_not_known(refused, monkeypatch):
    right = transformers.LlamaForCausalLM.forward

    def scaled(*arguments, **named):
        output = right(*arguments, **named)
        output.logits = output.logits * (1 + 2e-4)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    refused(r"its LM head is not supported yet \(relative error of its logits: 2.0e-04\)")


# ---- the target

NEITHER = r"is neither a fraction of the parameters \(0.5\) nor a number of them \(2.7B, 500M\)"
RANGE = r"must be above 0 and at most 1 \(a fraction\), or a count such as 2.7B"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("abc", f"target 'abc' {NEITHER}"),
        ("", f"target '' {NEITHER}"),
        ("50%", f"target '50%' {NEITHER}"),
        ("0", f"target 0 {RANGE}"),
        ("-0.5", f"target -0.5 {RANGE}"),
        ("1.5", f"target 1.5 {RANGE}"),
        ("500", f"target 500 {RANGE}"),
        ("nan", f"target nan {RANGE}"),
        ("inf", f"target inf {RANGE}"),
        ("1e400", f"target 1e400 {RANGE}"),
        ("2.7B", "target 2700000000 is 2,700,000,000 parameters, but the dense model has only 72,192; lower it"),
        ("72193", "target 72193 is 72,193 parameters, but the dense model has only 72,192; lower it"),
        (
            "0.01",
            "0.01 is 721 of 72,192 parameters, but .* have 24,912; the smallest possible target is 0.3451$",
        ),
        ("0.345", "0.345 is 24,906 of 72,192 parameters.* the smallest possible target is 0.3451$"),
        ("size=0.5", "target 'size=0.5': unknown resource 'size'; did you mean '((active_)?params|latency|flops)'"),
        ("kvcache=0.5", "target 'kvcache=0.5': unknown resource 'kvcache'; did you mean 'kv_cache'"),
        ("params=0.5,0.4", "target 'params=0.5,0.4': unknown resource '0.4'"),
        ("params=0.5,params=0.4", "target 'params=0.5,params=0.4': params is limited twice"),
        ("params=", f"target '' {NEITHER}"),
        ("latency=2B", "target 'latency=2B': latency takes a fraction .0.5. of the dense model's"),
        ("memory=8B", "target 'memory=8B': memory takes a fraction .0.5. or bytes .8GB."),
        ("flops=1.5", r"target flops=1.5 must be above 0 and at most 1 \(a fraction\)"),
        ("params=0.01,kv_cache=0.5", "target 0.01 is 721 of 72,192 parameters"),
        ("0.8,0.8", "target '0.8,0.8': a size is given twice"),
        ("0.8,abc", f"target 'abc' {NEITHER}"),
        ("0.8,", f"target '' {NEITHER}"),
        ("0.8,0.01", "target 0.01 is 721 of 72,192 parameters"),
        ("2K", "target 2000 is 2,000 of 72,192 parameters.* the smallest possible target is 0.3451$"),
    ],
)
def test_a_target_that_is_none_or_cannot_be_met(target, message, refused):
    refused(message, target=target)


@pytest.mark.parametrize(
    ("smallest", "dense"), [(29, 100), (58, 100), (57, 1_000), (24_912, 72_192), (1, 3), (99, 100)]
)
def test_the_smallest_target_that_is_named_is_accepted(smallest, dense):
    with pytest.raises(UserError) as caught:
        check_target("params", smallest - 1, dense, smallest)
    named = float(str(caught.value).rsplit(" ", 1)[1])
    check_target("params", named, dense, smallest)
    with pytest.raises(UserError):
        check_target("params", named - 0.0001, dense, smallest)


# ---- the data

SPLITS = (
    r"the splits need 160 \(test 32, validation 32, calibration 64, train 32\) and share no document; provide more text"
)
DATA = {
    "empty.txt": (b"", f"has 0 tokens, but {SPLITS}"),
    "blank.txt": (b" \n ", f"has 0 tokens, but {SPLITS}"),
    "empty.jsonl": (b"", f"has 0 tokens, but {SPLITS}"),
    "short.txt": (b"hello world", f"has 12 tokens, but {SPLITS}"),
    "table.xml": (b"a,b", r"unsupported file type; supported are \.txt, .*\.parquet \(.* also as \.gz, .*\)$"),
    "table.csv": (b"a,b\n1,2\n", r"line 2: no field 'text' \(found 'a', 'b'\); set data.text_field"),
    "none": (b"a,b", "unsupported file type; supported are"),
    "binary.txt": (b"abc\xff\xfe", r"is not UTF-8 text \(byte 3\); convert it"),
    "binary.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 text; convert it"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text":\n', "line 3: not JSON; expected one object per line"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
    "array.json": (b'[{"text": "a"}, ["b"]]', "record 2: expected one object in the list, found list"),
    "array.jsonl": (b'[{"text": "a"}]', "line 1: expected one object per line, found list"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "other-key.jsonl": (
        b'{"text": "a"}\n{"body": "a", "n": 1}\n{"n": 2}',
        r"line 2: no field 'text' \(found 'body', 'n'\); set d",
    ),
    "no-key.jsonl": (b"{}", r"line 1: no field 'text' \(found nothing\); set data.text_field"),
    "number.jsonl": (b'{"text": 3}', "line 1: 'text' is not text but int; set data.text_field"),
    "broken.parquet": (b"PAR1xxxxxxxxPAR1", "cannot be read as a Parquet file: "),
    "empty.parquet": (b"", "cannot be read as a Parquet file: .*0 bytes"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_is_not_what_it_should_be(name, refused, tmp_path):
    content, message = DATA[name]
    (tmp_path / name).write_bytes(content)
    refused(f"data '{re.escape(str(tmp_path / name))}'.*{message}", data=tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, r"no field 'text' \(found 'body', 'id'\); set data.text_field"),
        ({"text": [1, 2]}, "'text' is not text but int; set data.text_field"),
    ],
)
def test_a_table_without_text(columns, message, refused, tmp_path):
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    refused(f"table.parquet': {message}", data=tmp_path / "table.parquet")


def test_a_table_damaged_inside(refused, tmp_path):
    file = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"text": [f"number {n}" for n in range(500)]}), file)
    content = bytearray(file.read_bytes())
    content[20:400] = bytes(380)
    file.write_bytes(content)
    refused("data '.*table.parquet' cannot be read", data=file)


def test_a_folder_without_text(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        "data '.*empty': the folder contains no supported file; supported are .txt, .text, .md", data=tmp_path / "empty"
    )


@pytest.mark.parametrize("data", ["./nothing", "/nowhere/at/all", "~nobody/text", "nothing.txt", "a/b.parquet"])
def test_data_that_is_nowhere(data, refused):
    refused(f"data '{re.escape(data)}': no such file or folder", data=data)


@pytest.mark.parametrize("data", ["owner/nothing", "word " * 100])
def test_data_that_is_neither_here_nor_on_the_hub(data, refused):
    refused(
        "' is not a local file, and loading it as a Hub dataset failed: .*; check the name, or give a local", data=data
    )


# ---- the recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search", "--set 'search': expected key=value, for example --set search.offspring=8"),
        ("=3", "--set '=3': expected key=value"),
        ("seed=[1", r"--set 'seed=\[1': not valid YAML \(line 1: .*expected"),
        ("seed=2024-13-45", "--set 'seed=2024-13-45': not valid YAML .*month must be in"),
        ("search.offsprin=3", "unknown setting 'search.offsprin'; did you mean 'search.offspring'?"),
        ("searchh.offspring=3", "unknown setting 'searchh'; did you mean 'search'?"),
        ("offspring=3", "unknown setting 'offspring'; did you mean 'search.offspring'?"),
        ("learning_rate=3", "unknown setting 'learning_rate'; did you mean '(search|recovery).learning_rate'?"),
        ("seed.deep=1", "seed = {'deep': 1}: input should be a valid integer"),
        ("data.source.deep=1", "'data.source.deep' cannot be set: 'source' is a value, not a section"),
        ("search=1", "search = 1: this is a section; set one of its settings, such as search.offspring"),
        ("search=", "search = None: this is a section; set one of its settings"),
        ("model=", "model = None: input should be a valid string"),
        ("model=''", "model = '': string should have at least 1 character"),
        ("data.source=''", "data.source = '': string should have at least 1 character"),
        ("search.offspring=many", "search.offspring = 'many': input should be a valid integer"),
        ("search.offspring=1.5", "search.offspring = 1.5: input should be a valid integer"),
        ("search.offspring=yes", "search.offspring = True: must not be a boolean"),
        ("target=true", f"target True {NEITHER}"),
        ("target=[1]", rf"target \[1\] {NEITHER}"),
        ("search.offspring=0", "search.offspring = 0: input should be greater than or equal to 1"),
        ("database.levels=65", "database.levels = 65: input should be less than or equal to 64"),
        ("data.sequence_length=4", "data.sequence_length = 4: input should be greater than or equal to 8"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("recovery.warmup_ratio=1", "recovery.warmup_ratio = 1: input should be less than 1"),
        (
            "search.learning_rate=.nan",
            "search.learning_rate = nan: must be auto or a number > 0 and <= 1",
        ),
        ("database.granularity=head", "database.granularity = 'head': input should be 'kv_group' or 'query_head'"),
        ("search.survivors=1", r"search.survivors = 1: expected a list, such as \[2, 1\]"),
        ("search.survivors=[1]", r"search.survivors=\[1\], search.trial_tokens=.* must have the same length"),
        ("search.survivors=[2, 2]", r"search.survivors=\[2, 2\] must not increase and must end in 1"),
        (
            "search.survivors=[9, 1]",
            r"search.survivors=\[9, 1\] keeps more than search.offspring=2; lower the first or",
        ),
        ("search.trial_tokens=[a, 2]", "search.trial_tokens.0 = 'a': input should be a valid integer"),
        ("search.trial_tokens=[-1, 16]", "search.trial_tokens must be at least 0 and search.score_tokens at least 1"),
        ("search.trial_tokens=[16, 64]", r"\[16, 64\] exceeds data.train_tokens=32; raise the latter"),
        ("search.score_tokens=[16, 64]", r"\[16, 64\] exceeds data.validation_tokens=32; raise the latter"),
        ("device=abacus", "device 'abacus' is not available: "),
        ("device=meta:x", "device 'meta:x' is not available: "),
    ],
)
def test_a_setting_that_is_wrong(setting, message, refused):
    refused(message, settings=[setting])


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        (["lora_rank=2", "sharding=fsdp"], None, r"recovery\.lora_rank cannot be combined with recovery\.sharding"),
        (["teacher_dtype=int8", "sharding=fsdp"], None, r"=int8 cannot be combined with recovery\.sharding=fsdp"),
        (["teacher_top_k=8", "text=stream"], None, r"recovery\.teacher_top_k needs recovery\.text=train: streamed"),
        (["lora_rank=2"], "peft", r"^recovery\.lora_rank needs PEFT; pip install 'darwinlm\[lora\]'$"),
        (["loggers=[wandb]"], "wandb", r"^recovery\.loggers: wandb is not installed; pip install wandb$"),
        (["batch_size=3", "micro_batch_size=2"], None, r"recovery\.batch_size=3 is not a multiple of 1 processes"),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_before_the_search(settings, missing, message, refused, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    refused(message, settings=["recovery.tokens=32", *(f"recovery.{setting}" for setting in settings)])


def test_two_faults_are_told_in_one_line(refused):
    refused("recipe: seed = 'x': .*; search.offspring = 0: ", settings=["seed=x", "search.offspring=0"])


@pytest.mark.parametrize("recipe", ["fast", "nothing.yaml", "./quick"])
def test_a_recipe_that_is_nowhere(recipe, refused):
    refused(
        f"recipe '{recipe}': no such file; the built-in recipes are demo, llama2_7b_2.7b, .*, paper, quick, ",
        recipe=recipe,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\ndata: [1\nsearch: 2", r"not valid YAML \(line 3: .*expected ',' or '\]'"),
        (b"\tseed: 1", r"not valid YAML \(line 1: .*found character '\\t' that cannot start any token\)"),
        (b"seed: 1\n---\nseed: 2", r"not valid YAML \(line 2: expected a single document"),
        (b"a: \x01", "not valid YAML .*special characters are not allowed"),
        (b"- seed\n- 1", "expected settings as `key: value` lines, for example `target: 0.5`"),
        (b"just words", "expected settings as `key: value` lines"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b"seeed: 1", "unknown setting 'seeed'; did you mean 'seed'?"),
        (b"search:\n  offsprng: 1", "unknown setting 'search.offsprng'; did you mean 'search.offspring'?"),
        (b"search: [1]", "'search.generations' cannot be set: 'search' is a value, not a section"),
    ],
)
def test_a_recipe_file_that_is_wrong(content, message, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    refused(message, recipe=tmp_path / "recipe.yaml")


def test_a_folder_for_a_recipe(refused, tmp_path):
    refused(f"recipe '{tmp_path}' cannot be read: Is a directory", recipe=tmp_path)


# ---- the run directory


def begin_run(out, model, text, **changes):
    """An earlier run that stopped before its first stage."""
    settings = dict(parse_override(setting) for setting in SMALL)
    overrides = {"model": str(model), "target": "0.8", "data.source": str(text), **settings}
    recipe = load_recipe("quick", {**overrides, **changes})
    RunDirectory.open(out, recipe, {"model": "another", "darwinlm": "0"})


def test_a_file_for_a_run_directory(refused, text):
    refused("--out .*good.txt is a file; give a new folder or an earlier run", out=text)


def test_a_name_of_two_lines_is_told_in_one(checkpoint, tmp_path, capsys):
    out = tmp_path / "two\nlines"
    out.write_text("mine")
    code = cli.exit_code(["prune", str(checkpoint("llama")), "--target", "0.5", "--out", str(out)])
    assert "two lines is a file" in one_line(code, capsys.readouterr().err)


def test_a_run_directory_under_a_file(refused, text):
    refused("--out .*good.txt/deeper/run cannot be created: .*good.txt is a file", out=text / "deeper" / "run")


def test_a_run_directory_whose_name_is_too_long(refused, tmp_path):
    refused("cannot be written: File name too long", out=tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml"])
def test_a_folder_that_holds_something_else(name, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    refused("--out .* contains something that is not a DarwinLM run; give a new or an empty folder")


def test_a_run_of_another_recipe(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text, target=0.5, seed=7)
    refused(r"--out .* is a run with another recipe \(target: 0.5 -> 0.8; seed: 7 -> 0\); give a new folder, or")


def test_a_run_of_another_checkpoint_in_the_same_place(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    refused("--out .*: model was 'another' when this run started and is now '[0-9a-f]+'; give a new folder, or restore")


def test_a_run_that_another_process_works_on(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    with RunLock(tmp_path / "out") as other:
        other.take()
        refused(rf"--out .*out is in use by process {os.getpid()} on .+, for \d+ s; wait for it or stop it \(kill")


def test_a_new_run_that_another_process_has_just_begun(refused, tmp_path):
    with RunLock(tmp_path / "out") as other:
        other.take()
        refused(rf"--out .*out is in use by process {os.getpid()} on .+, for \d+ s; wait for it or stop it \(kill")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: "{", r"manifest.json is damaged \(.*\); start the run again in a new folder"),
        (lambda manifest: "[]", r"manifest.json is damaged \(not a JSON object\); start the run again in a new folder"),
        (lambda manifest: {"name": "some web page"}, "--out .* contains something that is not a DarwinLM run; give a"),
        (
            lambda manifest: {**manifest, "format": 9},
            "is a run of format 9, but this version reads format 1; give a new folder",
        ),
        (lambda manifest: {"format": 1}, "manifest.json is damaged .*recipe, facts or stages are missing"),
        (
            lambda manifest: {**manifest, "recipe": {**manifest["recipe"], "colour": 1}},
            r"a run whose recipe this version cannot read \(recipe: unknown setting 'colour'.*\); give a new folder",
        ),
    ],
)
def test_a_run_whose_manifest_is_damaged_or_of_another_version(change, message, refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["checksum"]
    changed = change(manifest)
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused(message)


# ---- the command


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prun"], r"No such command 'prun'. .*\(see darwinlm --help\)"),
        (["--colour"], r"No such option: --colour .*\(see darwinlm --help\)"),
        (["prune", "m", "--colour"], r"No such option: --colour .*\(see darwinlm prune --help\)"),
        (["prune"], r"Missing argument 'model'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--target", "0.5"], r"Missing option '--out'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--out", "o"], r"Missing option '--target'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--target"], "Option '--target' requires an argument"),
        (["prune", "m", "n", "--target", "0.5", "--out", "o"], r"unexpected extra argument\(s\) \(n\)"),
        (["demo", "--set", "x"], "--set 'x': expected key=value"),
    ],
)
def test_a_command_that_is_wrong(command, message, refused_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_command(message, command)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prune", "./nothing", "--target", "0.5", "--out", "out"], "model './nothing': not a local folder"),
        (["prune", "./nothing", "--target", "1.5", "--out", "out"], f"target 1.5 {RANGE}"),
    ],
)
def test_a_process_of_its_own_says_the_same(command, message, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-m", "darwinlm", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(message, one_line(done.returncode, done.stderr))
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())


def test_all_ranks_together_say_it_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "darwinlm"]
    command = ["prune", "./nothing", "--target", "0.5", "--out", "out"]
    done = subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: model './nothing': not a local folder")


@pytest.mark.parametrize(
    "missing", [{"TORCHELASTIC_USE_AGENT_STORE": "False"}, {"MASTER_ADDR": None}, {"MASTER_PORT": "1"}]
)
def test_a_rank_that_cannot_ask_the_others_says_it(missing, monkeypatch):
    found = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    monkeypatch.setattr(dist, "_ASKING", timedelta(milliseconds=10))
    for name, value in (found | missing).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert dist.should_report("x")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:38308"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30ms for recv operation"), True),
        (RuntimeError("Gloo connectFullMesh failed with"), True),
        (distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//1"), True),
        (distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (distributed.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"), True),
        (distributed.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (distributed.DistBackendError("ncclInvalidUsage: Duplicate GPU detected: rank 0 and rank 1"), False),
        (distributed.DistBackendError("ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), False),
        (RuntimeError("Input tensor data type is not supported for NCCL process group: ComplexHalf"), False),
        (RuntimeError("Backend gloo does not support reduce_scatter"), False),
    ],
)
def test_only_the_loss_of_a_rank_is_called_that_and_by_all_ranks_alike(error, lost, monkeypatch):
    said = set()
    for rank in (0, 2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        for ranks in (1, 3):
            monkeypatch.setattr(dist, "world_size", lambda ranks=ranks: ranks)
            with pytest.raises((UserError, type(error))) as caught, dist.naming_lost_ranks():
                raise error
            assert isinstance(caught.value, UserError) == (lost and ranks > 1)
            said.add(str(caught.value))
    assert len(said) == 1 + lost


def test_the_version_is_shown(capsys):
    assert cli.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"{darwinlm.__version__}\n"


def test_on_a_terminal_a_bar_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_bars", True)
    with progress.task("search (generations)", 4) as task:
        task.advance(3, note="KL 0.5")
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("search (generations)", "3/4", "KL 0.5"))


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.exit_code([]) == 0
    assert "prune " in capsys.readouterr().out


# ---- from Python


def api(**changes):
    return lambda model, text, out: prune(**{"model": model, "target": 0.8, "out": out, **changes})


API = {
    "no target": (api(target=None), f"^recipe: target None {NEITHER}$"),
    "a yes for a target": (api(target=True), f"^recipe: target True {NEITHER}$"),
    "words for a target": (api(target="half"), f"^recipe: target 'half' {NEITHER}$"),
    "a negative target": (api(target=-0.5), f"^recipe: target -0.5 {RANGE}$"),
    "no model": (api(model=""), "^recipe: model = '': string should have at least 1 character$"),
    "a model that is nowhere": (api(model="./nothing"), "^model './nothing': not a local folder"),
    "an unknown recipe": (
        api(recipe="fast"),
        "^recipe 'fast': no such file; the built-in recipes are demo, llama2_7b_2.7b, .*, paper, quick, ",
    ),
    "an unknown setting": (
        api(settings={"search.offsprin": 1}),
        r"^recipe: unknown setting 'search.offsprin'; did you mean 'search.offspring'\?$",
    ),
    "a setting that is a number": (api(settings={3: 1}), "^recipe: 3 is not a setting; write settings as"),
    "a setting without a name": (api(settings={"": 1}), "^recipe: unknown setting ''; did you mean "),
    "half a name": (api(settings={"search.": 1}), r"^recipe: unknown setting 'search.'; did you mean 'search"),
    "a section of words": (
        api(settings={"search": "fast"}),
        "^recipe: search = 'fast': this is a section; set one of its settings, such as search.offspring$",
    ),
    "a list for a number": (
        api(settings={"search.offspring": [1]}),
        r"^recipe: search.offspring = \[1\]: input should be a valid integer$",
    ),
    "an object": (api(settings={"seed": object()}), "^recipe: seed = <object .*: input should be a valid integer$"),
    "a file for a run": (
        lambda model, text, out: prune(model, target=0.8, out=text),
        "^--out .*good.txt is a file; give",
    ),
    "load: nowhere": (lambda model, text, out: load(out), r"^.*out contains no model \(config.json is missing\)$"),
    "load: a dense model": (lambda model, text, out: load(model), "contains no pruned model; load it with"),
    "load: a file": (lambda model, text, out: load(text), "good.txt/config.json cannot be read: .*Not a directory"),
}


@pytest.mark.parametrize("case", API)
def test_a_call_that_is_wrong(case, checkpoint, text, tmp_path):
    call, message = API[case]
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        call(checkpoint("llama"), text, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


# ---- the disk


class FullDisk:
    """Has room for so many files, then for none."""

    def __init__(self, room):
        self.room = room

    def fsync(self, descriptor):
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open(self, path, mode="r", **options):
        if "x" in mode and self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return builtins.open(path, mode, **options)


def drafts(folder):
    return [path for path in folder.rglob("*") if ".draft" in path.name]


@pytest.mark.parametrize("room", [0, 1, 2, 5, 15, 20])
def test_on_a_full_disk_a_run_says_so_and_the_same_command_goes_on_from_there(
    room, checkpoint, text, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = ["prune", str(checkpoint("llama")), "--target", "0.8", "--out", str(out), "--data", str(text)]
    for setting in SMALL:
        command += ["--set", setting]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", FullDisk(room).fsync)
        assert cli.exit_code(command) == 2
    told = capsys.readouterr().err.splitlines()
    faults = [line for line in told if line.startswith("error: ")]
    assert faults == told[-1:]
    assert re.fullmatch(
        f"error: the disk is full while writing {out}/.+; free some space and run the same command again", faults[0]
    )
    assert not drafts(tmp_path)
    assert cli.exit_code(command) == 0
    assert (out / "recipe.yaml").exists()
    assert (out / "model" / "model.safetensors").exists()
    assert not drafts(tmp_path)


def test_a_file_that_cannot_be_begun_leaves_the_old_one(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(files, "open", FullDisk(0).open, raising=False)
    with pytest.raises(UserError, match=r"the disk is full while writing .*a.json; free some space and run the same"):
        files.write_json(tmp_path / "a.json", {"a": 2})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert not drafts(tmp_path)


def test_a_folder_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    for content in ("old", "new"):
        try:
            with new_folder(tmp_path / "model") as draft:
                (draft / "file").write_text(content)
                if content == "new":
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        except UserError as error:
            told = str(error)
    assert told.startswith(f"the disk is full while writing {tmp_path / 'model'}; free some space")
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert not drafts(tmp_path)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system"), (errno.EIO, "Input/output error")],
)
def test_a_place_that_cannot_be_written_is_named_with_the_reason(number, reason, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: {reason}"), naming_disk_faults(tmp_path):
        raise OSError(number, "whatever")


def test_a_file_larger_than_the_system_allows_is_named_and_leaves_the_old_one(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=rf"^{tmp_path}/a cannot be written: File too large$"):
            files.write_bytes(tmp_path / "a", bytes(200_000))
        with (
            pytest.raises(UserError, match=rf"^{tmp_path}/model cannot be written: File too large$"),
            new_folder(tmp_path / "model") as draft,
        ):
            save_file({"a": torch.zeros(50_000)}, draft / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_fault_of_ours_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), naming_disk_faults(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "whatever")
