"""Tests of zero-shot tasks in JSONL files."""

import pytest
from tasks import ITEMS, write

from darwinlm.errors import UserError
from darwinlm.evaluation.local_tasks import local_tasks


def test_local_tasks_by_item_format(tmp_path):
    for name, item in ITEMS.items():
        write(tmp_path, name, item, "", item)
    configs = local_tasks(tmp_path)
    assert set(configs) == set(ITEMS)
    assert configs["choice"]["doc_to_text"] == "query"
    assert configs["question"]["doc_to_text"].endswith("\nAnswer:")
    assert configs["contexts"]["doc_to_choice"] == "context_options"
    assert configs["word"]["output_type"] == "loglikelihood"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "contains no items"),
        (["{"], "line 1 is not JSON"),
        ([ITEMS["word"], "[1, 2]"], "line 2: an item needs the keys query, choices, gold; or "),
        ([ITEMS["word"], ITEMS["choice"]], "line 2: its keys differ from those of the first item"),
        ([{**ITEMS["choice"], "query": 3}], "line 1: query must be text"),
        ([{**ITEMS["choice"], "choices": ["one"]}], "line 1: choices must be a list of two or more texts"),
        ([{**ITEMS["choice"], "choices": ["one", 2]}], "line 1: choices must be a list of two or more texts"),
        ([{**ITEMS["choice"], "gold": 2}], r"line 1: gold must be the index of one of the 2 choices, from 0"),
        ([{**ITEMS["contexts"], "gold": "1"}], r"line 1: gold must be the index of one of the 2 context_options"),
    ],
)
def test_local_tasks_error_names_line(lines, message, tmp_path):
    write(tmp_path, "task", *lines)
    with pytest.raises(UserError, match=message):
        local_tasks(tmp_path)


def test_local_tasks_folder_without_tasks(tmp_path):
    with pytest.raises(UserError, match=r"contains no \*\.jsonl"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        local_tasks(tmp_path / "nothing")
    write(tmp_path, "task", "")
    (tmp_path / "task.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        local_tasks(tmp_path)
