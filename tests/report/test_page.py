"""Tests of the report: its numbers are those of metrics.json, text is escaped, unfinished runs have a report too."""

import base64
import hashlib
import json
import re
import shutil
from itertools import pairwise

import pytest
from helpers import SETTINGS
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from safetensors.torch import load_file

from darwinlm import cli
from darwinlm.commands.inspect import inspect
from darwinlm.commands.recover import recover_again
from darwinlm.errors import UserError
from darwinlm.pipeline import prune
from darwinlm.report.facts import collect, compared, thinned
from darwinlm.report.page import render, watch_report, write_report
from darwinlm.run.models import models_of_run
from darwinlm.runtime.files import read_json, write_json

EVIL = "<script>alert('&amp;')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}"


def numbers_in(value):
    if isinstance(value, dict):
        return [number for key, inner in value.items() for number in [*numbers_in(key), *numbers_in(inner)]]
    if isinstance(value, list):
        return [number for inner in value for number in numbers_in(inner)]
    if isinstance(value, str):
        return [float(token) for token in re.findall(r"\d+(?:\.\d+)?", value)]
    return [] if value is None or isinstance(value, bool) else [float(value)]


TIMES = "\N{MULTIPLICATION SIGN}"
UNITS = {
    "%": 0.01,
    TIMES: 1,
    "K": 1e3,
    "M": 1e6,
    "B": 1e9,
    " s": 1,
    " min": 60,
    " h": 3600,
    " KiB": 1024,
    " MiB": 1024**2,
    " GiB": 1024**3,
}
NUMBER = re.compile(r"(?<![\w.])[-+]?(\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?)(%|\u00d7|[KMB]\b| (?:s|min|h|KiB|MiB|GiB)\b)?")


def not_in(metrics, html):
    """Return the numbers on the page that no number in `metrics` rounds to."""
    known = numbers_in(metrics)
    odd, count = [], 0
    for text in Page(html).seen:
        for digits, unit in NUMBER.findall(text):
            shown, scale = float(digits.replace(",", "")), UNITS.get(unit, 1)
            mantissa, _, exponent = digits.partition("e")
            half = 0.5000001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
            count += 1
            if not any(abs(abs(number) / scale - shown) <= half for number in known):
                odd.append(digits + unit)
    assert count > 50 or odd
    return odd


@pytest.fixture(scope="module")
def family(run, checkpoint, tmp_path_factory):
    _, settings = run
    settings = {**settings, "search.generations": 1, "search.forecast_candidates": 4}
    return prune(
        checkpoint("qwen3"), target="0.6,0.8", out=tmp_path_factory.mktemp("family") / "run", settings=settings
    )


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0].path, tmp_path / "run")


@pytest.mark.parametrize("which", ["run", pytest.param("family", marks=pytest.mark.slow)])
def test_page_numbers_are_in_metrics(which, request):
    finished = request.getfixturevalue(which)
    path = (finished[0] if which == "run" else finished).path
    metrics = json.loads((path / "report" / "metrics.json").read_text())
    html = (path / "report" / "index.html").read_text()
    assert not_in(metrics, html) == []
    assert not_in(metrics, html.replace("</body>", "<p>KL 98,765.4321</p></body>")) == ["98,765.4321"]


def test_report_layers_match_model(run):
    finished, _ = run
    tensors = load_file(finished.model_path / "model.safetensors")
    for layer in finished.metrics["layers"]:
        prefix = f"model.layers.{layer['layer']}."
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        parts = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
        for kind, names in parts.items():
            count = sum(t.numel() for name, t in mine.items() if name.removeprefix(prefix).startswith(names))
            assert layer[kind]["parameters"] == count
        down = mine.get(prefix + "mlp.down_proj.weight")
        assert layer["mlp"]["kept"] == (0 if down is None else down.shape[1])
        assert layer["mlp"]["dense"] == 64 and layer["attention"]["dense"] == 2
    assert finished.metrics["parameters"] == finished.metrics["rows"][-1]["parameters"]


