"""Tests of every supported family: the same checks for all, on tiny random models with their special features."""

import pytest
import torch
from helpers import FAMILIES as WELL_TESTED
from helpers import OWN_SETTINGS, SETTINGS, SIZES, TARGET, VOCABULARY, make_checkpoint, make_config, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from darwinlm.commands import doctor
from darwinlm.config.recipe import DatabaseRecipe, WorkloadRecipe
from darwinlm.database.build import build_database
from darwinlm.database.grams import walk_blocks
from darwinlm.errors import UserError
from darwinlm.export.hf import export_hf
from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model
from darwinlm.models.families import FAMILIES, family_of, is_hybrid
from darwinlm.models.heads import Head, shape_logits
from darwinlm.models.loading import load_dense
from darwinlm.models.modeling_darwinlm import Nothing
from darwinlm.pipeline import prune
from darwinlm.plan import Plan
from darwinlm.recovery.refit import refit
from darwinlm.search.budgets import measure_latencies
from darwinlm.search.forecast import spearman
from darwinlm.search.neighbourhood import Neighbourhood
from darwinlm.search.sensitivity import measure_sensitivity

CPU = torch.device("cpu")
OTHERS = sorted(set(FAMILIES) - set(WELL_TESTED))
"""The other families have the same checks, and more, in their own files."""
FORMS = ("llama", "gemma3_text", "olmo2", "cohere", "phi3", "granite", "glm4")
"""One family of each form of layers: serial, with norms around or after parts, parallel, with fused projections, with
scaled parts, and fused with norms around."""
TOKENS = torch.randint(0, VOCABULARY - 3, (3, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    known = {}

    def get(family):
        if family not in known:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family) / "dense")
            known[family] = load_dense(str(folder), "kv_group", CPU)
        return known[family]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_doctor_passes(family, load, monkeypatch):
    """The doctor compares level 0 with transformers, cuts with masks, caches, gradients, saving and loading, and
    verifies each export or reports why it is refused."""
    targets = ["gguf", "vllm", "hf-native", "mlx"]
    monkeypatch.setattr(doctor, "TARGETS", [*targets, "onnx"] if is_hybrid(make_config(family)) else targets)
    examination = doctor.examine(load(family).source)
    assert examination.passed, [check for check in examination.checks if check.result == "failed"]
    found = {check.name: check.result for check in examination.checks}
    assert found["level 0 equals transformers' model"] == "passed"
    # OLMoE in transformers has norms over all heads, of one size.
    natively = "hf-native" if FAMILIES[family].experts else "vllm"
    assert found[f"export --to {natively}"] == ("skipped" if family == "olmoe" else "passed")
    refused = {check.name: check.note for check in examination.checks if check.result == "skipped"}
    assert all(note and "\n" not in note for note in refused.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_head_logits(family, load):
    dense = load(family)
    with torch.no_grad():
        logits = dense.model(TOKENS, use_cache=False).logits
        hidden = dense.model.model(TOKENS, use_cache=False).last_hidden_state
    assert torch.allclose(dense.head.logits(hidden.flatten(0, 1)).view_as(logits), logits, atol=1e-5)
    if dense.head.softcap is not None:
        assert logits.abs().max() > dense.head.softcap / 3  # otherwise the softcap has no effect


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_head_gradients_match_autograd(family, load):
    dense, generator = load(family), torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(5, dense.config.hidden_size, generator=generator)
    target_NV = torch.randn(5, dense.config.vocab_size, generator=generator).softmax(-1)
    ids_N = torch.arange(5)
    head = Head.of(dense.model)
    with torch.enable_grad():
        leaf_ND = hidden_ND.clone().requires_grad_(True)
        logits_NV = shape_logits(dense.config, dense.model.lm_head(leaf_ND))
        log_q_NV = logits_NV.log_softmax(-1)
        (by_kl_ND,) = torch.autograd.grad(-(target_NV * log_q_NV).sum(), leaf_ND, retain_graph=True)
        (by_loss_ND,) = torch.autograd.grad(-log_q_NV.gather(1, ids_N[:, None]).sum(), leaf_ND)
    logits_NV = head.logits(hidden_ND)
    mean_ND = head.back(logits_NV.softmax(-1), logits_NV)
    torch.testing.assert_close(mean_ND - head.back(target_NV, logits_NV), by_kl_ND, atol=1e-4, rtol=1e-4)
    found_ND = head.mean_head_rows(hidden_ND) - head.rows(ids_N, hidden_ND)
    torch.testing.assert_close(found_ND, by_loss_ND, atol=1e-4, rtol=1e-4)


def keep_in(found):
    """Return a hook that stores input and output in `found`."""

    def hook(module, inputs, output):
        found["input"], found["output"] = inputs[0], output

    return hook


@pytest.mark.parametrize("family", FORMS)
def test_grams_weighted_by_stream(family, load, calibration, tmp_path):
    """Compute the stream after attention differently: as the output of the layer without its MLP."""
    dense = load(family)
    form = family_of(dense.config)
    walked = dict(walk_blocks(dense, calibration, batch_size=3, scratch=tmp_path))
    for site, statistics in walked.items():
        model = dense.load(CPU, torch.float32)
        layer, outputs, streams = model.model.layers[site.layer], {}, {}
        layer.get_submodule(form.output(site.kind)).register_forward_hook(keep_in(outputs))
        layer.register_forward_hook(keep_in(streams))
        if site.kind == "attention" and not form.parallel:
            layer.set_submodule(form.mlp, Nothing("mlp"))
            for norm in dense.config.layer_parts["mlp"][1:]:
                layer.set_submodule(norm, torch.nn.Identity())
        with torch.no_grad():
            model(calibration, use_cache=False)
        x, output, stream = outputs["input"], outputs["output"], streams["output"]
        x = x.flatten(0, 1).double() / stream.flatten(0, 1).double().norm(dim=1, keepdim=True)
        if form.norm_after(site.kind):
            x = x / (output.flatten(0, 1).double().square().mean(1, keepdim=True) + dense.config.rms_norm_eps).sqrt()
            assert statistics.gain_O.shape == (dense.config.hidden_size,)
        torch.testing.assert_close(statistics.gram_II.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FORMS)
def test_neighbourhood_scores_and_refit(family, load, calibration, tmp_path):
    dense = load(family)
    database = build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=4), tmp_path)
    space = database.space(dense.sites)
    base, other = [1] * len(space.sites), [1] * len(space.sites)
    other[2] = len(space.sites[2].units) - 1
    reference = DenseReference(dense.model, TOKENS)

    def cut(index, level):
        return database.cut(dense.sites[index], level, CPU)

    neighbourhood = Neighbourhood(dense, reference, cut, Plan(levels=tuple(base)))
    for levels in (base, other):
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
        assert neighbourhood.compare(levels).kl == pytest.approx(reference.compare(model).kl, rel=1e-4, abs=1e-6)
    model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, base, CPU), trainable=True)
    fitted = DenseReference(dense.model, calibration)
    before = fitted.compare(model).kl
    refit(model, dense.model, calibration)
    assert fitted.compare(model).kl < before


