"""Tests of lm-eval results by item."""

import pytest

from darwinlm.errors import UserError
from darwinlm.evaluation import zero_shot


def test_items_ordered_over_parts_and_filters():
    def sample(number, acc, kind="none"):
        return {"doc_id": number, "filter": kind, "acc": acc, "acc_norm": 1 - acc}

    parts = {"b": [sample(1, 0), sample(0, 1), sample(0, 0, "other")], "a": [sample(0, 0)]}
    assert zero_shot._items("task", parts) == {"acc": [0.0, 1.0, 0.0], "acc_norm": [1.0, 0.0, 1.0]}
    with pytest.raises(UserError, match=r"reports none of the supported metrics \(acc, acc_norm, exact_match\)"):
        zero_shot._items("task", {"a": [{"doc_id": 0, "filter": "none", "perplexity": 3.0}]})
