"""FLAP (An et al., 2024, arXiv 2312.11983), reimplemented from the paper for our units.

A column of an output projection is scored by the variance of its input over tokens, times the squared norm of the
column. Scores are standardized within each site to make them comparable, and all units of the model are ranked
together, so that widths adapt. Removed units are replaced by their mean, as a bias of the output projection. As in the
authors' code, scores of attention are squared before they are standardized, and averaged over a unit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from calibrated import Calibrated
from even_widths import columns_of
from forms import add_parameter
from torch import Tensor

from darwinlm.models.cutting import Cut, build_model, count_parameters
from darwinlm.models.modeling_darwinlm import PrunedModel


@dataclass(frozen=True)
class Inputs:
    """Mean and variance over tokens of each input column of an output projection."""

    mean_I: Tensor
    variance_I: Tensor


@torch.no_grad()
def inputs_of(calibrated: Calibrated) -> dict[str, Inputs]:
    """Return the statistics of the calibration text by site."""
    dense, sums, tokens = calibrated.dense, dict[str, tuple[Tensor, Tensor]](), calibrated.blocks_BT.numel()

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(module: object, inputs: tuple[Tensor, ...]) -> None:
            x_NI = inputs[0].flatten(0, -2).double()
            first, second = sums.get(name, (0, 0))
            sums[name] = first + x_NI.sum(0), second + x_NI.square().sum(0)

        return hook

    hooks = [
        dense.model.get_submodule(site.output).register_forward_pre_hook(record(site.name)) for site in dense.sites
    ]
    calibrated._run()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (first, second) in sums.items():
        mean = first / tokens
        found[name] = Inputs(mean.float(), (second / tokens - mean.square()).clamp_min(0).float())
    return found


def scores(calibrated: Calibrated, inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    """Return the score of each unit, by site."""
    found = {}
    for site in calibrated.dense.sites:
        column_I = inputs[site.name].variance_I * calibrated.dense.weights[site.output_tensor].square().sum(0)
        if site.kind == "attention":
            column_I = column_I.square()
        column_I = (column_I - column_I.mean()) / column_I.std()
        found[site.name] = column_I.view(site.num_units, -1).mean(1)
    return found


def choose(calibrated: Calibrated, by_site: dict[str, Tensor], parameters: int) -> dict[str, Tensor]:
    """Return masks of the kept units: the best of each site, and the highest scores of all others that fit."""
    dense = calibrated.dense
    left, order, kept = parameters - dense.fixed_parameters, [], {}
    for site in dense.sites:
        one, two = (count_parameters(site, dense.shapes, range(count)) for count in (1, 2))
        best = int(by_site[site.name].argmax())
        kept[site.name] = torch.arange(site.num_units) == best
        # Including the bias, where the dense model has none.
        left -= one + (0 if f"{site.output}.bias" in dense.shapes else dense.config.hidden_size)
        others = [unit for unit in range(site.num_units) if unit != best]
        order += [(float(by_site[site.name][unit]), site.name, unit, two - one) for unit in others]
    for _, name, unit, cost in sorted(order, reverse=True):
        if cost <= left:
            kept[name][unit] = True
            left -= cost
    return kept


@torch.no_grad()
def compensated(calibrated: Calibrated, inputs: dict[str, Inputs], kept: dict[str, Tensor]) -> PrunedModel:
    """Return the model of the units `kept`, with the mean output of the removed units as a bias."""
    dense, cuts, biases = calibrated.dense, dict[str, Cut](), dict[str, Tensor]()
    for site in dense.sites:
        weight = dense.weights[site.output_tensor]
        units, gone = (mask.nonzero().flatten() for mask in (kept[site.name], ~kept[site.name]))
        columns = columns_of(site, gone)
        cuts[site.name] = Cut(tuple(units.tolist()), weight[:, columns_of(site, units)])
        biases[site.output] = weight[:, columns] @ inputs[site.name].mean_I[columns]
    model = build_model(dense.config, dense.sites, dense.weights, cuts)
    for name, bias_O in biases.items():
        # An existing bias is shared with the dense model, so it is replaced.
        before = dense.weights.get(f"{name}.bias")
        add_parameter(model.get_submodule(name), "bias", bias_O if before is None else before + bias_O)
    return model


def by_fluctuation(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Prune to at most `parameters` parameters, including the biases."""
    inputs = inputs_of(calibrated)
    kept = choose(calibrated, scores(calibrated, inputs), parameters)
    widths = [int(mask.sum()) for name, mask in kept.items() if name.endswith("mlp")]
    heads = [int(mask.sum()) for name, mask in kept.items() if name.endswith("attention")]
    name = f"KV heads {min(heads)} to {max(heads)}, channels {min(widths)} to {max(widths)}"
    yield name, compensated(calibrated, inputs, kept)
