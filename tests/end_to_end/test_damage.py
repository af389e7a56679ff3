"""Tests of damaged files of a finished run: the same command reports and recreates them."""

import logging
import re
import shutil

import pytest
from helpers import DAMAGES, TARGET, cut_short, delete, files_of, flip_a_bit
from hypothesis import given
from hypothesis import strategies as st

import darwinlm
from darwinlm.config.loading import load_recipe
from darwinlm.config.stage import Stage
from darwinlm.database.store import Database
from darwinlm.errors import UserError
from darwinlm.pipeline import prune
from darwinlm.recovery import stage
from darwinlm.run import prepare
from darwinlm.run.directory import RunDirectory
from darwinlm.runtime.files import read_json, write_json

pytestmark = pytest.mark.slow

SITES = [f"database/layers.{layer}.{kind}.safetensors" for layer in range(3) for kind in ("attention", "mlp")]
MADE_AGAIN = {
    # File and message; {} is its path.
    "corpus.safetensors": r"{} is \w+: recreating it \(corpus\)",
    **dict.fromkeys(SITES, r"{} is damaged or missing: rebuilding its site"),
    "database/index.json": r"{} is \w+: rebuilding the database",
    "search/best_plan.json": r"{} is \w+: recreating it \(search\)",
    "search/history.jsonl": r"{} is \w+: recreating it \(search\)",
    **dict.fromkeys(
        [
            "model/README.md",
            "model/chat_template.jinja",
            "model/config.json",
            "model/generation_config.json",
            "model/model.safetensors",
            "model/modeling_darwinlm.py",
            "model/plan.json",
            "model/tokenizer.json",
            "model/tokenizer_config.json",
        ],
        r"{} is \w+: recreating it \(export\)",
    ),
}
NOT_NEEDED = (
    "search/state.json",
    "search/descent.json",
    "search/trials.json",
    "recovery/losses.json",
    "recovery/weights.safetensors",
)
"""Files that a finished run no longer needs."""
OTHERWISE = ("manifest.json", "recipe.yaml", "evaluation/measured.json", "report/metrics.json", "report/index.html")


@pytest.fixture
def again(run, checkpoint, tmp_path, caplog):
    """Copy of the finished run, and its command."""
    finished, settings = run
    shutil.copytree(finished.path, tmp_path / "run")

    def same_command(**changes):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="darwinlm"):
            prune(checkpoint("qwen3"), target=TARGET, out=tmp_path / "run", settings={**settings, **changes})
        # Whether such a short training improves such a small model depends on the rounding of the hardware.
        lines = [record.getMessage() for record in caplog.records]
        return [line for line in lines if "did not improve the model" not in line]

    return tmp_path / "run", same_command


def test_all_files_of_run_are_listed(run):
    finished, _ = run
    found = {str(file.relative_to(finished.path)) for file in finished.path.rglob("*") if file.is_file()} - {"lock"}
    assert found == {*MADE_AGAIN, *NOT_NEEDED, *OTHERWISE}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", MADE_AGAIN)
def test_damaged_file_recreated(name, damage, again):
    out, same_command = again
    before = files_of(out)
    card = (out / "model" / "README.md").read_text()
    damage(out / name)
    said = same_command()
    assert [line for line in said if re.fullmatch(MADE_AGAIN[name].format(re.escape(str(out / name))), line)] == said
    assert said
    assert files_of(out) == before
    assert (out / "model" / "README.md").read_text() == card
    assert same_command() == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", NOT_NEEDED)
def test_damaged_unneeded_file(name, damage, again):
    out, same_command = again
    damage(out / name)
    before = files_of(out)
    said = [line.partition(" (")[0] for line in same_command()]
    # The report reads the JSON files that exist.
    assert said == [f"report not updated: {out / name} is damaged"] * (name.endswith(".json") and damage is not delete)
    assert files_of(out) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_trained_weights_recreated(damage, again):
    out, same_command = again
    before = files_of(out)
    damage(out / "recovery" / "weights.safetensors")
    shutil.rmtree(out / "model")
    said = same_command()
    assert re.fullmatch(r".+weights.safetensors is \w+: recreating it \(recovery\)", said[-1])
    assert files_of(out) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_refit_recreated(damage, again, monkeypatch):
    out, same_command = again
    before = files_of(out)
    for folder in ("model", "recovery"):
        shutil.rmtree(out / folder)

    def stop(*arguments, **named):
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "recover", stop)
        with pytest.raises(UserError, match="stopped"):
            same_command()
    damage(out / "recovery" / "refit" / "weights.safetensors")
    (said,) = same_command()
    assert re.fullmatch(rf"{out}/recovery/refit/weights.safetensors is \w+: refitting again", said)
    assert files_of(out) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_recipe_and_report_recreated(damage, again):
    out, same_command = again
    recipe = (out / "recipe.yaml").read_bytes()
    numbers = read_json(out / "report" / "metrics.json")
    damage(out / "recipe.yaml")
    assert same_command() == []
    assert (out / "recipe.yaml").read_bytes() == recipe
    for name in ("metrics.json", "index.html"):
        damage(out / "report" / name)
    assert same_command() == []
    assert read_json(out / "report" / "metrics.json") == numbers
    damage(out / "evaluation" / "measured.json")
    assert re.fullmatch(r".+measured.json is \w+: recreating it \(evaluation\)", same_command()[0])
    now = read_json(out / "report" / "metrics.json")
    assert [row["kl"] for row in now["rows"]] == [row["kl"] for row in numbers["rows"]]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_manifest_refused(damage, again):
    out, same_command = again
    damage(out / "manifest.json")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    message = "is damaged .*; start the run again in a new folder" if damage is not delete else "is not a DarwinLM run"
    with pytest.raises(UserError, match=message):
        same_command()
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["state.json", "descent.json"])
def test_damaged_search_state_refused(name, damage, again):
    out, same_command = again
    before = files_of(out)
    (out / "search" / "best_plan.json").unlink()
    damage(out / "search" / name)
    if name == "descent.json":
        (out / "search" / "state.json").unlink()
    message = rf"{out}/search/{name} is damaged \(.+\); delete {out}/search and run the same command again to restart"
    with pytest.raises(UserError, match=message):
        same_command()
    shutil.rmtree(out / "search")
    same_command()
    assert files_of(out) == before