@pytest.mark.parametrize("family", ["olmo2", "olmo3"])
def test_norm_over_all_heads_corrected(family, calibration, tmp_path):
    """Queries after the norm are as large as before, if multiplied by the calibrated factor."""
    folder = make_checkpoint(family, tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor[: len(tensor) // 2] *= 4  # make the heads of the first KV head larger
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = load_dense(str(folder), "kv_group", CPU)
    database = build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=4), tmp_path / "database")
    site = dense.sites[2]
    cut = database.cut(site, 1, CPU)
    assert len(cut.kept) == 1 and set(cut.factors) == {
        f"model.layers.1.self_attn.{name}.weight" for name in ("q_norm", "k_norm")
    }
    queries = {}
    for name, factors in (("dense", None), ("corrected", cut.factors), ("plain", {})):
        cuts = {} if factors is None else {site.name: Cut(cut.kept, cut.output_weight, factors)}
        model = build_model(dense.config, dense.sites, dense.weights, cuts)
        found = queries[name] = {}
        model.get_submodule("model.layers.1.self_attn.q_norm").register_forward_hook(keep_in(found))
        with torch.no_grad():
            model(calibration, use_cache=False)
    (unit,), width = cut.kept, site.columns_per_unit
    wanted = queries["dense"]["output"][..., unit * width : (unit + 1) * width]
    errors = {name: (queries[name]["output"] - wanted).norm() / wanted.norm() for name in ("corrected", "plain")}
    assert errors["corrected"] < errors["plain"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "olmo2", "phi3", "cohere", "qwen3_5_text"])
