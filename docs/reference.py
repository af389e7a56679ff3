"""Generate docs/cli.md and docs/recipe.md from the commands and the recipe: `python docs/reference.py`.

A test compares the two files with the output of this script.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import typer

from darwinlm.cli import app
from darwinlm.config import recipe
from darwinlm.config.recipe import Recipe

_COMMANDS = """
# Commands

<!-- Written by docs/reference.py: change the code, not this page. -->

`darwinlm --help` and `darwinlm COMMAND --help` print the same text. `MODEL` is a folder in Hugging Face format, a Hub
model id, or `smollm2`; `RUN` is a run directory ([file formats](formats.md)). Settings of `--set`:
[recipes](recipe.md).

Exit codes: 0 success; 1 internal error (`doctor`: a check failed); 2 user error, reported in one line; 130 interrupted,
run the same command again to resume.
"""

_RECIPES = """
# Recipes

<!-- Written by docs/reference.py: change the code, not this page. -->

A recipe is a YAML file with any of these settings. `--recipe FILE` reads it, and `--set section.name=value` overrides
one setting (write lists as `--set 'search.survivors=[2,1]'`). Settings that are not given have the default below.
`recipe.yaml` in a run directory contains all settings of that run. Unknown settings and invalid combinations are
rejected before a model is loaded. Settings of the last release that have been renamed or removed are accepted with a
warning.

## Built-in recipes

| name | |
|---|---|
"""


def command_pages() -> str:
    """Return the page of all commands, in the order in which they are usually needed."""
    lines = [_COMMANDS.strip()]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        arguments = [part for part in command.params if part.param_type_name == "argument"]
        options = [part for part in command.params if part.param_type_name == "option"]
        usage = " ".join(["darwinlm", name, *(_argument(part) for part in arguments), "[OPTIONS]" if options else ""])
        lines += ["", f"## {name}", "", inspect.cleandoc(command.help or ""), "", "```text", usage.strip(), "```", ""]
        lines += ["| | default | |", "|---|---|---|"]
        for part in [*arguments, *options]:
            shown = _argument(part) if part in arguments else _option(part)
            lines.append(f"| `{shown}` | {_default(part)} | {_cell(part.help or '')} |")
    return "\n".join(lines) + "\n"


def recipe_page() -> str:
    """Return the page of all settings, with the docstring of each field in recipe.py."""
    schema = Recipe.model_json_schema()
    lines = [
        _RECIPES.strip(),
        *_built_in(),
        "",
        "## The run",
        "",
        *_table(schema, Recipe.__name__, ""),
    ]
    for section, field in Recipe.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, recipe.BaseModel):
            part = schema["$defs"][kind.__name__]
            lines += ["", f"## {section}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
            lines += _table(part, kind.__name__, f"{section}.")
    return "\n".join(lines) + "\n"


def field_docs() -> dict[str, dict[str, str]]:
    """Return the field docstrings of recipe.py by class and field name."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(recipe)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = dict(_documented(node))
    return found


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield field.target.id, inspect.cleandoc(str(text)).replace("\n", " ")


def _built_in() -> Iterator[str]:
    for file in sorted((resources.files("darwinlm") / "recipes").iterdir(), key=lambda file: file.name):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        yield f"| `{file.name.removesuffix('.yaml')}` | {_cell(first.removeprefix('#').strip())} |"


def _table(schema: dict[str, Any], kind: str, prefix: str) -> Iterator[str]:
    yield from ("| setting | default | allowed | |", "|---|---|---|---|")
    for name, part in schema["properties"].items():
        if "$ref" in part:
            continue
        default = "required" if name in schema.get("required", []) else f"`{_yaml(part.get('default'))}`"
        yield f"| `{prefix}{name}` | {default} | {_allowed(part)} | {_cell(field_docs()[kind][name])} |"


def _allowed(part: dict[str, Any]) -> str:
    if "anyOf" in part:
        return ", ".join(_allowed(one) for one in part["anyOf"])
    if "enum" in part or "const" in part:
        return ", ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"a list of: {_allowed(part['items'])}"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "null": "`null`",
    }
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = " and ".join(f"{sign} {part[key]:,}" for key, sign in signs if key in part)
    return f"{words[part['type']]} {limits}".strip()


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _argument(part: Any) -> str:
    return str(part.metavar or part.name.upper())


def _option(part: Any) -> str:
    name = part.opts[0]
    return name if part.is_flag else f"{name} {part.metavar or part.name.upper()}"


def _default(part: Any) -> str:
    if part.required:
        return "required"
    if part.is_flag or part.default in (None, "", ()):
        return ""
    return f"`{part.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {"cli.md": command_pages, "recipe.md": recipe_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page(), encoding="utf-8")