def test_unreadable_index_kept(again, monkeypatch):
    out, same_command = again
    flip_a_bit(out / "database" / "index.json")
    before = files_of(out)
    monkeypatch.setattr(prepare.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"index.json is damaged \(.+\); start the run again in a new folder"):
        same_command()
    assert files_of(out) == before


def test_damaged_corpus_with_changed_text_refused(again, text):
    out, same_command = again
    delete(out / "corpus.safetensors")
    content = text.read_text()
    try:
        text.write_text(content[::-1])
        for _ in range(2):
            with pytest.raises(UserError, match=r"corpus.safetensors was damaged, and data .+ no longer yields the"):
                same_command()
    finally:
        text.write_text(content)
    same_command()
    assert (out / "corpus.safetensors").exists()


def test_site_missing_during_run(pruned, tmp_path):
    dense, database = pruned("qwen3", "kv_group")
    shutil.copytree(database.folder, tmp_path / "database")
    mine = Database(tmp_path / "database")
    delete(tmp_path / "database" / "layers.0.mlp.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.safetensors cannot be read .*; run the same command again"):
        mine.cut(dense.sites[1], 1, dense.device)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname"])
def test_manifest_with_outside_path(name, again):
    out, same_command = again
    (out.parent / "outside.txt").write_text("mine")
    manifest = read_json(out / "manifest.json")
    manifest["files"]["export"][name] = "0"
    write_json(out / "manifest.json", manifest, sealed=True)
    assert [line for line in same_command() if "is outside its folder" in line]
    assert (out.parent / "outside.txt").read_text() == "mine"


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_flipped_bit_in_sealed_json_detected(position, bit, tmp_path_factory):
    payload = {"levels": [1, 2], "score": 0.1 + 0.2, "name": "é", "none": None, "deep": {"a": [True, 1e-300]}}
    file = tmp_path_factory.getbasetemp() / "sealed.json"
    write_json(file, payload, sealed=True)
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 1 << bit
    file.write_bytes(content)
    try:
        found = read_json(file)
    except UserError:
        return
    # The bit is in whitespace, or in the word "checksum".
    assert {key: found[key] for key in payload} == payload


def test_changed_stage_files_rerun_later_stages(tmp_path):
    recipe = load_recipe("quick", {"model": "m", "target": 0.5})
    run = RunDirectory.open(tmp_path / "run", recipe, {})
    for content, still_done in (("one", False), ("one", True), ("two", False)):
        with run.stage(Stage("first"), run.path / "a"):
            (run.path / "a").write_text(content)
        assert run.done(Stage("second")) == still_done
        with run.stage(Stage("second")):
            pass


def test_model_with_different_logits_discarded(again, monkeypatch):
    out, same_command = again
    before = files_of(out)
    shutil.rmtree(out / "model")
    with monkeypatch.context() as patch:
        patch.setattr("darwinlm.export.hf._largest_difference", lambda model, folder: float("nan"))
        with pytest.raises(UserError, match=r"logits of the written model differ \(relative difference nan\)"):
            same_command()
    assert not (out / "model").exists()
    same_command()
    assert files_of(out) == before


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", cut_short, "/model: the model cannot be loaded: .*; run the command of its run again"),
        ("model.safetensors", delete, "/model: the model cannot be loaded: .* no file named model.safetensors .*; run"),
        ("config.json", cut_short, "/model/config.json cannot be read: "),
        ("config.json", delete, r"/model contains no model \(config.json is missing\)$"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_load_damaged_model(name, damage, message, again):
    out, _ = again
    damage(out / "model" / name)
    with pytest.raises(UserError, match=message):
        darwinlm.load(out / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float99"}, "dtype 'float99' is not supported"),
        ({"device": "abacus"}, "device 'abacus' is not available"),
    ],
)
def test_load_invalid_dtype_and_device(options, message, run):
    with pytest.raises(UserError, match=message) as caught:
        darwinlm.load(run[0].path, **options)
    assert "\n" not in str(caught.value)
