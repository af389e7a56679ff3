"""Tests with changed versions of transformers: loading a model fails, instead of generating wrong text."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import make_config, save_pruned
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from darwinlm.export.hf import save_model
from darwinlm.models import modeling_darwinlm

SIZES = {0: {"skip": ["attention"]}, 1: {"num_attention_heads": 3, "num_key_value_heads": 1}}

RENAME_IN_MASKS = """
import transformers.masking_utils as masking
def renamed(right):
    def mask(config=None, inputs_embeds=None, input_embeds=None, kv_cache=None, **arguments):
        return right(config, inputs_embeds, cache=kv_cache, **arguments)
    return mask
masking.create_causal_mask = renamed(masking.create_causal_mask)
masking.create_sliding_window_causal_mask = renamed(masking.create_sliding_window_causal_mask)
"""
RENAME_IN_GENERATE = """
from transformers import GenerationMixin
right = GenerationMixin.prepare_inputs_for_generation
def renamed(self, *arguments, **more):
    inputs = right(self, *arguments, **more)
    return {"kv_cache" if name in ("cache", "past_key_values") else name: value for name, value in inputs.items()}
GenerationMixin.prepare_inputs_for_generation = renamed
"""
RENAME_PADDING = """
from transformers import GenerationMixin
right = GenerationMixin.prepare_inputs_for_generation
def renamed(self, *arguments, **more):
    inputs = right(self, *arguments, **more)
    return {"padding_mask" if name == "attention_mask" else name: value for name, value in inputs.items()}
GenerationMixin.prepare_inputs_for_generation = renamed
"""
FORGET_THE_WINDOW = """
import transformers.masking_utils as masking
masking.create_sliding_window_causal_mask = masking.create_causal_mask
"""
SCALE_TWICE = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
right = ALL_ATTENTION_FUNCTIONS["sdpa"]
def scaled(module, query, *arguments, scaling=None, **more):
    return right(module, query, *arguments, scaling=scaling * scaling, **more)
ALL_ATTENTION_FUNCTIONS["sdpa"] = scaled
"""
SWAP_ARGUMENTS = """
import transformers.cache_utils as caches
right = caches.Cache.update
def update(self, keys, values, extra=None, layer_idx=0, **more):
    return right(self, keys, values, layer_idx, **more)
caches.Cache.update = update
"""
CHANGES = {
    "cache, in masks": RENAME_IN_MASKS,
    "cache, in generate": RENAME_IN_GENERATE,
    "attention mask": RENAME_PADDING,
    "sliding window": FORGET_THE_WINDOW,
    "scaling": SCALE_TWICE,
    "order of arguments": SWAP_ARGUMENTS,
}

LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("loaded")
"""
COMMAND = "from darwinlm.cli import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = make_config("llama")
    config.per_layer_config = SIZES
    folder = tmp_path_factory.mktemp("drift") / "model"
    save_model(save_pruned(config, folder), torch.float32, folder)
    return folder


def python(code, *arguments):
    environment = os.environ | {"HF_HOME": str(arguments[-1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["", *CHANGES])
def test_changed_transformers_refused_on_load(change, folder):
    done = python(CHANGES.get(change, "") + LOAD, folder)
    if not change:
        assert done.stdout == "loaded\n", done.stderr
        return
    assert done.returncode == 1 and "loaded" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: this pruned model's code does not work with transformers ")
    assert "install another version of transformers" in last


@pytest.mark.slow
def test_changed_transformers_one_line_in_command(folder):
    done = python(RENAME_IN_GENERATE + COMMAND, "inspect", folder)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: this pruned model's code does not work with transformers ")


def test_version_check_keeps_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            error = modeling_darwinlm.generation_error()
    finally:
        torch.set_default_dtype(torch.float32)
    assert error < 1e-4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_classifier_from_pruned_weights(kind, folder):
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    classifier = kind.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    with torch.no_grad():
        hidden = causal.model(tokens).last_hidden_state
        scores = hidden @ classifier.score.weight.T
        sequence = kind is AutoModelForSequenceClassification
        scores = scores[:, -1] if sequence else scores + classifier.score.bias
        assert torch.allclose(classifier.eval()(tokens).logits, scores, atol=1e-5)
    labels = torch.zeros(scores.shape[:-1], dtype=torch.long)
    classifier(tokens, labels=labels).loss.backward()
    assert all(p.grad is not None for p in classifier.model.parameters())
