"""Recipes from files and command lines; errors are one line that names the setting."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from darwinlm.config.former import present_names, present_settings
from darwinlm.config.recipe import Recipe
from darwinlm.config.target import show
from darwinlm.errors import UserError

_MOST_BYTES = 2**20


def load_recipe(recipe: str | Path, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe by name (`quick`, `paper`) or file, then apply `overrides` ({"search.offspring": 8}).

    Args:
        recipe: name of a built-in recipe, or a YAML file.
        overrides: settings by dotted name, as for `--set`; including `model` and `target` if the file has none.

    Returns:
        The validated recipe, with all defaults filled in.

    Raises:
        UserError: if it is not valid; the message names the setting, what is allowed, and the closest known name.
    """
    return _changed(_read(recipe), overrides)


def change_recipe(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Return `recipe` with changed settings ({"recovery.tokens": "1B"}). Raises UserError."""
    return _changed(recipe.model_dump(mode="json"), overrides)


def _changed(settings: dict[str, Any], overrides: dict[str, Any]) -> Recipe:
    # First, so that an override with the new name replaces a setting with the former one, and the other way round.
    settings = present_settings(settings)
    for key, value in present_names(overrides).items():
        if not isinstance(key, str):
            raise UserError(f"recipe: {show(key)} is not a setting; write settings as search.offspring")
        section = settings
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"recipe: {key!r} cannot be set: {parent!r} is a value, not a section")
        section[leaf] = value
    return make_recipe(settings)


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Validate `settings` (nested) and fill in the defaults. Raises UserError."""
    settings = present_settings(settings)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError("recipe: " + "; ".join(_explain(e) for e in error.errors())) from None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return one line for every setting that differs, such as `search.offspring: 6 -> 8`."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [f"{key}: {before.get(key)} -> {value}" for key, value in after.items() if before.get(key) != value]


def parse_override(text: str) -> tuple[str, Any]:
    """Parse one `--set key=value`; the value is YAML (numbers, lists, words). Raises UserError."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {show(text)}: expected key=value, for example --set search.offspring=8")
    return key.strip(), _parse_yaml(value, f"--set {show(text)}")


def _read(recipe: str | Path) -> dict[str, Any]:
    built_in = resources.files("darwinlm") / "recipes"
    names = sorted(entry.name.removesuffix(".yaml") for entry in built_in.iterdir() if entry.name.endswith(".yaml"))
    where = f"recipe {str(recipe)!r}"
    try:
        source = built_in / f"{recipe}.yaml" if str(recipe) in names else Path(recipe)
        with source.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UserError(f"{where} is larger than 1 MiB and not a recipe")
        text = content.decode()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file; the built-in recipes are {', '.join(names)}") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{where} cannot be read as UTF-8 text: {error}") from None
    settings = _parse_yaml(text, where)
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{where}: expected settings as `key: value` lines, for example `target: 0.5`")
    # `search:` with nothing below it keeps the defaults.
    return {key: value for key, value in settings.items() if value is not None}


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML raises ValueError, KeyError, RecursionError and more for malformed scalars.
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        details = [getattr(error, part, None) for part in ("context", "problem")]
        problem = " ".join((", ".join(filter(None, details)) or str(error)).split())
        raise UserError(f"{where}: not valid YAML ({line}{problem})") from None


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return the names of all settings of `model` and of all sections, as used by `--set`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [prefix + name, *known_keys(field.annotation, f"{prefix}{name}.")]
        else:
            keys.append(prefix + name)
    return keys


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.0)
        return f"unknown setting {show(key)}; did you mean {near[0]!r}?"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = {
        "model_type": "this is a section; set one of its settings, such as search.offspring",
        "tuple_type": "expected a list, such as [2, 1]",
    }.get(error["type"], f"{error['msg'][0].lower()}{error['msg'][1:]}")
    return f"{key} = {show(error['input'])}: {expected}"
