"""Tests of predicted costs: they follow the settings, and an impossible prediction gives a one-line error."""

import shutil

import pytest
import torch
from helpers import make_checkpoint

import darwinlm
from darwinlm.cli import main
from darwinlm.commands.plan import plan_run, predict
from darwinlm.config.loading import load_recipe
from darwinlm.estimate.rates import GPUS, Machine, rates_of
from darwinlm.models.config import load_config
from darwinlm.models.families import dense_config
from darwinlm.models.sites import find_sites


def recipe_for(model, **settings):
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return load_recipe("quick", {"model": str(model), "target": 0.7, "data.sequence_length": 64, **dotted})


def costs_of(model, machine=None, **settings):
    recipe = recipe_for(model, **settings)
    config = dense_config(load_config(str(model)))
    machine = machine or Machine(name="one", devices=1, memory=80e9, accelerator=True)
    rates = rates_of(config, GPUS["h100"], 64)
    return predict(config, find_sites(config, "kv_group"), recipe, 0.7, machine, rates)


def stages(costs):
    return {stage.name: stage for stage in costs.stages}


def test_plan_run_sizes_from_config_only(checkpoint, tmp_path):
    folder = tmp_path / "config alone"
    folder.mkdir()
    shutil.copy(checkpoint("qwen3") / "config.json", folder)
    _, costs = plan_run(recipe_for(folder), gpu="a100", gpus=2)
    state = darwinlm.models.loading.load_dense(str(checkpoint("qwen3")), "kv_group", torch.device("cpu"))
    assert costs.dense_parameters == state.parameters
    assert costs.smallest_parameters == state.fixed_parameters
    assert costs.target_parameters == round(0.7 * state.parameters)


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({"recovery__tokens": 10**9}, "recovery"),
        ({"search__generations": 400}, "search"),
        ({"data__calibration_tokens": 10**8}, "database"),
        ({"data__test_tokens": 10**8}, "evaluation"),
        ({"workload__prompt_tokens": 10**6}, "evaluation"),
        ({"workload__batch_size": 10**4}, "evaluation"),
    ],
)
def test_costs_proportional_to_settings(settings, stage, checkpoint):
    few, some, double = (
        stages(costs_of(checkpoint("llama"), **{key: int(value * times) for key, value in settings.items()}))
        for times in (0.5, 1, 2)
    )
    steps = [some[stage].seconds - few[stage].seconds, double[stage].seconds - some[stage].seconds]
    assert steps[0] > 0 and steps[1] == pytest.approx(2 * steps[0], rel=0.01)
    for other in set(some) - {stage}:
        assert double[other].seconds == pytest.approx(some[other].seconds)


def test_costs_with_several_devices_and_sharding(checkpoint):
    training = {"recovery__tokens": 10**9, "recovery__batch_size": 8, "recovery__refit_tokens": 0}
    one = stages(costs_of(checkpoint("llama"), **training))
    eight = Machine(name="eight", devices=8, memory=80e9, accelerator=True)
    many = stages(costs_of(checkpoint("llama"), eight, **training))
    assert many["recovery"].seconds == pytest.approx(one["recovery"].seconds / 8, rel=0.05)
    shared = costs_of(checkpoint("llama"), eight, **training, recovery__sharding="fsdp")
    assert stages(shared)["recovery"].memory < many["recovery"].memory


def test_costs_of_refit(checkpoint):
    """Four float32 streams of all tokens: on the device, or in CPU memory if layers are streamed."""
    large = Machine(name="large", devices=1, memory=80e9, accelerator=True)

    def recovery(tokens, **settings):
        settings |= {"recovery__tokens": 0, "recovery__refit_tokens": tokens, "data__train_tokens": 10**9}
        return stages(costs_of(checkpoint("llama"), large, **settings))["recovery"]

    few, many = recovery(10**6), recovery(10**7)
    hidden = 48
    assert many.memory - few.memory == pytest.approx(1.15 * 9 * 10**6 * hidden * 16)
    streamed = recovery(10**7, search__offload="cpu")
    assert streamed.memory < many.memory
    assert streamed.host_memory > 10**7 * hidden * 16


def test_costs_advice_when_memory_is_exceeded(checkpoint):
    small = Machine(name="small", devices=2, memory=1e6, accelerator=True)
    costs = costs_of(checkpoint("llama"), small)
    assert "recovery.activations=recompute" in costs.advice
    assert "recovery.sharding=fsdp" in costs.advice
    large = Machine(name="large", devices=2, memory=1e12, accelerator=True)
    assert costs_of(checkpoint("llama"), large).advice == ()


def test_plan_command_prints_table(checkpoint, capsys, monkeypatch):
    command = ["darwinlm", "plan", str(checkpoint("llama")), "--target", "0.7", "--gpu", "h100", "--gpus", "8"]
    monkeypatch.setattr("sys.argv", [*command, "--gpu-memory", "40GB", "--set", "data.sequence_length=64"])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "on 8 x h100, 40 GB each: predicted, not measured" in " ".join(out.split())
    assert all(stage in out for stage in ("database", "search", "recovery", "evaluation", "disk"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "tpu"], "plan: unknown --gpu 'tpu'; choose one of h100"),
        (["--gpu", "h100", "--gpu-memory", "lots"], "plan: --gpu-memory 'lots' is not a size; write it as 80GB"),
        (["--set", "target=latency=0.5"], "expected one number of parameters, such as 0.5 or 2.7B"),
        (["--set", "target=0.01"], "target 0.01"),
    ],
)
def test_plan_command_error_one_line(options, message, checkpoint, capsys, monkeypatch):
    command = ["darwinlm", "plan", str(checkpoint("llama")), "--target", "0.7", *options]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1 and message in error


def test_costs_of_omitted_work(checkpoint, tmp_path):
    model = checkpoint("llama")
    whole = stages(costs_of(model))
    assert stages(costs_of(model, search__uniform=True))["search"].seconds < 0.5 * whole["search"].seconds
    untried, adamw = {"search__trial_tokens": [0, 0]}, {"search__trial_optimizer": "adamw"}
    trained = stages(costs_of(model, **adamw))["search"]
    assert trained.memory > whole["search"].memory
    assert stages(costs_of(model, **untried, **adamw))["search"].memory < trained.memory
    # Generation 0 trains its plans too.
    first = stages(costs_of(model, search__generations=0, **adamw))
    assert first["search"].memory == pytest.approx(trained.memory)
    assert first["search"].memory > stages(costs_of(model, search__generations=0, **untried, **adamw))["search"].memory
    left = stages(costs_of(model, recovery__tokens=0, recovery__refit_tokens=512))
    assert left["recovery"].memory < stages(costs_of(model, recovery__refit_tokens=512))["recovery"].memory
    assert stages(costs_of(model, recovery__tokens=0, recovery__refit_tokens=0))["recovery"].seconds == 0
    # Mixtures are uniform by default.
    mixture = make_checkpoint("mixtral", tmp_path)
    by_default, asked = (stages(costs_of(mixture, **settings)) for settings in ({}, {"search__uniform": True}))
    assert by_default == asked != stages(costs_of(mixture, search__uniform=False))
