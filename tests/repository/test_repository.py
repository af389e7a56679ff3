"""Tests of facts that the repository states in several places: they are the same everywhere."""

import re
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import darwinlm
from darwinlm.config.loading import make_recipe

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})


def commands(file):
    """Yield the commands of the steps of a workflow."""
    for job in yaml.safe_load(file.read_text())["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


def test_ci_python_versions():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    named = [text.split(" :: ")[-1] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert tested == named
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_python_version_of_transformers():
    assert metadata.metadata("transformers")["Requires-Python"].startswith(PROJECT["requires-python"])


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_use_existing_targets(file):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    lines = list(commands(file))
    assert lines
    for line in lines:
        assert set(re.findall(r"\bmake ([\w-]+)", line)) <= targets, line
        assert all((ROOT / name).exists() for name in re.findall(r"\b(?:benchmarks|tests)/[\w/.]+", line)), line
    for action in re.findall(r"uses: (\./\S+)", file.read_text()):
        assert (ROOT / action / "action.yml").exists(), action


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.name)
def test_issue_forms(file):
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)
    ids = [part["id"] for part in fields]
    assert len(ids) == len(set(ids))
    for name in re.findall(r"\b[\w/]+\.md\b", file.read_text()):
        assert (ROOT / name).exists(), name


def test_changelog_and_citation_version():
    (version, date), *former = re.findall(
        r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert version == cited["version"] == darwinlm.__version__
    assert date == str(cited["date-released"])
    assert all(Version(older) < Version(version) for older, _ in former)


def test_changelog_recipes_load():
    """Recipes in the changelog for upgrading are valid."""
    changes = (ROOT / "CHANGELOG.md").read_text()
    recipes = [textwrap.dedent(code) for code in re.findall(r"^ *```yaml\n(.*?)^ *```", changes, flags=re.M | re.S)]
    assert recipes
    for code in recipes:
        make_recipe({"model": "smollm2", "target": 0.5, **yaml.safe_load(code)})


def test_pre_commit_versions_match_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in hooks if repo["repo"] != "local"}
    assert pinned == {"ruff-pre-commit": f"v{PINS['ruff']}", "codespell": f"v{PINS['codespell']}"}


def test_constraints_pin_all_dependencies():
    asked = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    for one in map(Requirement, asked):
        assert one.specifier.contains(PINS[canonicalize_name(one.name)]), one


def test_constraints_are_consistent():
    """Every pin is within the range that every other installed pinned package requires."""
    for name in PINS:
        try:
            needs = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(needs.version).public != Version(PINS[name]).public:
            continue  # `make test-newest`
        for one in map(Requirement, needs.requires or []):
            pin = PINS.get(canonicalize_name(one.name))
            if pin and (one.marker is None or one.marker.evaluate({"extra": ""})):
                assert one.specifier.contains(pin, prereleases=True), f"{name} requires {one}, pinned is {pin}"
