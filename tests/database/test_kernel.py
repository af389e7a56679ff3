"""Tests of the kernel that chooses a block, in Triton's interpreter, and of operations launched on an accelerator."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import Operations
from plain_solver import DAMPING, one_at_a_time, problem

from darwinlm.database import inverse, solver, symmetric
from darwinlm.database.inverse import damped_inverse
from darwinlm.database.solver import prune_site

BLOCKS = {"one": (1, 1), "few": (5, 5), "odd": (33, 20), "all": (60, 60), "terms in several tiles": (300, 40)}
"""Numbers of candidates and removals."""
SITES = {"plain": (24, 23), "blocks of 8": (120, 60)}
"""Numbers of columns of a site and of removals, one at a time."""

# Triton reads at import whether to interpret its kernels.
INTERPRETED = """
import sys, torch
from darwinlm.database import kernel, solver
given = torch.load(sys.argv[1])
found = {name: kernel.choose_at_once(*block) for name, block in given["blocks"].items()}
solver.choose = kernel.choose_at_once
solver.BLOCK, solver._FEWEST = 8, 1
for name, (weight, gram, sizes) in given["sites"].items():
    snapshots = solver.prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=0.01)
    found[name] = [torch.tensor(one.kept) for one in snapshots]
torch.save(found, sys.argv[2])
"""


def block_of(candidates, removals):
    """Return P, M and the number of removals."""
    weight, _, gram = problem(candidates, 1)
    return damped_inverse(gram, 0.1), weight.T @ weight, removals


def tied_site(columns_per_unit=1, units=40, rows=12):
    """Create uncorrelated inputs and weights with few different norms, so that many units cost exactly the same.

    Returns weight, Gram matrix and the order of removal.
    """
    norms = torch.randint(0, 4, (units,), generator=torch.Generator().manual_seed(3))
    weight = (torch.arange(rows)[:, None] < norms.repeat_interleave(columns_per_unit)).float()
    order = sorted(range(units), key=lambda unit: (norms[unit], unit))
    return weight, torch.eye(units * columns_per_unit), order


def gone(kept, units):
    return [set(range(units)) - set(torch.as_tensor(one).tolist()) for one in kept]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: it is only available on Linux x86-64")
    folder = tmp_path_factory.mktemp("interpreted")
    blocks = {name: block_of(*sizes) for name, sizes in BLOCKS.items()}
    tied = torch.diag(torch.tensor([2.0, 1.0, 4.0, 1.0, 2.0, 1.0])), torch.diag(torch.tensor([2.0, 1, 8, 1, 2, 1])), 6
    indefinite = torch.tensor([[1.0, 0.0, 0.5], [0.0, 9.0, 8.0], [0.5, 8.0, 6.0]]), torch.eye(3), 3
    blocks |= {"tied": tied, "no pivot": indefinite}
    sites = {}
    for name, (units, removals) in SITES.items():
        weight, _, gram = problem(units, 1)
        sites[name] = weight, gram, list(range(units - 1, units - 1 - removals, -1))
    weight, gram, order = tied_site()
    sites["ties"] = weight, gram, list(range(len(order) - 1, 0, -1))
    torch.save({"blocks": blocks, "sites": sites}, folder / "given")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", INTERPRETED, str(folder / "given"), str(folder / "found")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return blocks, torch.load(folder / "found")


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_kernel_matches_loop(name, interpreted):
    blocks, found = interpreted
    chosen, scores, factor = found[name]
    inverse_DD, squares_DD, removals = blocks[name]
    expected, expected_scores, _ = solver.choose(inverse_DD, squares_DD, removals)
    assert chosen.tolist() == expected.tolist()
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-4, atol=1e-6)
    exact = torch.linalg.cholesky(inverse_DD.double()[chosen][:, chosen]).float()
    torch.testing.assert_close(factor.tril(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_kernel_removes_first_of_equal_columns(interpreted):
    blocks, found = interpreted
    expected = [0, 1, 3, 4, 5, 2]
    assert found["tied"][0].tolist() == expected
    for choose in (solver.choose, solver.choose_without_waiting):
        assert choose(*blocks["tied"])[0].tolist() == expected


@pytest.mark.slow
def test_kernel_block_ends_without_positive_pivot(interpreted):
    _, found = interpreted
    chosen, scores, factor = found["no pivot"]
    assert solver._sound_steps(scores, factor) == 1
    assert chosen[0] == 1
    assert set(chosen.tolist()) <= {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_kernel_site_order_matches_solver(name, interpreted):
    units, removals = SITES[name]
    weight, _, gram = problem(units, 1)
    sizes = range(units - 1, units - 1 - removals, -1)
    expected = [one.kept for one in prune_site(weight, gram, columns_per_unit=1, sizes=sizes, damping=DAMPING)]
    if name == "plain":
        order = one_at_a_time(weight, gram, 1)
        assert gone(expected, units) == [set(order[: i + 1]) for i in range(removals)]
    assert gone(interpreted[1][name], units) == gone(expected, units)


@pytest.mark.slow
def test_kernel_removes_lowest_of_equal_units(interpreted):
    _, _, order = tied_site()
    assert gone(interpreted[1]["ties"], len(order)) == [set(order[: i + 1]) for i in range(len(order) - 1)]


@pytest.mark.parametrize("name", ["choose", "choose_without_waiting", "heads"])
def test_solver_removes_lowest_of_equal_units(name, monkeypatch):
    weight, gram, order = tied_site(columns_per_unit=2 if name == "heads" else 1)
    if name != "heads":
        monkeypatch.setattr(solver, "choose", getattr(solver, name))
        monkeypatch.setattr(solver, "BLOCK", 8)
        monkeypatch.setattr(solver, "_FEWEST", 1)
    for sizes in (range(len(order) - 1, 0, -1), [25, 9]):
        found = prune_site(weight, gram, columns_per_unit=len(gram) // len(order), sizes=list(sizes), damping=DAMPING)
        assert gone([one.kept for one in found], len(order)) == [set(order[: len(order) - size]) for size in sizes]


def test_chooser_by_device(monkeypatch):
    kernel = type("Kernel", (), {"LARGEST": 100, "choose_at_once": staticmethod(lambda *block: None)})
    monkeypatch.setattr(solver, "_kernel", lambda kind: kernel if kind == "cuda" else None)
    assert solver._chooser(torch.device("cuda"), 100) is kernel.choose_at_once
    assert solver._chooser(torch.device("cuda"), 101) is solver.choose_without_waiting
    assert solver._chooser(torch.device("xpu"), 100) is solver.choose_without_waiting


def test_kernel_falls_back_without_triton(monkeypatch, caplog):
    def broken(*block):
        raise RuntimeError("Failed to find C compiler")

    kernel = type(sys)("darwinlm.database.kernel")
    kernel.choose_at_once = broken
    monkeypatch.setitem(sys.modules, "darwinlm.database.kernel", kernel)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(solver.log, "propagate", True)
    assert solver._kernel.__wrapped__("cuda") is None
    assert "Failed to find C compiler" in caplog.text
    assert solver._kernel.__wrapped__("xpu") is None


def columns_of(units):
    """Create a site of single columns. On a CPU, NumPy chooses its blocks, uncounted like one kernel launch."""
    weight, _, gram = problem(units, 1)
    return solver._Columns(weight.T.contiguous(), gram, 0.1, 1)


@pytest.mark.parametrize("removals", [40, 160])
def test_launches_of_a_block(removals, monkeypatch):
    monkeypatch.setattr(symmetric, "_LEAST", symmetric._LEAST_ON_ACCELERATORS)
    site = columns_of(700)
    with Operations() as operations:
        assert site._remove_block(removals) > 1
    assert operations.launches <= 100, operations.counts
    assert operations.waits <= 3, operations.counts


def test_launches_of_a_head():
    weight, _, gram = problem(12, 4)
    site = solver._Blocks(weight.T.contiguous(), gram, 0.1, 4)
    with Operations() as operations:
        site.remove(1)
    assert operations.launches <= 48, operations.counts
    assert operations.waits <= 1, operations.counts


def test_launches_of_a_level():
    site = columns_of(100)
    site.remove(20)
    with Operations() as operations:
        site.snapshot()
    assert operations.launches <= 25, operations.counts
    assert operations.waits <= 3, operations.counts


def test_launches_of_inverse_on_accelerators(monkeypatch):
    _, _, gram = problem(700, 1)
    expected = damped_inverse(gram, 0.1)
    monkeypatch.setattr(inverse, "_LEAF", inverse._LEAF_ON_ACCELERATORS)
    with Operations() as operations:
        found = damped_inverse(gram, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert operations.launches <= 40, operations.counts
    assert operations.waits <= 2, operations.counts


def test_only_kernel_imports_triton():
    source = Path(solver.__file__).parents[1]
    named = [file.name for file in source.rglob("*.py") if "import triton" in file.read_text(encoding="utf-8")]
    assert named == ["kernel.py"]
