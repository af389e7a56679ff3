"""Tests of wrong commands, and of errors of whole processes and of several ranks."""

import re
import subprocess
import sys

import pytest
from refusals import RANGE, one_line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prun"], r"No such command 'prun'. .*\(see darwinlm --help\)"),
        (["--color"], r"No such option: --color .*\(see darwinlm --help\)"),
        (["prune", "m", "--color"], r"No such option: --color .*\(see darwinlm prune --help\)"),
        (["prune"], r"Missing argument 'model'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--target", "0.5"], r"Missing option '--out'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--out", "o"], r"Missing option '--target'. \(see darwinlm prune --help\)"),
        (["prune", "m", "--target"], "Option '--target' requires an argument"),
        (["prune", "m", "n", "--target", "0.5", "--out", "o"], r"unexpected extra argument\(s\) \(n\)"),
        (["demo", "--set", "x"], "--set 'x': expected key=value"),
    ],
)
def test_invalid_command(command, message, refused_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused_command(message, command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prune", "./nothing", "--target", "0.5", "--out", "out"], "model './nothing': not a local folder"),
        (["prune", "./nothing", "--target", "1.5", "--out", "out"], f"target 1.5 {RANGE}"),
    ],
)
def test_error_of_process(command, message, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning", "-m", "darwinlm", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(message, one_line(done.returncode, done.stderr))
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_error_reported_once_by_all_ranks(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "darwinlm"]
    command = ["prune", "./nothing", "--target", "0.5", "--out", "out"]
    done = subprocess.run([*launcher, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: model './nothing': not a local folder")