def test_accepted_moves_match_history(run):
    finished, _ = run
    lines = (finished.path / "search" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    search = finished.metrics["search"]
    assert [one["kl"] for one in search["generations"]] == [line["score"] for line in history]
    moved = [a["levels"] != b["levels"] for a, b in pairwise(history)]
    assert sum(search["accepted"].values()) == sum(moved)
    for one, before, after in zip(search["generations"][1:], history, history[1:], strict=False):
        changed = [a != b for a, b in zip(before["levels"], after["levels"], strict=True)]
        assert one["changed"] == {"attention": sum(changed[0::2]), "mlp": sum(changed[1::2])}


@pytest.mark.parametrize("diverged", [None, 1e9])  # 1e9: as version 0.1.0 wrote it
def test_moves_by_kind_and_diverged_candidates(diverged, copied):
    file = copied / "search" / "state.json"
    state = read_json(file)
    sites = len(state["parent"])

    def entry(generation, score, scores, *moved):
        levels = [int(index in moved) for index in range(sites)]
        return {"generation": generation, "score": score, "scores": scores, "improved": bool(moved), "levels": levels}

    moved = [(), (0, 2), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 4, 5)]
    scores = [[0.9], [0.8, diverged], [0.7], [0.7, 0.8], [0.6]]
    entries = [(found[0], found, *sites) for found, sites in zip(scores, moved, strict=True)]
    state["history"] = [entry(number, *one) for number, one in enumerate(entries)]
    write_json(file, state)
    search = write_report(copied)["search"]
    assert search["accepted"] == {"attention": 1, "mlp": 1, "both": 1}
    assert [one["worst"] for one in search["generations"]] == [0.9, 0.8, 0.7, 0.8, 0.6]
    assert [one["diverged"] for one in search["generations"]] == [0, 1, 0, 0, 0]


def test_compared_quotients(run):
    rows = {row["name"]: row for row in run[0].metrics["rows"]}
    for row in rows.values():
        for name, quotient in row["of_dense"].items():
            if name != "kl_of_uniform":
                assert quotient * rows["dense"][name] == pytest.approx(row[name])
        assert row["of_dense"]["kl_of_uniform"] * rows["uniform"]["kl"] == pytest.approx(row["kl"])
    without = compared([{**rows["dense"]}, {**rows["found"]}])
    assert "kl_of_uniform" not in without[1]["of_dense"]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=100), st.integers(1, 30))
def test_thinned_curve(values, points):
    curve = thinned(values, points)
    assert len(curve) <= points
    assert [step for one in curve for step in range(one["first"], one["last"] + 1)] == list(range(1, len(values) + 1))
    total = sum(one["loss"] * (one["last"] - one["first"] + 1) for one in curve)
    assert total == pytest.approx(sum(values), abs=1e-6)
    assert min(one["low"] for one in curve) == min(values) and max(one["high"] for one in curve) == max(values)


def test_page_shows_tasks(copied):
    entries = []
    for name, p in (("piqa", 0.123), ("arc_easy", 3.1415e-7)):
        pruned = {"accuracy": 0.4321, "stderr": 0.0123, "difference": -0.0789, "difference_stderr": 0.0111}
        models = {
            "dense": {"accuracy": 0.5111, "stderr": 0.0222},
            "pruned": {**pruned, "only_this": 77, "only_dense": 99, "p": p},
        }
        entries.append({"task": name, "metric": "acc", "shots": None, "items": 1838, "limit": None, "models": models})
    tasks = {"tasks": entries, "mean": {"acc": {"tasks": 2, "models": entries[0]["models"]}}}
    (copied / "report" / "tasks.json").write_text(json.dumps(tasks))
    metrics = write_report(copied)
    html = render(metrics)
    assert not_in(metrics, html) == []
    seen = " ".join(Page(html).seen)
    for text in ("arc_easy", "43.2%", "-7.9%", "0.12", "3.1e-07", "1,838"):
        assert text in seen
    entries[1]["models"]["pruned"]["p"] = 3.2e-7
    assert not_in({**metrics, "tasks": tasks}, html) == ["3.1e-07"]


