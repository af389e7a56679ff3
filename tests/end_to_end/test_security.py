"""Tests of security: nothing in a model or a run runs code, writes outside the run, or sends terminal codes."""

import ast
import contextlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import SETTINGS, TARGET
from markdown_it import MarkdownIt
from rich.console import Console

import darwinlm
from darwinlm import cli
from darwinlm.config.loading import load_recipe
from darwinlm.errors import UserError
from darwinlm.export import mlx
from darwinlm.export.card import model_card
from darwinlm.models import modeling_darwinlm
from darwinlm.models.loading import load_dense
from darwinlm.pipeline import prune
from darwinlm.report.summary import show
from darwinlm.run.lock import RunLock
from darwinlm.runtime.files import open_new, write_json

CPU = torch.device("cpu")


class Payload:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.makedirs, (self.mark, 0o777, True)


PICKLES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "adapter_model.bin", "model.pt", "consolidated.00.pth"),
    *("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("rng_state_0.pth", "vocab.pkl", "tokenizer.pkl", "tokenizer.model", "cache.pickle", "corpus.pt"),
)


def plant(folder, mark):
    """Write every file that something might unpickle, in both pickle formats."""
    for number, name in enumerate(PICKLES):
        if number % 2:
            torch.save(Payload(mark), folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Payload(mark)))


def code(mark):
    return f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\nclass Custom:\n    pass\n"


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "mark"


@pytest.fixture
def model(checkpoint, tmp_path):
    shutil.copytree(checkpoint("qwen3"), tmp_path / "model")
    return tmp_path / "model"


def change(file, **entries):
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_payload_leaves_mark(mark, tmp_path):
    plant(tmp_path, mark)
    with open(tmp_path / "optimizer.pt", "rb") as file:
        pickle.load(file)
    assert mark.exists()
    mark.rmdir()
    torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert mark.exists()


@pytest.mark.slow
def test_pickles_never_read(model, text, mark, tmp_path, monkeypatch):
    plant(model, mark)
    settings = {**SETTINGS, "data.source": str(text), "recovery.checkpoint_steps": 1}
    replace = os.replace

    def stop_after_a_checkpoint(source, destination):
        replace(source, destination)
        if "recovery/checkpoint" in str(destination):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop_after_a_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            prune(model, target=TARGET, out=tmp_path / "run", settings=settings)
    folders = [path for path in (tmp_path / "run").rglob("*") if path.is_dir()]
    assert [folder for folder in folders if folder.parent.name == "recovery"]
    for folder in [tmp_path / "run", *folders]:
        plant(folder, mark)
    run = prune(model, target=TARGET, out=tmp_path / "run", settings=settings)
    plant(run.model_path, mark)
    run.load()
    darwinlm.load(run.path)
    assert not mark.exists()


def test_pickled_weights_refused(model, mark):
    plant(model, mark)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only safetensors files are supported; convert .* which can run code"):
        load_dense(str(model), "kv_group", CPU)
    assert not mark.exists()


AUTO_MAP = {
    **{name: f"custom.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")},
    "AutoTokenizer": ["custom.Custom", "custom.Custom"],
}


