"""Tests of the prose in src/darwinlm: docstrings stand alone, without retired words (glossary in CONTRIBUTING.md)."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "darwinlm"
RETIRED = (
    r"anew|so many|so-?manyth|told|judge[sd]?|judging|suffices?|hopeless|bring it back|what is left|what is gone"
    r"|that which|go(es|ing)? on (with|from|at)|lies beside|beside|be had|in turns|minds|for want of"
    r"|once more|stands? in|is asked for|give other|no yes or no|nobody|whoever|wherever it"
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings of modules, classes and functions, and string literals below assignments and fields."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments and string literals with spaces, docstrings included, but not code in f-strings."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def faults(source: str) -> list[str]:
    found = [f"{line}: {text[:60]!r}" for line, text in docstrings(source) if re.match(r"(Of|With|After)\b", text)]
    for line, text in prose(source):
        found += [f"{line}: {word[0]!r}" for word in re.finditer(rf"\b({RETIRED})\b", " ".join(text.split()))]
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_prose_of_source(file):
    assert not faults(file.read_text(encoding="utf-8"))


def test_prose_faults_found():
    source = 'class A:\n    rate: float\n    """Of trials."""\n\n    # It is read anew.\n    text = f"{1} of so many"\n'
    assert faults(source) == ["3: 'Of trials.'", "5: 'anew'", "6: 'so many'"]
