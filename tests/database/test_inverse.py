"""Tests of the inverse of the damped Gram matrix: float32 is used only where it is as accurate as float64."""

import pytest
import torch
from plain_solver import DAMPING

from darwinlm.database import solver
from darwinlm.database.inverse import _INVERSE_ERROR, damped_inverse, inverse_if_float32_suffices
from darwinlm.database.solver import prune_site


def gram_of_condition(power, columns=700, seed=0):
    """Create a matrix with eigenvalues from 1 down to 10^-power, in random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    return ((directions * torch.logspace(0, -power, columns, dtype=torch.float64)) @ directions.T).float()


def relative_error(inverse, hessian):
    """Return the error of entries scaled as in a correlation matrix: the root mean square of the rows' norms."""
    exact = torch.linalg.inv(hessian)
    scale = exact.diagonal().rsqrt()
    return ((inverse.double() - exact) * scale[:, None] * scale).square().sum(1).mean().sqrt().item()


def test_inverse_float32_only_if_accurate():
    found = {}
    for power in (1, 2, 3, 4, 5, 6):
        gram = gram_of_condition(power)
        inverse = inverse_if_float32_suffices(gram, 1e-9)
        found[power] = inverse is not None
        hessian = gram.double() + 1e-9 * torch.eye(len(gram), dtype=torch.float64)
        if inverse is not None:
            assert relative_error(inverse, hessian) < 3 * _INVERSE_ERROR
        assert relative_error(damped_inverse(gram, 1e-9), hessian) < 3 * _INVERSE_ERROR
    assert found[1]
    assert found[2]
    assert not found[5]
    assert not found[6]


def test_inverse_float64_for_singular_matrix():
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x  # singular
    assert inverse_if_float32_suffices(gram, 1e-6) is None
    found = prune_site(torch.randn(8, 300), gram, columns_per_unit=1, sizes=[200], damping=1e-6)
    assert torch.isfinite(found[0].weight_OK).all()


@pytest.mark.parametrize("power", [2, 3])
def test_inverse_precision_changes_no_removal(power, monkeypatch):
    gram = gram_of_condition(power, columns=600)
    weight = torch.randn(32, 600, generator=torch.Generator().manual_seed(1))
    sizes = range(560, 0, -80)
    found = prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)
    monkeypatch.setattr(solver, "inverse_if_float32_suffices", lambda gram, ridge: None)
    for one, other in zip(
        found, prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING), strict=True
    ):
        assert one.kept == other.kept
        assert one.error == pytest.approx(other.error, rel=1e-4)
        assert torch.allclose(one.weight_OK, other.weight_OK, rtol=1e-3, atol=1e-3)
