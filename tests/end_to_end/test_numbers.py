"""Tests of edge cases: one layer, one channel, inactive channels, repeated tokens, non-finite losses."""

import json
import math

import pytest
import torch
import transformers
from helpers import SETTINGS, VOCABULARY, make_checkpoint, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import darwinlm
from darwinlm.config.recipe import DatabaseRecipe, DataRecipe, SearchRecipe
from darwinlm.data.corpus import SPLITS, Corpus, pack
from darwinlm.data.tokens import Tokens
from darwinlm.database.build import build_database
from darwinlm.errors import UserError
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import load_dense
from darwinlm.optim.learning_rate import LearningRate
from darwinlm.pipeline import prune
from darwinlm.plan import parameter_budget
from darwinlm.search.allocation import error_plan, uniform_plan
from darwinlm.search.evolution import Evolution, Score
from darwinlm.search.trial_training import train_briefly
from darwinlm.search.trials import TrialScorer

CPU = torch.device("cpu")
SLOW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def shapes(draw):
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "model_type": draw(st.sampled_from(["llama", "qwen3"])),
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": kv_heads * group * draw(st.integers(1, 7)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 7)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "max_position_embeddings": 32,
    }


def write(shape, folder):
    config = transformers.AutoConfig.for_model(**{**shape, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@SLOW
@given(
    shape=shapes(),
    granularity=st.sampled_from(["kv_group", "query_head"]),
    levels=st.integers(1, 6),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6),
    target=st.floats(0.3, 1),
)
def test_any_shape_and_plan(shape, granularity, levels, draws, target, tmp_path_factory):
    dense = load_dense(write(shape, tmp_path_factory.mktemp("model")), granularity, CPU)
    tokens = torch.arange(16).view(2, 8) % shape["vocab_size"]
    recipe = DatabaseRecipe(levels=levels, granularity=granularity)
    database = build_database(dense, tokens, recipe, tmp_path_factory.mktemp("database"))
    space = database.space(dense.sites)
    assert space.dense_parameters == dense.parameters
    for site in space.sites:
        assert len(site.units) == len(site.parameters) == len(site.errors) <= levels + 1
        assert all(more > less for more, less in zip(site.units, site.units[1:], strict=False))
        assert site.errors[0] == 0 and all(math.isfinite(error) and error >= 0 for error in site.errors)
    plans = [tuple(int(x * len(site.units)) for x, site in zip(draws, space.sites, strict=False))]
    plans.append(tuple(len(site.units) - 1 for site in space.sites))
    try:
        budget = parameter_budget(target, space)
    except UserError:
        pass
    else:
        found = [plan for plan in (uniform_plan(space, budget), error_plan(space, budget)) if plan is not None]
        assert all(budget.holds(plan.levels) for plan in found)
        plans += [plan.levels for plan in found]
    for plan in plans:
        cuts = database.cuts(dense.sites, plan, CPU)
        model = build_model(dense.config, dense.sites, dense.weights, cuts)
        assert sum(parameter.numel() for parameter in model.parameters()) == space.parameters(plan)
        with torch.no_grad():
            cache = model(tokens, use_cache=True)
        assert torch.isfinite(cache.logits).all()
        attention = [module for name, module in model.named_modules() if name.endswith("k_proj")]
        heads = [module.out_features for module in attention]
        assert 2 * sum(heads) == space.kv_elements(plan)


@pytest.mark.parametrize("heads", [(6, 4), (5, 2), (2, 3)])
def test_kv_heads_not_dividing_heads_refused(heads, checkpoint, tmp_path):
    make_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_dense(str(tmp_path), "kv_group", CPU)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("head_dim", [1, 7])
def test_odd_head_dim_refused(head_dim, tmp_path):
    make_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": head_dim}))
    with pytest.raises(UserError, match=rf"^model '{tmp_path}'"):
        load_dense(str(tmp_path), "kv_group", CPU)


# ---- calibration on unusual text and weights


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


DEAD = {
    "some channels": lambda w: w["model.layers.1.mlp.up_proj.weight"][10:40].zero_(),
    "a whole MLP": lambda w: w["model.layers.1.mlp.up_proj.weight"].zero_(),
    "a KV head": lambda w: w["model.layers.1.self_attn.v_proj.weight"][:16].zero_(),
    "a whole attention": lambda w: w["model.layers.1.self_attn.v_proj.weight"].zero_(),
    "an output projection": lambda w: w["model.layers.1.mlp.down_proj.weight"].zero_(),
    "everything": lambda w: [tensor.zero_() for tensor in w.values()],
}


@pytest.mark.parametrize("case", DEAD)
def test_inactive_units_removed_first(case, calibration, tmp_path):
    folder = make_checkpoint("qwen3", tmp_path / "model")
    change_weights(folder, DEAD[case])
    dense = load_dense(str(folder), "kv_group", CPU)
    database = build_database(dense, calibration, DatabaseRecipe(levels=4), tmp_path / "database")
    space = database.space(dense.sites)
    assert all(math.isfinite(error) for site in space.sites for error in site.errors)
    for site in space.sites:
        for level in range(1, len(site.units) - 1):
            cut = database.cut(dense.sites[space.sites.index(site)], level, CPU)
            assert torch.isfinite(cut.output_weight).all()
    if case == "some channels":
        kept = set(database.cut(dense.sites[3], 1, CPU).kept)
        assert len(kept & set(range(10, 40))) == 30 - (64 - len(kept))
        assert space.sites[3].errors[1] < 1e-6
    if case in ("a whole MLP", "an output projection"):
        assert max(space.sites[3].errors) < 1e-6


@pytest.mark.parametrize("tokens", [torch.full((8, 32), 7), torch.zeros(1, 2), torch.arange(2).repeat(4, 8)])
def test_database_from_repeated_tokens(tokens, checkpoint, tmp_path):
    dense = load_dense(str(checkpoint("qwen3")), "kv_group", CPU)
    database = build_database(dense, tokens.int(), DatabaseRecipe(levels=4), tmp_path)
    assert all(math.isfinite(error) for site in database.space(dense.sites).sites for error in site.errors)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_database_independent_of_batch_size(batch_size, calibration, checkpoint, tmp_path):
    dense = load_dense(str(checkpoint("qwen3")), "kv_group", CPU)
    one, other = (
        build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=size), tmp_path / str(size))
        for size in (8, batch_size)
    )
    for site in dense.sites:
        first, second = one.cut(site, 1, CPU), other.cut(site, 1, CPU)
        assert first.kept == second.kept
        torch.testing.assert_close(first.output_weight, second.output_weight, rtol=1e-3, atol=1e-4)