def test_run_of_family(family, load, text, tmp_path):
    settings = {**SETTINGS, "data.source": str(text)}
    found = prune(load(family).source, target=TARGET, out=tmp_path / "run", settings=settings)
    dense, *_, model = found.metrics["rows"]
    assert model["parameters"] <= TARGET * dense["parameters"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(written(TOKENS).logits, found.load()(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("family", FORMS)
def test_removed_parts_have_positive_sensitivity(family, load, calibration, tmp_path):
    """Sensitivities expand KL after the norm of a part, which is invariant to the scale of its input."""
    dense = load(family)
    database = build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=4), tmp_path)
    space = database.space(dense.sites)
    base = Plan(levels=(0,) * len(space.sites))
    blocks = TOKENS.repeat(1, 3)[:, :48]
    found = measure_sensitivity(
        dense, lambda i, level: database.cut(dense.sites[i], level, CPU), space, base, blocks, seed=0, draws=4
    )
    reference = DenseReference(dense.model, blocks)
    costs, real = found.costs(), []
    for index, site in enumerate(space.sites):
        levels = [0] * len(space.sites)
        levels[index] = len(site.units) - 1
        model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
        real.append(reference.compare(model).kl)
        assert costs[index][-1] > 0
    assert spearman([row[-1] for row in costs], real).rho > 0


@pytest.mark.parametrize("family", ["gemma", "gemma3_text"])
def test_doctor_passes_in_bfloat16(family, tmp_path, monkeypatch):
    """Gemma multiplies embeddings by a number that bfloat16 would round."""
    monkeypatch.setattr(doctor, "TARGETS", ["vllm", "hf-native"])
    folder = make_checkpoint(family, tmp_path / "dense", torch.bfloat16, hidden_size=40, num_attention_heads=4)
    examination = doctor.examine(str(folder))
    assert examination.passed, [check for check in examination.checks if check.result == "failed"]


@pytest.mark.parametrize("family", ["cohere", "qwen3_5_text"])
def test_measure_latencies_with_parts_outside_sites(family, load, calibration, tmp_path):
    dense = load(family)
    database = build_database(dense, calibration, DatabaseRecipe(levels=3, batch_size=4), tmp_path)
    workload = WorkloadRecipe(prompt_tokens=4, new_tokens=2)
    table = measure_latencies(dense, database.space(dense.sites), workload)
    assert table["fixed"] > 0 and table["attention"] and table["mlp"]


def test_neighbourhood_with_empty_layers(load, calibration, tmp_path):
    whole = load("llama")
    gone = {site.name: Cut((), None) for site in whole.sites if site.layer == 1}
    export_hf(build_model(whole.config, whole.sites, whole.weights, gone), whole, {}, "", tmp_path / "pruned")
    dense = load_dense(str(tmp_path / "pruned"), "kv_group", CPU)
    database = build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=4), tmp_path / "database")
    base, levels = [0] * len(dense.sites), [0, 0, 1, 1]
    reference = DenseReference(whole.model, TOKENS)

    def cut(index, level):
        return database.cut(dense.sites[index], level, CPU)

    neighbourhood = Neighbourhood(dense, reference, cut, Plan(levels=tuple(base)))
    model = build_model(dense.config, dense.sites, dense.weights, database.cuts(dense.sites, levels, CPU))
    assert neighbourhood.compare(levels).kl == pytest.approx(reference.compare(model).kl, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_saved_model_needs_trust_remote_code(family, load, tmp_path):
    dense = load(family)
    last = next(site for site in reversed(dense.sites) if not site.routed)
    gone = {last.name: Cut((), None)}
    model = build_model(dense.config, dense.sites, dense.weights, gone)
    export_hf(model, dense, {}, "", tmp_path / "model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(written(TOKENS).logits, model(TOKENS).logits, atol=1e-5)
    with pytest.raises(KeyError, match="this model is pruned: load it with trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)


def test_setting_that_depends_on_heads_refused(tmp_path):
    """The size of Phi's norm on queries depends on the number of heads."""
    folder = make_checkpoint("phi", tmp_path, qk_layernorm=True)
    with pytest.raises(UserError, match=r"layers\.2\.attention with fewer units cannot be built .* setting"):
        load_dense(str(folder), "kv_group", CPU)


MULTIMODAL = {
    "gemma3": ("gemma3_text", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}),
    "mistral3": ("mistral", {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}),
    "qwen3_5": ("qwen3_5_text", {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_multimodal_checkpoint_text_model(kind, text, tmp_path, caplog):
    family, vision = MULTIMODAL[kind]
    settings = {**SIZES, "model_type": family, **OWN_SETTINGS[family]}
    own = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind.startswith("qwen3_5"):
        own = {"out_hidden_size": SIZES["hidden_size"]}
    config = AutoConfig.for_model(kind, text_config=settings, vision_config={**vision, **own})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    caplog.set_level("INFO")
    dense = load_dense(str(tmp_path / "whole"), "kv_group", CPU)
    assert "is multimodal: only its text model is pruned" in caplog.text
    with torch.no_grad():
        assert torch.allclose(dense.model(TOKENS).logits, whole(input_ids=TOKENS).logits, atol=1e-5)
    export_hf(dense.model, dense, {}, "# card\n", tmp_path / "model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.no_grad():
        assert torch.allclose(written(TOKENS).logits, whole(input_ids=TOKENS).logits, atol=1e-5)
    assert not [name for name in written.state_dict() if "vision" in name or "visual" in name]
