"""Tests of `darwinlm doctor`: correct models pass, and each check fails if the part that it tests is broken."""

import copy
import json
import shutil

import helpers
import pytest
import torch
import transformers
from helpers import FAMILIES, make_checkpoint, make_config, uninstall
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from darwinlm import cli
from darwinlm.commands.doctor import choose_layers, examine
from darwinlm.engines import llama_cpp
from darwinlm.export import gguf, hf, hf_native, vllm
from darwinlm.models import cutting, modeling_darwinlm
from darwinlm.models.checkpoint import Checkpoint
from darwinlm.models.config import load_config
from darwinlm.models.modeling_darwinlm import Nothing, PrunedConfig, PrunedModel
from darwinlm.models.walking import CACHE

MODEL = {
    "level 0": "level 0 equals transformers' model",
    "groups": "cut KV groups and channels equal masked ones",
    "heads": "cut query heads equal masked ones",
    "attention": "layers without attention",
    "mlp": "layers without MLP",
    "both": "a layer without both",
    "cache": "KV cache, token by token",
    "generate": "KV cache in generate()",
    "gradients": "gradients equal the masked model's",
    "recomputed": "gradients with activations recomputed",
    "saved": "saved and loaded",
}
EXPORTS = {target: f"export --to {target}" for target in ("gguf", "vllm", "hf-native")}


@pytest.fixture(autouse=True)
def _quick_exports(monkeypatch):
    """Skip ONNX, whose tracing takes seconds, and mlx-lm, which is not installed; they have their own tests."""
    monkeypatch.setattr("darwinlm.commands.doctor.TARGETS", EXPORTS)


def results(examination):
    return {check.name: check.result for check in examination.checks}


def failed(examination):
    names = {name: key for key, name in (MODEL | EXPORTS).items()}
    return {names[check.name] for check in examination.checks if check.result == "failed"}


@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_passes_on_family(family, checkpoint):
    examination = examine(str(checkpoint(family)))
    found = results(examination)
    assert set(MODEL.values()) | set(EXPORTS.values()) <= set(found)
    assert examination.passed
    # The Qwen2 tokenizer of transformers adds its own token to this one, which has no row in the embeddings.
    skipped = {name for name, result in found.items() if result == "skipped"}
    assert skipped == ({EXPORTS["gguf"]} if family == "qwen2" else set())
    for check in examination.checks:
        assert check.result == "skipped" or 0 <= check.difference <= check.tolerance


def break_frequencies(monkeypatch):
    """Zero the buffers that are not stored in files, such as the frequencies of rotary embeddings."""

    def forget(self, module):
        for buffer in module.buffers():
            buffer.zero_()

    monkeypatch.setattr(PrunedModel, "_init_weights", forget, raising=False)


def break_permutation(monkeypatch):
    right = cutting._kept_rows
    monkeypatch.setattr(cutting, "_kept_rows", lambda rows, kept, like: right(rows, kept, like).flip(0))


def break_head_map(monkeypatch):
    right = modeling_darwinlm.attend_in_unequal_groups

    def swapped(module, query, key, value, mask, **kwargs):
        counts = module.config.query_heads_per_kv_head
        module.config.own.query_heads_per_kv_head = counts[::-1]
        try:
            return right(module, query, key, value, mask, **kwargs)
        finally:
            module.config.own.query_heads_per_kv_head = counts

    monkeypatch.setitem(modeling_darwinlm.ALL_ATTENTION_FUNCTIONS, modeling_darwinlm.UNEQUAL_GROUPS, swapped)


def break_layers_without(part):
    def broken(monkeypatch):
        right = Nothing.forward

        def forward(self, hidden_states, *args, **kwargs):
            output = right(self, hidden_states, *args, **kwargs)
            if self.part != part:
                return output
            return hidden_states / 10 if part == "mlp" else (hidden_states / 10, None)

        monkeypatch.setattr(Nothing, "forward", forward)

    return broken


def break_cache_lengths(monkeypatch):
    """Take the cached length from the first layer, which may have no attention."""
    monkeypatch.setattr(PrunedConfig, "get_text_config", lambda self, decoder=None, encoder=None: self)
    right = PrunedModel.__init__

    def init(self, config):
        right(self, config)
        for number, layer in enumerate(self.base_model.layers):
            layer.self_attn.layer_idx = number

    monkeypatch.setattr(PrunedModel, "__init__", init)