def test_page_escapes_text(run):
    metrics = json.loads(json.dumps(run[0].metrics))
    clean = Page(render(metrics))
    metrics["model"] = metrics["target"] = metrics["attention_unit"] = EVIL
    metrics["sample"] = dict.fromkeys(("prompt", "before", "after"), EVIL)
    metrics["recipe"] |= {"model": EVIL, "data": {**metrics["recipe"]["data"], "source": EVIL}}
    metrics["environment"] |= {"device": EVIL}
    metrics["pending"] = [EVIL]
    for row in metrics["rows"][1:]:
        row["name"] = EVIL
    page = Page(render(metrics))
    assert page.scripts == clean.scripts
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert sum(EVIL in text for text in page.seen) > 10


@pytest.mark.parametrize("refresh", [False, True])
def test_page_loads_nothing_and_restricts_scripts(run, refresh):
    html = render(run[0].metrics, refresh=refresh)
    page = Page(html)
    assert len(page.scripts) == (2 if refresh else 1)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:"
    for _, attributes in page.tags:
        assert "src" not in attributes and attributes.get("href", "data:,") == "data:,"
    assert "url(" not in html and "@import" not in html


def test_report_command_rewrites_same_page(copied, capsys):
    before = {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()}
    assert cli.exit_code(["report", str(copied)]) == 0
    assert str(copied / "report" / "index.html") in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in copied.rglob("*") if file.is_file()}
    old = (copied / "report" / "index.html").read_bytes()
    shutil.rmtree(copied / "report")
    assert cli.exit_code(["report", str(copied)]) == 0
    assert (copied / "report" / "index.html").read_bytes() == old


def forget(run, *stages, files):
    manifest = read_json(run / "manifest.json")
    for stage in stages:
        manifest["stages"].pop(stage, None)
    write_json(run / "manifest.json", manifest)
    for name in files:
        (run / name).unlink()


@pytest.mark.parametrize("generations", [0, 7])
def test_page_counts_generations_of_history(generations, copied):
    """Uniform plans are compared in generation 0, the only one."""
    forget(copied, "search", "recovery", "evaluation", "export", files=["search/best_plan.json"])
    state = read_json(copied / "search" / "state.json")
    assert state["generations"] == SETTINGS["search.generations"]
    write_json(copied / "search" / "state.json", {**state, "generations": generations})
    assert write_report(copied)["search"]["generations_asked"] == generations
    page = (copied / "report" / "index.html").read_text()
    assert (f"of {generations} generations" in page) == (generations > 0)


def test_page_of_unfinished_run(copied):
    written = json.loads((copied / "recovery" / "losses.json").read_text())
    losses, evaluations = written["loss"], written["evaluations"]
    assert len(evaluations) > 1 and collect(copied)["recovery"]["evaluations"] == evaluations
    forget(copied, "evaluation", "export", files=["evaluation/measured.json"])
    metrics = write_report(copied)
    assert metrics["pending"] == ["evaluation", "export"] and "rows" not in metrics
    assert not_in(metrics, render(metrics)) == []

    forget(copied, "recovery", files=["recovery/losses.json"])
    for step in (2, 10):
        folder = copied / "recovery" / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"loss": loss, "step": number} for number, loss in enumerate(losses[:step], 1)]
        history.insert(0, {f"eval_{name}": value for name, value in evaluations[0].items()} | {"step": 0})
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (copied / "recovery" / "checkpoint-12.draft").mkdir()
    recovery = write_report(copied)["recovery"]
    assert [one["loss"] for one in recovery["curve"]] == losses[:10]
    assert recovery["evaluations"] == [evaluations[0] | {"step": 0}]
    shutil.rmtree(copied / "recovery")

    plan = collect(copied)["layers"]
    forget(copied, "search", files=["search/best_plan.json", "search/history.jsonl"])
    assert collect(copied)["layers"] == plan
    (copied / "search" / "state.json").unlink()
    metrics = write_report(copied)
    assert metrics["search"]["generations"] == [] and len(metrics["search"]["descent"]) > 0
    assert "Descent, without training" in render(metrics)

    (copied / "search" / "descent.json").unlink()
    assert "layers" not in write_report(copied)
    forget(copied, "database", files=["database/index.json"])
    metrics = write_report(copied)
    assert metrics["pending"][0] == "database"
    forget(copied, "corpus", files=[])
    assert "not finished" in render(write_report(copied))