def test_pack_documents_of_one_token():
    recipe = DataRecipe(
        source="x", sequence_length=8, calibration_tokens=16, train_tokens=8, validation_tokens=8, test_tokens=8
    )
    corpus = pack((Tokens.document([number % 50]) for number in range(40)), recipe)
    assert torch.cat([corpus.splits[split].input_ids_BT for split in SPLITS]).flatten().tolist() == list(range(40))


@pytest.mark.slow
def test_run_of_one_layer_and_one_character_documents(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = write(
        {"model_type": "llama", "vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 6, **shape},
        tmp_path / "model",
    )
    with open(tmp_path / "text.jsonl", "w") as file:
        for number in range(600):
            file.write(json.dumps({"text": chr(0x4E00 + number)}) + "\n")
    finished = prune(
        model, target=0.95, out=tmp_path / "run", settings={**SETTINGS, "data.source": str(tmp_path / "text.jsonl")}
    )
    rows = finished.metrics["rows"]
    assert all(math.isfinite(row["kl"]) and math.isfinite(row["perplexity"]) for row in rows)
    with torch.no_grad():
        assert torch.isfinite(darwinlm.load(finished.path)(torch.arange(8)[None]).logits).all()


# ---- non-finite losses


@pytest.fixture
def scorer(pruned, calibration):
    dense, database = pruned("qwen3", "kv_group")
    recipe = SearchRecipe(survivors=(1,), trial_tokens=(64,), score_tokens=(64,), learning_rate=1.0)
    corpus = Corpus(dict.fromkeys(("train", "validation"), Tokens.unmasked(calibration)))
    return dense, database, TrialScorer(dense, database, corpus, recipe)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_trial_with_nonfinite_loss(value, scorer, monkeypatch):
    dense, database, scorer = scorer
    plan = error_plan(database.space(dense.sites), parameter_budget(0.8, database.space(dense.sites)))

    def diverge(model, *arguments, **named):
        train_briefly(model, *arguments, **named)
        next(model.model.layers.parameters()).data.fill_(value)  # the ends are shared with the dense model
        return True

    monkeypatch.setattr("darwinlm.search.trials.train_briefly", diverge)
    assert scorer.score_after(plan, 64, 64).kl is None


def test_trial_with_nonfinite_gradient(scorer, monkeypatch):
    dense, database, scorer = scorer
    plan = error_plan(database.space(dense.sites), parameter_budget(0.8, database.space(dense.sites)))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda masters, most: torch.tensor(torch.inf))
    assert scorer.score_after(plan, 64, 64).kl is None


def test_train_briefly_stops_at_nonfinite_loss(pruned):
    dense, _ = pruned("qwen3", "kv_group")
    weights = {name: tensor.clone() for name, tensor in dense.weights.items()}
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    model = build_model(dense.config, dense.sites, weights, {}, trainable=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not train_briefly(model, torch.ones(4, 8), rate=LearningRate(1e-3), batch_size=2)
    for name, tensor in model.state_dict().items():  # in the dtype of training
        assert torch.equal(tensor, before[name].to(tensor.dtype))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scores=st.lists(st.sampled_from([None, 0.5, 1.0, 0.0]), min_size=200, max_size=200), seed=st.integers(0, 99))
def test_search_with_diverging_candidates(scores, seed, pruned_space):
    space = pruned_space
    budget = parameter_budget(0.8, space)
    recipe = SearchRecipe(
        descent_rounds=0, generations=3, offspring=4, survivors=(2, 1), trial_tokens=(1, 2), score_tokens=(1, 2)
    )
    search = Evolution(space, budget, recipe, [error_plan(space, budget)], seed)
    values = iter(scores)
    while (request := search.ask()) is not None:
        assert all(budget.holds(plan.levels) for plan in request.plans)
        search.tell([Score(next(values)) for _ in request.plans])
        json.dumps(search.state(), allow_nan=False)
        search = Evolution.resume(space, budget, recipe, json.loads(json.dumps(search.state())))
    assert budget.holds(search.parent.levels)


@pytest.fixture(scope="module")
def pruned_space(pruned):
    dense, database = pruned("qwen3", "kv_group")
    return database.space(dense.sites)
