"""Fixtures that run the command line with bad input, which must be refused in one line without writing anything."""

import re
import signal

import pytest
from refusals import SMALL, contents, one_line

from darwinlm import cli
from darwinlm.runtime import progress


@pytest.fixture(autouse=True)
def as_before():
    """Restore the signal handler and the logger that the command line sets up for a process of its own."""
    handler, propagate = signal.getsignal(signal.SIGTERM), progress.log.propagate
    yield
    signal.signal(signal.SIGTERM, handler)
    progress.log.propagate = propagate
    progress.log.handlers.clear()


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "good.txt"
    file.write_text("".join(f"word{number} " for number in range(300)))
    return file


@pytest.fixture
def refused_command(tmp_path, capsys, monkeypatch):
    """Run `darwinlm`, and check that it is refused with `message` (a regular expression) and writes nothing."""
    fail = cli._fail

    def checked_fail(message):
        assert "\n" not in message  # hidden by the command line, but visible in Python
        return fail(message)

    monkeypatch.setattr(cli, "_fail", checked_fail)

    def run(message, command):
        before = contents(tmp_path)
        code = cli.exit_code(command)
        printed = capsys.readouterr()
        assert re.search(message, one_line(code, printed.err)), printed.err
        assert printed.out == ""
        assert contents(tmp_path) == before

    return run


@pytest.fixture
def refused(refused_command, checkpoint, text, tmp_path):
    """Check the same for `darwinlm prune`, with good input except for the arguments."""

    def run(message, *, model=None, target="0.8", data=None, out=None, recipe=None, settings=()):
        command = ["prune", str(model or checkpoint("llama")), "--target", target, "--data", str(data or text)]
        command += ["--out", str(out or tmp_path / "out"), *(["--recipe", str(recipe)] if recipe else [])]
        for setting in [*SMALL, *settings]:
            command += ["--set", setting]
        refused_command(message, command)

    return run