def break_positions(monkeypatch):
    """Shift positions by one if tokens are cached."""
    right = transformers.LlamaModel.forward

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        cache = kwargs.get(CACHE)
        seen = cache.get_seq_length() if cache is not None else 0
        if seen:
            position_ids = torch.arange(input_ids.shape[1]).unsqueeze(0) + seen + 1
        return right(self, input_ids=input_ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)


def change_mlps(monkeypatch, change):
    """Change the input of MLPs in our models, but not in those of transformers."""
    right = PrunedModel.__init__

    def init(self, config):
        right(self, config)
        for module in self.modules():
            if isinstance(module, LlamaMLP):
                module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))

    monkeypatch.setattr(PrunedModel, "__init__", init)


def halve_gradient(monkeypatch):
    change_mlps(monkeypatch, lambda x: (x + x.detach()) / 2)


def stop_gradient(monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, right=LlamaMLP.forward: right(self, x).detach())


def break_recomputation(monkeypatch):
    def change(x):
        # Recomputation for the gradient gives other values than the forward pass.
        again = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        return x * 1.5 if again else x

    change_mlps(monkeypatch, change)


def break_saving(monkeypatch):
    right = hf.save_model

    def save(model, dtype, folder):
        model = copy.deepcopy(model)
        model.model.norm.weight.data *= 1.001
        right(model, dtype, folder)

    monkeypatch.setattr("darwinlm.commands.doctor.save_model", save)


def round_frequencies(monkeypatch):
    monkeypatch.setattr(PrunedModel, "_apply", torch.nn.Module._apply)


def break_gguf(monkeypatch):
    monkeypatch.setattr(gguf, "_interleave", lambda rows, head_dim: rows)


def break_vllm(monkeypatch):
    right = vllm.with_attention_everywhere

    def stubs_that_do_something(model):
        whole = right(model)
        whole.model.layers[0].self_attn.v_proj.weight.data.fill_(0.1)
        whole.model.layers[0].self_attn.o_proj.weight.data.fill_(0.1)
        return whole

    monkeypatch.setattr(vllm, "with_attention_everywhere", stubs_that_do_something)


def break_native(monkeypatch):
    right = hf_native.native_config

    def other_rope(config):
        found = right(config)
        found.rope_parameters = {**found.rope_parameters, "rope_theta": 10.0}
        return found

    monkeypatch.setattr("darwinlm.export.hf_native.native_config", other_rope)


@pytest.mark.parametrize(
    ("broken", "told", "targets"),
    [
        (break_frequencies, {"level 0", "gradients", "saved"}, []),
        (break_permutation, {"groups", "heads", "attention", "mlp", "both", "gradients"}, []),
        (break_head_map, {"heads"}, []),
        (break_layers_without("attention"), {"attention", "both", "gradients", "vllm"}, ["vllm"]),
        (break_layers_without("mlp"), {"mlp", "both"}, []),
        (break_cache_lengths, {"cache"}, []),
        (break_positions, {"cache", "generate"}, []),
        (halve_gradient, {"gradients"}, []),
        (stop_gradient, {"gradients", "recomputed"}, []),
        (break_recomputation, {"recomputed"}, []),
        (break_saving, {"saved"}, []),
        (break_gguf, {"gguf"}, ["gguf", "vllm"]),
        (break_vllm, {"vllm"}, ["vllm"]),
        (break_native, {"hf-native"}, ["vllm", "hf-native"]),
    ],
)
def test_doctor_reports_broken_check(broken, told, targets, checkpoint, monkeypatch):
    monkeypatch.setattr("darwinlm.commands.doctor.TARGETS", targets)
    broken(monkeypatch)
    assert failed(examine(str(checkpoint("llama")))) == told


def test_doctor_bfloat16_needs_float32_rope(tmp_path, monkeypatch):
    folder = str(make_checkpoint("llama", tmp_path / "bfloat16", torch.bfloat16))
    monkeypatch.setattr("darwinlm.commands.doctor.TARGETS", [])
    assert examine(folder).passed
    round_frequencies(monkeypatch)
    assert failed(examine(folder)) == {"saved"}