def test_watch_report_ends_with_run(copied):
    manifest = (copied / "manifest.json").read_bytes()
    forget(copied, "export", files=[])
    page = copied / "report" / "index.html"
    waits = []

    def wait():
        assert "location.reload()" in page.read_text()
        waits.append(len(waits))
        if len(waits) == 3:
            (copied / "manifest.json").write_bytes(manifest)

    assert watch_report(copied, wait)["finished"]
    assert len(waits) == 3
    assert "location.reload()" not in page.read_text()


def test_watch_report_interrupted(copied):
    forget(copied, "export", files=[])

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_report(copied, interrupt)
    assert "location.reload()" not in (copied / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "is not a DarwinLM run"),
        (lambda run: (run / "manifest.json").write_text("[]"), "is damaged"),
        (lambda run: (run / "manifest.json").write_text('{"recipe": {}}'), "is not a DarwinLM run"),
        (lambda run: (run / "search" / "state.json").write_text("{"), "state.json is damaged"),
        (lambda run: (run / "search" / "state.json").write_text("{}"), "search is damaged"),
        (lambda run: (run / "evaluation" / "measured.json").write_text('{"rows": 3}'), "measured.json is damaged"),
        (lambda run: (run / "report" / "tasks.json").write_text("{}"), "tasks.json is damaged"),
        (lambda run: (run / "report" / "index.html").unlink() or (run / "report" / "index.html").mkdir(), "index.html"),
    ],
)
def test_report_command_error_one_line(damage, message, copied, capsys):
    damage(copied)
    assert cli.exit_code(["report", str(copied)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: {"name": "some web page"}, r"is not a DarwinLM run \(.*\); give the folder passed to --out"),
        (lambda manifest: {**manifest, "format": 9}, "is a run of format 9, but this version reads format 1; give"),
        (lambda manifest: {**manifest, "facts": 1}, "is damaged .recipe, facts or stages are missing.; start the run"),
        (lambda manifest: {**manifest, "recipe": {}}, r"a run whose recipe this version cannot read \(recipe: "),
    ],
)
def test_manifest_errors_same_for_all_readers(change, message, copied):
    manifest = read_json(copied / "manifest.json")
    write_json(copied / "manifest.json", change(manifest), sealed=True)
    said = set()
    for reader in (write_report, models_of_run, recover_again, lambda run: inspect(str(run))):
        with pytest.raises(UserError, match=message) as error:
            reader(copied)
        said.add(str(error.value))
    assert len(said) == 1


@pytest.mark.slow
def test_page_of_family_has_every_size(family):
    metrics = family.metrics
    assert list(metrics["sizes"]) == ["0.8", "0.6"]
    html = (family.path / "report" / "index.html").read_text()
    assert html.index("Size 0.8") < html.index("Size 0.6")
    for name, facts in metrics["sizes"].items():
        assert (
            facts["rows"][-1]["parameters"] == next(row for row in metrics["rows"] if row["name"] == name)["parameters"]
        )
        assert {"layers", "search", "recovery", "rows"} <= set(facts)
        assert len(facts["search"]["forecast"]["steps"]) == len(SETTINGS["search.survivors"])
