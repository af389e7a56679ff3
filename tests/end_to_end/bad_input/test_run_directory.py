"""Tests of run directories that cannot be used."""

import json
import os

import pytest
from refusals import SMALL, one_line

from darwinlm import cli
from darwinlm.config.loading import load_recipe, parse_override
from darwinlm.run.directory import RunDirectory
from darwinlm.run.lock import RunLock


def begin_run(out, model, text, **changes):
    """Create an earlier run that stopped before its first stage."""
    settings = dict(parse_override(setting) for setting in SMALL)
    overrides = {"model": str(model), "target": "0.8", "data.source": str(text), **settings}
    recipe = load_recipe("quick", {**overrides, **changes})
    RunDirectory.open(out, recipe, {"model": "another", "darwinlm": "0"})


def test_out_is_a_file(refused, text):
    refused("--out .*good.txt is a file; give a new folder or an earlier run", out=text)


def test_out_name_with_newline_in_one_line(checkpoint, tmp_path, capsys):
    out = tmp_path / "two\nlines"
    out.write_text("mine")
    code = cli.exit_code(["prune", str(checkpoint("llama")), "--target", "0.5", "--out", str(out)])
    assert "two lines is a file" in one_line(code, capsys.readouterr().err)


def test_out_below_a_file(refused, text):
    refused("--out .*good.txt/deeper/run cannot be created: .*good.txt is a file", out=text / "deeper" / "run")


def test_out_name_too_long(refused, tmp_path):
    refused("cannot be written: File name too long", out=tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["notes.txt", "recipe.yaml"])
def test_out_contains_other_files(name, refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    refused("--out .* contains something that is not a DarwinLM run; give a new or an empty folder")


def test_out_of_another_recipe(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text, target=0.5, seed=7)
    refused(r"--out .* is a run with another recipe \(target: 0.5 -> 0.8; seed: 7 -> 0\); give a new folder, or")


def test_out_of_changed_checkpoint(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    refused("--out .*: model was 'another' when this run started and is now '[0-9a-f]+'; give a new folder, or restore")


def test_out_in_use(refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    with RunLock(tmp_path / "out") as other:
        other.take()
        refused(rf"--out .*out is in use by process {os.getpid()} on .+, for \d+ s; wait for it or stop it \(kill")


def test_out_in_use_without_manifest(refused, tmp_path):
    with RunLock(tmp_path / "out") as other:
        other.take()
        refused(rf"--out .*out is in use by process {os.getpid()} on .+, for \d+ s; wait for it or stop it \(kill")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: "{", r"manifest.json is damaged \(.*\); start the run again in a new folder"),
        (lambda manifest: "[]", r"manifest.json is damaged \(not a JSON object\); start the run again in a new folder"),
        (lambda manifest: {"name": "some web page"}, "--out .* contains something that is not a DarwinLM run; give a"),
        (
            lambda manifest: {**manifest, "format": 9},
            "is a run of format 9, but this version reads format 1; give a new folder",
        ),
        (lambda manifest: {"format": 1}, "manifest.json is damaged .*recipe, facts or stages are missing"),
        (
            lambda manifest: {**manifest, "recipe": {**manifest["recipe"], "color": 1}},
            r"a run whose recipe this version cannot read \(recipe: unknown setting 'color'.*\); give a new folder",
        ),
    ],
)
def test_invalid_manifest(change, message, refused, checkpoint, text, tmp_path):
    begin_run(tmp_path / "out", checkpoint("llama"), text)
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["checksum"]
    changed = change(manifest)
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused(message)
