"""Tests of scores near a base plan against models cut as a whole."""

import pytest
import torch
from helpers import VOCABULARY

from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import build_model
from darwinlm.plan import Plan
from darwinlm.search.neighbourhood import Neighbourhood

BLOCKS = torch.randint(0, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(4), dtype=torch.int32)


def one_level_away(space, base, index):
    level = base.levels[index]
    moved = level + 1 if level + 1 < len(space.sites[index].units) else level - 1
    return Plan(levels=(*base.levels[:index], moved, *base.levels[index + 1 :]))


def test_neighbourhood_matches_whole_model(pruned):
    dense, database = pruned("mistral", "query_head")
    base = Plan(levels=tuple(i % 3 for i in range(len(dense.sites))))
    reference = DenseReference(dense.model, BLOCKS)
    near = Neighbourhood(dense, reference, lambda i, k: database.cut(dense.sites[i], k, dense.device), base)
    space = database.space(dense.sites)
    one_off = [one_level_away(space, base, index) for index in range(len(space.sites))]
    for plan in [base, *one_off, Plan(levels=tuple(len(site.units) - 1 for site in space.sites))]:
        cuts = database.cuts(dense.sites, plan.levels, dense.device)
        whole = build_model(dense.config, dense.sites, dense.weights, cuts)
        assert near.compare(plan.levels).kl == pytest.approx(reference.compare(whole).kl, rel=1e-5)
