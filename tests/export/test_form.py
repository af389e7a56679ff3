"""Tests of forms: a plain decoder built only from a family's form gives the family's logits."""

import pytest
import torch
from helpers import make_config, save_pruned
from shapes import SHAPES

from darwinlm import UserError
from darwinlm.export.form import _KNOWN, layer_tensors, read_form, read_rope
from darwinlm.models.families import FAMILIES, window_of

TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5))
OTHERS = {
    "phi3, rope for half a head": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gemma3_text, bounded logits": ("gemma3_text", {"final_logit_softcapping": 4.0}),
    "glm, rope for all of each head": ("glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    "olmo3, yarn": (
        "olmo3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                             "original_max_position_embeddings": 32}},
    ),
}  # fmt: skip


def decode(model):
    """Compute the logits of all positions in float64, from the form only."""
    config = model.config
    form, weights = read_form(config, "a plain decoder"), model.double().state_dict()

    def normed(x, weight):
        gain = weight + form.norm_offset
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * gain

    def turned(x, rope):
        if rope is None:
            return x
        turns = torch.tensor(rope.turns, dtype=torch.float64)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * turns
        one, other = x.chunk(2, -1)
        rotated = torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)
        return torch.where((turns != 0).repeat(2), rotated * rope.scaling, x)

    def heads(x, tensors, name):
        y = torch.nn.functional.linear(
            x, tensors[f"self_attn.{name}_proj.weight"], tensors.get(f"self_attn.{name}_proj.bias")
        )
        gain = tensors.get(f"self_attn.{name}_norm.weight")
        if gain is not None and form.qk_norm == "all":
            y = normed(y, gain)
        y = y.unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        return normed(y, gain) if gain is not None and form.qk_norm == "head" else y

    activation = {"silu": torch.nn.functional.silu}.get(
        form.activation, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    positions = torch.arange(len(TOKENS))
    x = weights["model.embed_tokens.weight"][TOKENS] * form.embedding_scale
    for layer in range(config.num_hidden_layers):
        tensors = layer_tensors(config, weights, layer)
        if "attention" not in config.skipped(layer):
            read = normed(x, tensors["input_layernorm.weight"]) if form.norm_before else x
            queries, keys, values = (heads(read, tensors, name) for name in "qkv")
            rope = read_rope(config, layer)
            queries, keys = turned(queries, rope), turned(keys, rope)
            keys, values = (one.repeat_interleave(len(queries) // len(one), 0) for one in (keys, values))
            hidden = positions[None, :] > positions[:, None]
            if window := window_of(config, layer):
                hidden |= positions[None, :] <= positions[:, None] - window
            scores = (queries @ keys.transpose(1, 2) * form.attention_scale).masked_fill(hidden, -torch.inf)
            output = (scores.softmax(-1) @ values).transpose(0, 1).flatten(1)
            output = torch.nn.functional.linear(
                output, tensors["self_attn.o_proj.weight"], tensors.get("self_attn.o_proj.bias")
            )
            output = normed(output, tensors["attention_output_norm.weight"]) if form.norm_after else output
            x = x + output * form.residual_scale
        if "mlp" not in config.skipped(layer):
            read = normed(x, tensors["post_attention_layernorm.weight"]) if form.norm_before else x
            gate, up, down = (
                (tensors[f"mlp.{name}_proj.weight"], tensors.get(f"mlp.{name}_proj.bias"))
                for name in ("gate", "up", "down")
            )
            linear = torch.nn.functional.linear
            output = linear(activation(linear(read, *gate)) * linear(read, *up), *down)
            output = normed(output, tensors["mlp_output_norm.weight"]) if form.norm_after else output
            x = x + output * form.residual_scale
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = normed(x, weights["model.norm.weight"]) @ weights[name].T * form.logit_scale
    return logits if form.logit_softcap is None else form.logit_softcap * torch.tanh(logits / form.logit_softcap)


@pytest.mark.parametrize("shape", ["groups differ", "only half layers"])
@pytest.mark.parametrize("case", [*_KNOWN, *OTHERS])
def test_form_decoder_matches_logits(case, shape, tmp_path):
    family, settings = OTHERS.get(case, (case, {}))
    config = make_config(family, **settings)
    config.per_layer_config = SHAPES[shape]
    model = save_pruned(config, tmp_path).double()
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
        found = decode(model)
    # transformers computes RoPE, and most norms, in float32.
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


def test_form_of_cases_differs():
    def turns(family, **settings):
        return read_rope(make_config(family, **settings), 0).turns

    assert 0 in turns("glm") and 0 not in turns("llama")
    assert 0 in turns("phi3", **OTHERS["phi3, rope for half a head"][1])
    ropes = [read_rope(make_config("gemma3_text"), layer) for layer in range(2)]
    assert ropes[0] != ropes[1]
    assert [read_rope(make_config("smollm3"), layer) is None for layer in range(3)] == [False, True, False]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(_KNOWN)))
def test_form_of_other_families_refused(family):
    with pytest.raises(UserError, match=f"an engine cannot run a {family} model whose layers differ in size: it has"):
        read_form(make_config(family), "an engine")


def test_form_with_attention_softcap_refused():
    with pytest.raises(UserError, match="an engine does not support the attention softcap of a gemma3_text model"):
        read_form(make_config("gemma3_text", attn_logit_softcapping=50.0), "an engine")
