"""Tests of the GPU benchmark on a CPU and a tiny model: all sections run, within the time limit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def rows_of(folder, *options):
    """Return the rows of the benchmark by section."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--json", str(folder / "rows.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))["rows"]:
        assert done.stdout.count(row["work"]) >= 2  # when it is measured, and in the table
        found.setdefault(row["section"], []).append(row)
    return found


def test_gpu_benchmark_sections_have_bounds(tmp_path):
    found = rows_of(tmp_path)
    assert list(found) == ["peaks", "solver", "database", "search", "candidate", "recovery"]
    for section in found.keys() - {"peaks"}:
        assert all(row["seconds"] > 0 for row in found[section])
        assert any(row["bound"] for row in found[section])
    assert {"read", "forward", "Gram", "solve", "write"} <= {row["work"] for row in found["database"]}
    notes = " ".join(row["note"] for row in found["solver"])
    assert "same order: True" in notes
    assert "kept columns equal: True" in notes


def test_gpu_benchmark_chosen_sections_and_time_limit(tmp_path):
    assert list(rows_of(tmp_path, "--sections", "candidate")) == ["peaks", "candidate"]
    found = rows_of(tmp_path, "--minutes", "0")
    assert len(found) == 6
    assert all("left out" in row["work"] for section in found.keys() - {"peaks"} for row in found[section])
