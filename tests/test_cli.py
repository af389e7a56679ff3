"""Tests of the command line without a command."""

import darwinlm
from darwinlm import cli


def test_version_option(capsys):
    assert cli.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"{darwinlm.__version__}\n"


def test_help_without_command(capsys):
    assert cli.exit_code([]) == 0
    assert "prune " in capsys.readouterr().out