def test_doctor_command_output_and_exit_code(checkpoint, monkeypatch, capsys):
    folder = str(checkpoint("qwen3"))
    assert cli.exit_code(["doctor", folder]) == 0
    out = capsys.readouterr().out
    assert all(name.split()[0] in out for name in (MODEL | EXPORTS).values())
    assert "reduced: text: 2 x 64 random tokens" in out
    assert out.splitlines()[-1] == "14 passed"
    break_gguf(monkeypatch)
    monkeypatch.setattr("darwinlm.export.gguf.choose_architecture", lambda config: gguf.DECI)
    assert cli.exit_code(["doctor", folder]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "13 passed, 1 failed"


def test_doctor_skips_unavailable_engine(tmp_path, monkeypatch):
    folder = make_checkpoint("qwen3", tmp_path / "untied")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    notes = {check.name: check for check in examine(str(folder)).checks}
    assert notes["export --to gguf"].result == "skipped"
    assert "cannot run a qwen3 model with an untied head" in notes["export --to gguf"].note
    uninstall(llama_cpp.PACKAGE, monkeypatch)
    healthy = examine(str(make_checkpoint("qwen3", tmp_path / "tied")))
    notes = {check.name: check for check in healthy.checks}
    assert notes["export --to gguf"].result == "skipped" and "pip install xllamacpp" in notes["export --to gguf"].note
    assert healthy.passed


def test_doctor_skips_query_heads_without_groups(tmp_path, monkeypatch):
    monkeypatch.setitem(helpers.SIZES, "num_key_value_heads", 6)
    examination = examine(str(make_checkpoint("mistral", tmp_path / "ungrouped")))
    assert results(examination)[MODEL["heads"]] == "skipped"
    assert examination.passed


def test_doctor_unreadable_model_one_line(checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "broken")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    assert cli.exit_code(["doctor", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "supported families" in error


def test_doctor_checks_few_layers_of_large_model(checkpoint, monkeypatch):
    large = make_config(
        "llama", num_hidden_layers=80, hidden_size=8192, intermediate_size=11008, num_attention_heads=64, head_dim=128
    )
    assert choose_layers(large) == [0, 79]
    large.layer_types = ["sliding_attention" if layer % 6 else "full_attention" for layer in range(80)]
    assert choose_layers(large) == [0, 79]
    large.layer_types = ["sliding_attention" if 0 < layer < 79 else "full_attention" for layer in range(80)]
    assert choose_layers(large) == [0, 1, 79]
    small = make_config(
        "llama", num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, head_dim=64,
        num_key_value_heads=3,
    )  # fmt: skip
    chosen = choose_layers(small)
    assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] == 29
    monkeypatch.setattr("darwinlm.commands.doctor._LAYER_PARAMETERS", 1)
    examination = examine(str(checkpoint("qwen2")))
    assert examination.passed
    assert examination.reduced[0] == "2 of 3 layers (0, 2); the weights of the others are not read"


def test_checkpoint_some_layers(checkpoint):
    whole = Checkpoint(str(checkpoint("llama")))
    some = whole.some_layers([2, 0])
    names = [name for name in whole.shapes if name.startswith("model.layers.2.")]
    there = whole.read(names, torch.device("cpu"))
    here = some.read([name.replace(".2.", ".0.", 1) for name in names], torch.device("cpu"))
    assert all(torch.equal(there[name], here[name.replace(".2.", ".0.", 1)]) for name in names)
    assert not any(name.startswith("model.layers.2.") for name in some.shapes)
    assert some.shapes["lm_head.weight"] == whole.shapes["lm_head.weight"]


def test_doctor_reduces_sliding_window(tmp_path, monkeypatch):
    monkeypatch.setitem(helpers.OWN_SETTINGS["mistral"], "sliding_window", 100)
    folder = str(make_checkpoint("mistral", tmp_path / "long"))
    assert load_config(folder).sliding_window == 100
    examination = examine(folder)
    assert examination.passed
    assert "sliding window of 100 tokens reduced to 32" in examination.reduced
