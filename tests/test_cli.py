"""The command line without a command."""

import darwinlm
from darwinlm import cli


def test_the_version_is_shown(capsys):
    assert cli.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"{darwinlm.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.exit_code([]) == 0
    assert "prune " in capsys.readouterr().out
