"""Tests of progress bars."""

from darwinlm.runtime import progress


def test_progress_bar_on_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_bars", True)
    with progress.task("search (generations)", 4) as task:
        task.advance(3, note="KL 0.5")
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("search (generations)", "3/4", "KL 0.5"))
