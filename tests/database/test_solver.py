"""Tests of the blocked solver against the plain formulas: one unit at a time, full inverses, least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_solver import DAMPING, columns, hessian_of, least_squares, one_at_a_time, problem

from darwinlm.database import solver
from darwinlm.database.inverse import damped_inverse
from darwinlm.database.solver import prune_site, removal_error


@pytest.mark.parametrize(("units", "columns_per_unit"), [(24, 1), (6, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_prune_site_order_matches_exhaustive_search(units, columns_per_unit, seed):
    weight, _, gram = problem(units, columns_per_unit, seed=seed)
    order = one_at_a_time(weight, gram, columns_per_unit)
    sizes = list(range(units - 1, 0, -1))
    snapshots = prune_site(weight, gram, columns_per_unit=columns_per_unit, sizes=sizes, damping=DAMPING)
    assert [set(range(units)) - set(s.kept) for s in snapshots] == [set(order[: i + 1]) for i in range(units - 1)]


def test_prune_site_large_steps_match_single_steps():
    weight, _, gram = problem(300, 1)
    steps = prune_site(weight, gram, columns_per_unit=1, sizes=range(299, 0, -1), damping=DAMPING)
    leaps = prune_site(weight, gram, columns_per_unit=1, sizes=[200, 60, 1], damping=DAMPING)
    by_size = {len(s.kept): s for s in steps}
    for leap in leaps:
        assert leap.kept == by_size[len(leap.kept)].kept
        assert torch.allclose(leap.weight_OK, by_size[len(leap.kept)].weight_OK, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_prune_site_candidates_extended(seed, monkeypatch):
    weight, _, gram = problem(120, 1, seed=seed)
    sizes = range(119, 0, -1)
    expected = prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)
    looks, look = [], solver._Columns._steps_without_others

    def counted(state, u_Bn, *others):
        looks.append((look(state, u_Bn, *others), len(u_Bn)))
        return looks[-1][0]

    monkeypatch.setattr(solver._Columns, "_steps_without_others", counted)
    monkeypatch.setattr(solver, "BLOCK", 8)
    monkeypatch.setattr(solver, "_FEWEST", 1)
    found = prune_site(weight, gram, columns_per_unit=1, sizes=[80, 30, 1], damping=DAMPING)
    for one in found:
        other = expected[119 - len(one.kept)]
        assert one.kept == other.kept
        assert torch.allclose(one.weight_OK, other.weight_OK, rtol=1e-3, atol=1e-3)
        assert one.error == pytest.approx(other.error, rel=1e-3)
    assert any(steps < block for steps, block in looks)
    assert any(steps == block for steps, block in looks)


def snapshots_of(columns_per_unit=1, units=300):
    weight, _, gram = problem(units, columns_per_unit)
    sizes = range(units - 20, 0, -40)
    return prune_site(weight, gram, columns_per_unit=columns_per_unit, sizes=sizes, damping=DAMPING)


def test_choose_without_waiting_matches_choose(monkeypatch):
    expected = snapshots_of()
    monkeypatch.setattr(solver, "choose", solver.choose_without_waiting)
    for one, other in zip(snapshots_of(), expected, strict=True):
        assert one.kept == other.kept
        assert torch.allclose(one.weight_OK, other.weight_OK, rtol=1e-3, atol=1e-3)
        assert one.error == pytest.approx(other.error, rel=1e-3)


@pytest.mark.parametrize("choose", [solver.choose, solver.choose_without_waiting])
def test_choose_returns_cholesky_factor(choose):
    weight, _, gram = problem(60, 1)
    inverse = damped_inverse(gram, 0.1)
    chosen, scores, factor = choose(inverse, weight.T @ weight, 24)
    expected = torch.linalg.cholesky(inverse[chosen][:, chosen])
    assert torch.allclose(factor.tril(), expected, rtol=1e-4, atol=1e-5)
    solved = torch.linalg.solve_triangular(expected, weight[:, chosen].T, upper=False)
    assert torch.allclose(scores.float(), solved.square().sum(1), rtol=1e-3)
    assert solver._sound_steps(scores, factor) == 24


@pytest.mark.parametrize("choose", [solver.choose, solver.choose_without_waiting])
def test_choose_stops_without_positive_pivot(choose):
    indefinite = torch.tensor([[1.0, 0.0, 0.5], [0.0, 9.0, 8.0], [0.5, 8.0, 6.0]])
    chosen, scores, factor = choose(indefinite, torch.eye(3), 3)
    assert solver._sound_steps(scores, factor) == 1
    assert chosen[0] == 1


@pytest.mark.parametrize("accelerator", [False, True])
def test_prune_site_scale_invariant(accelerator, monkeypatch):
    if accelerator:
        monkeypatch.setattr(solver, "choose", solver.choose_without_waiting)
    weight, _, gram = problem(60, 1)
    gram /= gram.diagonal().mean()
    sizes = [40, 20, 3]
    expected = prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)
    for scale in (1e-14, 1e14):
        for one, other in zip(
            prune_site(weight, gram * scale, columns_per_unit=1, sizes=sizes, damping=DAMPING), expected, strict=True
        ):
            assert one.kept == other.kept
            assert one.error == pytest.approx(scale * other.error, rel=1e-3)


@pytest.mark.parametrize("damping", [1e-6, 1e-7])
def test_prune_site_duplicate_columns_low_damping(damping, recwarn):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 90, generator=generator) * torch.logspace(-3, 1, 90)
    x = torch.cat([x, x[:, :30]], dim=1)
    weight, gram = torch.randn(16, 120, generator=generator), x.T @ x / len(x)
    try:
        found = prune_site(weight, gram, columns_per_unit=1, sizes=[90, 50, 9], damping=damping)
    except torch.linalg.LinAlgError:
        found = []
    for snapshot in found:
        assert len(set(snapshot.kept)) == len(snapshot.kept)
        assert torch.isfinite(snapshot.weight_OK).all()
    assert not recwarn.list


def test_inverse_renewed_without_sound_pivot(monkeypatch):
    expected = snapshots_of()
    renewed, look, renew = [], solver._sound_steps, solver._State.renew
    answers = iter([40, 0, 7, 0])
    monkeypatch.setattr(solver, "_sound_steps", lambda *a: min(next(answers, 999), look(*a)))
    monkeypatch.setattr(solver._State, "renew", lambda state: (renewed.append(True), renew(state)))
    for one, other in zip(snapshots_of(), expected, strict=True):
        assert one.kept == other.kept
        assert torch.allclose(one.weight_OK, other.weight_OK, rtol=1e-3, atol=1e-3)
        assert one.error == pytest.approx(other.error, rel=1e-3)
    assert len(renewed) == 2
    monkeypatch.setattr(solver, "_sound_steps", lambda *a: 0)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        snapshots_of()


@pytest.mark.parametrize(("columns_per_unit", "units"), [(1, 300), (4, 60)])
def test_inverse_renewed_after_rounding_errors(columns_per_unit, units, monkeypatch):
    expected = snapshots_of(columns_per_unit, units)
    renewed, look, renew = [], solver._State._spoilt, solver._State.renew

    def spoil(state):
        for matrix in (state.weight_nO, state.inverse_nn):
            matrix.mul_(1 + torch.arange(len(matrix))[:, None] / 500)
        return look(state)

    monkeypatch.setattr(solver._State, "_spoilt", spoil)
    monkeypatch.setattr(solver._State, "renew", lambda state: (renewed.append(True), renew(state)))
    for one, other in zip(snapshots_of(columns_per_unit, units), expected, strict=True):
        assert one.kept == other.kept
        assert torch.allclose(one.weight_OK, other.weight_OK, rtol=1e-3, atol=1e-3)
        assert one.error == pytest.approx(other.error, rel=1e-3)
    assert len(renewed) == len(expected)


@settings(max_examples=25, deadline=None)
@given(units=st.integers(2, 20), columns_per_unit=st.integers(1, 3), seed=st.integers(0, 1000))
def test_refit_matches_least_squares(units, columns_per_unit, seed):
    weight, x, gram = problem(units, columns_per_unit, seed=seed)
    sizes = sorted({units - 1, units // 2, 1} - {0, units}, reverse=True)
    for snapshot in prune_site(weight, gram, columns_per_unit=columns_per_unit, sizes=sizes, damping=DAMPING):
        kept = columns(snapshot.kept, columns_per_unit)
        expected = least_squares(weight.double(), hessian_of(gram), kept)
        assert torch.allclose(snapshot.weight_OK.double(), expected[:, kept], rtol=1e-4, atol=1e-4)
        output = (x @ (weight - expected.float()).T).square().sum().item() / len(x)
        assert snapshot.error == pytest.approx(output, rel=2e-3, abs=1e-3)


def test_refit_matches_lstsq_on_data():
    weight, x, gram = problem(16, 1)
    snapshot = prune_site(weight, gram, columns_per_unit=1, sizes=[12], damping=1e-9)[0]
    kept = list(snapshot.kept)
    solution = torch.linalg.lstsq(x[:, kept].double(), x.double() @ weight.double().T).solution.T
    assert torch.allclose(snapshot.weight_OK.double(), solution, atol=1e-3)


def test_prune_site_inactive_units_first():
    weight, x, _ = problem(10, 1)
    x[:, [2, 7]] = 0
    gram = x.T @ x / len(x)
    snapshots = prune_site(weight, gram, columns_per_unit=1, sizes=[9, 8], damping=DAMPING)
    assert snapshots[1].kept == (0, 1, 3, 4, 5, 6, 8, 9)
    assert snapshots[1].error == pytest.approx(0, abs=1e-5 * removal_error(weight, gram))


def test_prune_site_zero_and_singular_gram():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for gram in (torch.zeros(8, 8), torch.ones(8, 8)):
        for columns_per_unit in (1, 2):
            snapshot = prune_site(weight, gram, columns_per_unit=columns_per_unit, sizes=[2], damping=DAMPING)[0]
            assert torch.isfinite(snapshot.weight_OK).all()
            assert len(snapshot.kept) == 2


def test_removal_error_is_output_power():
    weight, x, gram = problem(5, 2)
    assert removal_error(weight, gram) == pytest.approx((x @ weight.T).square().sum().item() / len(x), rel=1e-4)
