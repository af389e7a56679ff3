"""Settings of the last release that were renamed or removed since: accepted for one release, with a warning."""

import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from darwinlm.errors import UserError


class Change(NamedTuple):
    """What happened to a setting."""

    now: str | None
    """Its name now; None if it was removed."""
    since: str
    """Version in which it changed."""
    reason: str = ""
    """Why it was removed, or what does its work now; ends the warning."""


FORMER: dict[str, Change] = {
    "data.trial_tokens": Change("data.train_tokens", "0.3.0"),
    "data.score_tokens": Change("data.validation_tokens", "0.3.0"),
    "data.held_out_tokens": Change("data.test_tokens", "0.3.0"),
    "database.dtype": Change(None, "0.3.0", "output projections are stored in the checkpoint's dtype"),
    **dict.fromkeys(
        ("evaluation.prefill_tokens", "evaluation.decode_tokens", "evaluation.repeats"),
        Change(None, "0.3.0", "speeds are measured with the request in workload"),
    ),
    "search.max_flips": Change(None, "0.3.0", "mutations exchange up to 3 pairs of sites"),
}
"""Former settings by dotted name. An entry is deleted in the release after the one that it names."""

VALUES = {("recovery.text", "trial"): Change("train", "0.3.0")}
"""Former values, by the name of their setting and the value; `now` is the value that replaces it."""


def present_names(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `overrides` (by dotted name) with present names and without removed settings. Raises UserError."""
    _warn([_fate(key) for key in overrides if key in FORMER])
    present: dict[str, Any] = {}
    for key, value in overrides.items():
        now = FORMER[key].now if key in FORMER else key
        if now != key and now in overrides:
            raise _twice(key, now)
        if now is not None:
            present[now] = value
    return present


def present_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `settings` with present names and without removed settings. Raises UserError."""
    present = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    notes = []
    for key, change in FORMER.items():
        section, name = _place(present, key)
        if section is None or name not in section:
            continue
        notes.append(_fate(key))
        value = section.pop(name)
        if not section and section is not present:
            del present[key.rpartition(".")[0]]  # The section may no longer exist.
        if change.now is None:
            continue
        target, new_name = _place(present, change.now, create=True)
        if target is not None and new_name in target:
            raise _twice(key, change.now)
        if target is not None:
            target[new_name] = value
    for (key, value), change in VALUES.items():
        section, name = _place(present, key)
        if section is not None and section.get(name) == value:
            section[name] = change.now
            notes.append(f"{key}={value} was renamed to {key}={change.now} in {change.since}")
    _warn(notes)
    return present


def _place(settings: dict[str, Any], key: str, *, create: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Return the section of the setting `key`, which is None if there is none, and its name there."""
    parent, _, name = key.rpartition(".")
    section = settings if not parent else settings.setdefault(parent, {}) if create else settings.get(parent)
    return (section if isinstance(section, dict) else None), name


def _twice(key: str, now: str | None) -> UserError:
    return UserError(f"recipe: {key} is the former name of {now}, and both are set; remove {key}")


def _fate(key: str) -> str:
    now, since, reason = FORMER[key]
    fate = f"renamed to {now} in {since}" if now else f"removed in {since} and is ignored"
    return f"{key} was {fate}{reason and f': {reason}'}"


def _warn(notes: list[str]) -> None:
    if notes:
        _warn_once("; ".join(notes))


@functools.cache
def _warn_once(notes: str) -> None:
    # Recipes are validated several times in a run.
    logging.getLogger("darwinlm").warning("recipe: %s", notes)