@pytest.mark.parametrize(
    "plant_code",
    [
        lambda folder: change(folder / "config.json", auto_map=AUTO_MAP),
        lambda folder: change(folder / "config.json", auto_map=AUTO_MAP, model_type="custom"),
        lambda folder: change(folder / "config.json", auto_map=AUTO_MAP, trust_remote_code=True),
        lambda folder: change(folder / "tokenizer_config.json", auto_map=AUTO_MAP),
        lambda folder: change(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Custom"),
        lambda folder: change(folder / "tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True),
        lambda folder: write_json(folder / "generation_config.json", {"custom_generate": str(folder)}),
    ],
)
def test_code_of_checkpoint_never_run(plant_code, model, mark):
    for name in ("custom.py", "modeling_custom.py", "tokenizer.py", "setup.py", "conftest.py", "custom_generate.py"):
        (model / name).write_text(code(mark))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code(mark))
    plant_code(model)
    with contextlib.suppress(UserError):
        load_dense(str(model), "kv_group", CPU)
    assert not mark.exists()
    assert str(model) not in sys.path


def test_load_runs_no_code_from_folder(run, mark, tmp_path):
    shutil.copytree(run[0].model_path, tmp_path / "pruned")
    (tmp_path / "pruned" / "modeling_darwinlm.py").write_text(code(mark))
    darwinlm.load(tmp_path / "pruned")
    assert not mark.exists()


# ---- paths


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".", "model.bin", None, 3]
)
def test_index_with_outside_path_refused(name, model):
    shutil.move(model / "model.safetensors", model.parent / "other.safetensors")
    write_json(model / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": name}})
    with pytest.raises(UserError, match=r"index\.json cannot be read \(it lists files outside its folder, or of"):
        load_dense(str(model), "kv_group", CPU)


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "a/b", ".hidden", "a\nb", ""])
def test_chat_template_with_outside_path_refused(name, model):
    (model / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": name, "template": "{{ 1 }}"}]
    change(model / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(UserError, match=r"its tokenizer has a chat template named .*; rename it"):
        load_dense(str(model), "kv_group", CPU)


@pytest.mark.parametrize("name", ["manifest.json", "search/best_plan.json"])
def test_symlink_as_draft_not_followed(name, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.with_name(file.name + ".draft").symlink_to(precious)
    file.symlink_to(precious)
    write_json(file, {"a": 1})
    assert precious.read_text() == "mine"
    assert not file.is_symlink()
    link = tmp_path / "link"
    link.symlink_to(precious)
    open_new(link).close()
    assert precious.read_text() == "mine"


def test_symlink_as_lock_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(UserError, match="run/lock cannot be written: Too many levels"),
        RunLock(tmp_path / "run") as mine,
    ):
        mine.take()
    assert (tmp_path / "precious").read_text() == "mine"


# ---- untrusted text

NAMES = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](https://example.com/a.png) [y](javascript:alert(1))",
    "a\n\n# Heading\n\n| a | b |\n|---|---|",
    "```\n<script>\n```",
    "`code` **bold** _it_ ~~no~~ &lt;b&gt;",
    "x\n  ```\n\n<b>out of the fence</b>",
    "````\n```\n<b>",
    "<https://example.com> https://example.com",
    "---\nlicense: mit\n---",
    "\x1b]0;title\x07\u202etxt",
)
PLAN = {"parameters": 5, "dense_parameters": 10}


def metrics_of(name):
    row = {"name": "dense", "parameters": 1, "perplexity": 1.0, "kl": 0.0, "kv_cache_bytes_per_token": 1}
    row |= {"prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0}
    sample = {"prompt": "p", "before": name, "after": name}
    return {"model": name, "target": name, "rows": [row], "sample": sample, "environment": {"device": name}}


@pytest.mark.parametrize("name", NAMES)
def test_model_card_escapes_names(name):
    def tags(name):
        recipe = load_recipe("quick", {"model": name, "target": 0.5, "data.source": name, "data.text_field": name})
        card = model_card(recipe, PLAN, metrics_of(name))
        body = card.split("---\n", 2)[2]
        html = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").render(body)
        return re.findall(r"<(/?\w+)", html)

    assert tags(name) == tags("plain")


@pytest.mark.parametrize("name", [*NAMES, "[/red]", "[bold", "[link=https://example.com]x[/link]"])
def test_summary_escapes_names(name, capsys):
    show(metrics_of(name), Console(width=200, force_terminal=False))
    printed = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in printed)
    for word in re.findall(r"[\w\[\]/]+", name.split("\n")[0]):
        if word.isprintable() and "\x1b" not in name:
            assert word in printed


def test_errors_escape_terminal_codes(capsys):
    assert cli._fail("model '\x1b]0;owned\x07\x1b[2J' is\r\nnowhere\u202e") == 2
    assert capsys.readouterr().err == "error: model ' ]0;owned [2J' is nowhere\n"


@pytest.mark.parametrize(
    ("file", "needed"),
    [
        (Path(modeling_darwinlm.__file__), {"copy", "functools", "json", "sys", "torch", "transformers", "typing"}),
        (Path(mlx.__file__).with_name("darwinlm_mlx.py"), {"dataclasses", "mlx", "mlx_lm"}),
    ],
)
def test_shipped_code_imports_only_its_engine(file, needed):
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "open", "__import__"))
    assert found == needed
