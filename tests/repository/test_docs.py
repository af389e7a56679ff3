"""Tests of the documentation: links have targets, references are complete, commands parse, examples run."""

import importlib.util
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml
from helpers import SETTINGS

import darwinlm
from darwinlm.cli import app
from darwinlm.config.loading import known_keys

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
REFERENCE = (DOCS / "api-reference.md").read_text()
COMMANDS = typer.main.get_command(app).commands

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def generator():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page):
    """Return the page without code, where brackets and hashes have other meanings."""
    return re.sub(r"`[^`\n]*`", "x", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))


def anchors(page):
    """Return the anchors of the headings, as GitHub and mkdocs create them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    words = (heading.replace("`", "").strip().lower() for heading in re.findall(r"^#+ (.*)$", text, flags=re.M))
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in words}


def blocks(page, *languages):
    return [
        code
        for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.M | re.S)
        if kind in languages
    ]


@every_page
def test_named_tests_and_benchmarks_exist(page):
    for file in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", page.read_text()):
        assert page.name == "lab-log.md" or (ROOT / file).exists(), f"{page.name}: {file}"
    assert page.name == "lab-log.md" or not re.search(r"`test_\w+`", page.read_text()), "name tests by their paths"


@every_page
def test_links_have_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert page.parent != DOCS or DOCS in target.parents, f"{page.name}: {link} is outside of what mkdocs builds"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_navigation_has_every_page():
    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from pages(value) if isinstance(value, list) else [value]

    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", ["cli.md", "recipe.md"])
def test_references_are_up_to_date(name):
    assert (DOCS / name).read_text() == generator().PAGES[name](), "run: python docs/reference.py"


def test_commands_and_settings_documented():
    commands, settings = (DOCS / "cli.md").read_text(), (DOCS / "recipe.md").read_text()
    for name, command in COMMANDS.items():
        assert f"\n## {name}\n" in commands
        for part in command.params:
            assert part.help, f"{name}: {part.name} has no help"
            if part.param_type_name == "option":
                assert f"| `{part.opts[0]}" in commands
    for key in known_keys():
        assert f"| `{key}` |" in settings or f"\n## {key}\n" in settings, key
    for kind, fields in generator().field_docs().items():
        for field, text in fields.items():
            section = kind == "Recipe" and f"\n## {field}\n" in settings
            assert text or section or not kind.endswith("Recipe"), f"{kind}.{field} has no docstring"


CANNOT_FAIL = ("Recipe.to_yaml", "Database.space", "Plan.to_dict", "build_model", "DenseReference.compare")


def public_names():
    """Yield the names that `darwinlm` exports, and the methods of its classes that are on the page."""
    shown = {name.strip() for names in re.findall(r"members: \[(.*)\]", REFERENCE) for name in names.split(",")}
    for name in set(darwinlm.__all__) - {"__version__"}:
        value = getattr(darwinlm, name)
        yield name, value
        if inspect.isclass(value):
            yield from ((f"{name}.{key}", part) for key, part in vars(value).items() if key in shown)


def test_api_reference_has_public_names():
    names = re.findall(r"^::: darwinlm\.(\w+)$", REFERENCE, flags=re.M)
    assert sorted(names) == sorted(set(darwinlm.__all__) - {"__version__"})


def test_public_docstrings_have_sections():
    checked = dict(public_names())
    assert {"prune", "load", "load_recipe", "Run.load", "Run.model_path", "Recipe.to_yaml"} <= checked.keys()
    for name, value in checked.items():
        text = inspect.getdoc(value) or ""
        assert text, name
        if not inspect.isfunction(value):
            continue
        sections = dict(re.findall(r"^(Args|Returns|Raises):\n((?: .*\n?|\n)+)", text, flags=re.M))
        parameters = set(inspect.signature(value).parameters) - {"self"}
        assert set(re.findall(r"^    (\w+): ", sections.get("Args", ""), flags=re.M)) == parameters, name
        returns = inspect.signature(value).return_annotation is not None
        assert bool(sections.get("Returns", "").strip()) == returns, name
        assert "UserError: " in sections.get("Raises", "") or name in CANNOT_FAIL, name


def command_lines(page):
    """Yield the arguments of every `darwinlm` command in the page's shell blocks."""
    for code in blocks(page, "sh", "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "darwinlm" in words and "…" not in line:
                yield words[words.index("darwinlm") + 1 :]


@every_page
def test_commands_in_docs_parse(page):
    for name, *arguments in command_lines(page):
        context = COMMANDS[name].make_context(name, list(arguments))
        for setting in context.params.get("settings") or []:
            assert setting.partition("=")[0] in known_keys(), setting


def test_docs_use_every_command():
    found = {arguments[0] for page in PAGES for arguments in command_lines(page)}
    assert found == set(COMMANDS)


@pytest.mark.slow
def test_api_examples_run(checkpoint, text, tmp_path, monkeypatch, capsys):
    shutil.copytree(checkpoint("mistral"), tmp_path / "my-checkpoint")
    (tmp_path / "texts").mkdir()
    shutil.copy(text, tmp_path / "texts")
    sections = {}
    for key, value in SETTINGS.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "my-recipe.yaml").write_text(yaml.safe_dump(sections))
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(DOCS / "api.md", "python"):
        exec(compile(code, "docs/api.md", "exec"), names)
    out = capsys.readouterr().out
    assert "recovered" in out and "recipe: target 1.5 must be above 0" in out
    assert "largest logit difference" in out
    by_hand = re.search(r"([\d,]+) parameters, KL ([\d.]+)\n(\d+)\n", out)
    assert by_hand[1].replace(",", "") == by_hand[3] and float(by_hand[2]) > 0
    assert not (tmp_path / "other").exists()


def test_formats_describe_every_file(run, tmp_path):
    finished, _ = run
    described = re.findall(r"`([^`\n]+)`", (DOCS / "formats.md").read_text())
    patterns = {name for name in described if "." in name or name.endswith("/")}
    for file in finished.path.rglob("*"):
        name = str(file.relative_to(finished.path))
        inside = name.removeprefix("model/")
        assert file.is_dir() or any(Path(name).match(one) or Path(inside).match(one) for one in patterns), name


def test_formats_keys_exist(run):
    """The first key of each table row in formats.md is in one of the run's JSON files."""
    finished, _ = run
    known = set()
    for file in [*finished.path.rglob("*.json"), *finished.path.rglob("*.jsonl")]:
        known |= set(re.findall(r'"(\w+)":', file.read_text()))
    known |= {"calibration", "train", "validation", "test"}
    only_sometimes = {"query_heads_per_kv_head", "skip", "experts"}
    text = (DOCS / "formats.md").read_text()
    for row in re.findall(r"^\| (`.*?) \|", text, flags=re.M):
        for name in re.findall(r"`(\w+)`", row):
            assert name in known | only_sometimes or name == "lock", name
