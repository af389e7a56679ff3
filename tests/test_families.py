"""Cutting is exact: for every family and granularity, against transformers' own model with masked weights."""

import pytest
import torch
from conftest import FAMILIES, GRANULARITIES, VOCABULARY
from transformers import AutoModelForCausalLM

from darwinlm.adapters.cutting import build_model, count_parameters, kv_elements
from darwinlm.adapters.modeling_darwinlm import CACHE
from darwinlm.errors import UserError

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))

both = pytest.mark.parametrize("granularity", GRANULARITIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def native_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mask(native, site, cut, weight):
    """Do to the native model what the cut means: refitted columns stay, all others are zero."""
    output = native.get_submodule(site.output)
    masked = torch.zeros_like(weight)
    if cut.kept:
        columns = [u * site.columns_per_unit + c for u in cut.kept for c in range(site.columns_per_unit)]
        masked[:, columns] = cut.output_weight
    elif output.bias is not None:
        output.bias.data.zero_()
    output.weight.data = masked


@every_family
@both
def test_level_0_is_the_dense_model(family, granularity, checkpoint, pruned):
    dense, _ = pruned(family, granularity)
    with torch.no_grad():
        expected = native_model(checkpoint(family))(TOKENS).logits
        assert torch.allclose(dense.model(TOKENS).logits, expected, atol=1e-5)


@every_family
def test_a_model_in_bfloat16_has_the_angles_of_the_dense_one(family, checkpoint, pruned):
    dense, _ = pruned(family, "kv_group")
    model = dense.whole(torch.device("cpu"), torch.float32).to(torch.bfloat16)
    long = TOKENS.repeat(1, 5)
    with torch.no_grad():
        assert torch.equal(model(long).logits, dense.whole(torch.device("cpu"), torch.bfloat16)(long).logits)
        rounded = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16).float()
        # Transformers' rope does round: made anew, as it is when a checkpoint is loaded.
        rounded.model.rotary_emb = type(rounded.model.rotary_emb)(config=rounded.config)
        assert torch.allclose(model.float()(long).logits, rounded(long).logits, atol=1e-4)


@every_family
@both
def test_a_cut_model_gives_the_logits_of_the_masked_dense_model_at_every_level(family, granularity, checkpoint, pruned):
    dense, database = pruned(family, granularity)
    space = database.space(dense.sites)
    deepest = max(len(site.units) for site in space.sites) - 1
    for depth in range(1, deepest + 1):
        # Neighbouring sites get different levels, so that sizes differ within a layer and from layer to layer.
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
def test_parameters_and_cache_are_counted_as_the_cut_model_has_them(family, granularity, pruned):
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
                cache = model(TOKENS, use_cache=True)[CACHE].layers[site.layer]
                stored = 0 if cache.keys is None else 2 * cache.keys.shape[1] * cache.keys.shape[3]
                assert stored == kv_elements(site, cut.kept, dense.config.head_dim)


@every_family
def test_the_finest_level_of_an_mlp_is_even_in_parameters(family, pruned):
    dense, database = pruned(family, "kv_group")
    for site in database.space(dense.sites).sites:
        assert site.units[0] > site.units[-1] == 0
        assert list(site.units) == sorted(site.units, reverse=True)
        assert site.parameters[-1] == 0
        assert list(site.errors) == sorted(site.errors)


def test_an_unsupported_family_is_refused_with_the_supported_ones(tmp_path):
    from transformers import GPT2Config

    from darwinlm.adapters.loading import load_config

    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2' is not supported; supported families: llama, mistral, qwen2, qwen3"):
        load_config(str(tmp_path))
