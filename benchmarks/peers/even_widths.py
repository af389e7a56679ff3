"""Uniform width pruning: every layer keeps the same number of KV heads (with their query heads) and of MLP channels.

Units are kept by a score, and nothing is refitted. The score is either the weights only, or the weights of the output
projection times the norm of its inputs (Wanda, arXiv 2306.11695, summed over a unit; Minitron, arXiv 2407.14679, ranks
units by activations in much the same way).
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from calibrated import Calibrated
from torch import Tensor

from darwinlm.models.cutting import Cut, build_model, count_parameters
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.sites import Site


class Shape(NamedTuple):
    """Numbers of KV heads and MLP channels that every layer keeps."""

    heads: int
    channels: int

    def units(self, site: Site) -> int:
        """Return the number of units that `site` keeps."""
        return self.heads if site.kind == "attention" else self.channels


def even_shapes(dense: DenseModel, parameters: int) -> list[Shape]:
    """Return, for each number of KV heads, the widest MLPs such that the model has at most `parameters`."""
    attention, mlp = dense.sites[:2]
    layers, shapes = dense.config.num_hidden_layers, []
    channel = count_parameters(mlp, dense.shapes, [0, 1]) - count_parameters(mlp, dense.shapes, [0])
    norms = count_parameters(mlp, dense.shapes, [0]) - channel
    for heads in range(attention.num_units, 0, -1):
        each = (parameters - dense.fixed_parameters) // layers
        channels = (each - count_parameters(attention, dense.shapes, range(heads)) - norms) // channel
        if 0 < channels < mlp.num_units:
            shapes.append(Shape(heads, channels))
    return shapes


def named(dense: DenseModel, shape: Shape) -> str:
    """Describe `shape`."""
    attention, mlp = dense.sites[:2]
    return f"{shape.heads} of {attention.num_units} KV heads, {shape.channels} of {mlp.num_units} channels"


def columns_of(site: Site, kept: Tensor) -> Tensor:
    """Return the columns of the site's output projection that belong to the units `kept`."""
    return (kept[:, None] * site.columns_per_unit + torch.arange(site.columns_per_unit)).flatten()


def weight_scores(dense: DenseModel) -> dict[str, Tensor]:
    """Return, by site, the squared norm of all weights of each unit."""
    scores = {}
    for site in dense.sites:
        score_U = dense.weights[f"{site.output}.weight"].square().sum(0).view(site.num_units, -1).sum(1)
        for rows in site.inputs:
            power = dense.weights[rows.tensor].square().view(-1, rows.rows, *dense.shapes[rows.tensor][1:])
            score_U = score_U + power.flatten(1).sum(1)[list(rows.serves) or slice(None)]
        scores[site.name] = score_U
    return scores


def activation_scores(calibrated: Calibrated) -> dict[str, Tensor]:
    """Return, by site, the sum over each unit's columns j and all rows i of |W_ij| times the norm of input j."""
    dense, scores = calibrated.dense, {}
    for site in dense.sites:
        column_I = dense.weights[f"{site.output}.weight"].abs().sum(0) * calibrated.input_norms[site.name]
        scores[site.name] = column_I.view(site.num_units, -1).sum(1)
    return scores


def even_cuts(dense: DenseModel, scores: Mapping[str, Tensor], shape: Shape) -> dict[str, Cut]:
    """Return the cuts that keep the units with the highest scores in every site."""
    cuts = {}
    for site in dense.sites:
        if shape.units(site) < site.num_units:
            kept = scores[site.name].topk(shape.units(site)).indices.sort().values
            weight = dense.weights[f"{site.output}.weight"].index_select(1, columns_of(site, kept))
            cuts[site.name] = Cut(tuple(kept.tolist()), weight)
    return cuts


def by_weights(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Prune to each shape of `parameters`, keeping units by their weights."""
    yield from _models(calibrated.dense, weight_scores(calibrated.dense), parameters)


def by_activations(calibrated: Calibrated, parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    """Prune to each shape of `parameters`, keeping units by activations times weights."""
    yield from _models(calibrated.dense, activation_scores(calibrated), parameters)


def _models(dense: DenseModel, scores: Mapping[str, Tensor], parameters: int) -> Iterator[tuple[str, PrunedModel]]:
    for shape in even_shapes(dense, parameters):
        cuts = even_cuts(dense, scores, shape)
        yield named(dense, shape), build_model(dense.config, dense.sites, dense.weights, cuts)
