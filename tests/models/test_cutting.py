"""Tests of cutting against the transformers model with masked weights, for every family and granularity."""

import pytest
import torch
from helpers import FAMILIES, GRANULARITIES, VOCABULARY, make_checkpoint, mask, native_model
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from darwinlm.errors import UserError
from darwinlm.export.hf import save_model
from darwinlm.models.cutting import Cut, build_model, count_parameters, kv_elements
from darwinlm.models.loading import load_dense
from darwinlm.models.pruned import load
from darwinlm.models.walking import CACHE

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))

both = pytest.mark.parametrize("granularity", GRANULARITIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@both
def test_level_0_is_dense_model(family, granularity, checkpoint, pruned):
    dense, _ = pruned(family, granularity)
    with torch.no_grad():
        expected = native_model(checkpoint(family))(TOKENS).logits
        assert torch.allclose(dense.model(TOKENS).logits, expected, atol=1e-5)


@every_family
def test_rope_angles_in_bfloat16(family, checkpoint, pruned):
    dense, _ = pruned(family, "kv_group")
    model = dense.load(torch.device("cpu"), torch.float32).to(torch.bfloat16)
    long = TOKENS.repeat(1, 5)
    with torch.no_grad():
        assert torch.equal(model(long).logits, dense.load(torch.device("cpu"), torch.bfloat16)(long).logits)
        rounded = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16).float()
        # RoPE is rounded in transformers: create it again, as loading a checkpoint does.
        rounded.model.rotary_emb = type(rounded.model.rotary_emb)(config=rounded.config)
        assert torch.allclose(model.float()(long).logits, rounded(long).logits, atol=1e-4)


@every_family
@both
def test_cut_model_matches_masked_model(family, granularity, checkpoint, pruned):
    dense, database = pruned(family, granularity)
    space = database.space(dense.sites)
    deepest = max(len(site.units) for site in space.sites) - 1
    for depth in range(1, deepest + 1):
        # Neighboring sites get different levels, so that sizes differ within a layer and between layers.
        plan = [min(len(s.units) - 1, max(1, depth - i % 2)) for i, s in enumerate(space.sites)]
        cuts = database.cuts(dense.sites, plan, dense.device)
        native = native_model(checkpoint(family))
        for site in dense.sites:
            mask(native, site, cuts[site.name], dense.weights[f"{site.output}.weight"])
        model = build_model(dense.config, dense.sites, dense.weights, cuts)
        with torch.no_grad():
            assert torch.allclose(model(TOKENS).logits, native(TOKENS).logits, atol=1e-4), plan
        assert sum(p.numel() for p in model.parameters()) == space.parameters(plan)


@every_family
@both
def test_count_parameters_and_kv_elements(family, granularity, pruned):
    dense, database = pruned(family, granularity)
    shapes = {name: tensor.shape for name, tensor in dense.weights.items()}
    for site in dense.sites:
        for level in range(1, len(database.space([site]).sites[0].units)):
            cut = database.cut(site, level, dense.device)
            model = build_model(dense.config, dense.sites, dense.weights, {site.name: cut})
            left = sum(p.numel() for p in model.parameters())
            gone = sum(t.numel() for t in dense.weights.values()) - left
            assert gone == count_parameters(site, shapes, range(site.num_units)) - count_parameters(
                site, shapes, cut.kept
            )
            if site.kind == "attention":
                layers = model(TOKENS, use_cache=True)[CACHE].layers
                skipped = [model.config.skipped(layer) for layer in range(model.config.num_hidden_layers)]
                assert len(layers) == sum("attention" not in parts for parts in skipped)
                keys = layers[model.model.layers[site.layer].self_attn.layer_idx].keys if cut.kept else None
                stored = 0 if keys is None else 2 * keys.shape[1] * keys.shape[3]
                assert stored == kv_elements(site, cut.kept, dense.config.head_dim)


@every_family
def test_levels_of_sites_are_monotonic(family, pruned):
    dense, database = pruned(family, "kv_group")
    for site in database.space(dense.sites).sites:
        assert site.units[0] > site.units[-1] == 0
        assert list(site.units) == sorted(site.units, reverse=True)
        assert site.parameters[-1] == 0
        assert list(site.errors) == sorted(site.errors)


def ropes(head_dim):
    """Return all RoPE types of transformers; some change after 32 positions."""
    factors = [1.0 + 0.1 * index for index in range(head_dim // 2)]
    return {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
        "longrope": {
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "short_factor": factors,
            "long_factor": [3 * factor for factor in factors],
        },
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }


def test_rope_types_complete():
    assert set(ropes(8)) == {"default", *ROPE_INIT_FUNCTIONS}


@every_family
@pytest.mark.parametrize("kind", ropes(8))
def test_rope_types_cut_saved_and_loaded(family, kind, pruned, tmp_path):
    head_dim = pruned(family, "kv_group")[0].config.head_dim
    rope = {"rope_type": kind, "rope_theta": 1e4, **ropes(head_dim)[kind]}
    folder = make_checkpoint(family, tmp_path / "dense", rope_parameters=rope)
    dense = load_dense(str(folder), "kv_group", torch.device("cpu"))
    native, cuts = native_model(folder), {}
    for number, site in enumerate(dense.sites):
        weight = dense.weights[f"{site.output}.weight"]
        # Remove the attention of the first layer and the MLP of the last; keep the first half of the others.
        kept = tuple(range(0 if number in (0, len(dense.sites) - 1) else site.num_units // 2))
        width = len(kept) * site.columns_per_unit
        cuts[site.name] = Cut(kept=kept, output_weight=weight[:, :width].clone() if kept else None)
        mask(native, site, cuts[site.name], weight)
    save_model(build_model(dense.config, dense.sites, dense.weights, cuts), torch.float32, tmp_path / "cut")
    loaded = load(tmp_path / "cut")
    for length in (24, 100):
        tokens = TOKENS.repeat(1, 5)[:, :length]
        with torch.no_grad():
            assert torch.allclose(loaded(tokens).logits, native(tokens).logits, atol=1e-4), length


def test_unsupported_family_refused(tmp_path):
    from transformers import GPT2Config

    from darwinlm.models.config import load_config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2' is not supported; supported families: arcee, cohere, "):
        load_config(str(tmp_path))
