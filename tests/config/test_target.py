"""Tests of sizes, targets and families of sizes."""

import pytest

from darwinlm.config.loading import make_recipe
from darwinlm.config.target import parse_size, parse_target, split_targets

GIVEN = {"model": "some/model", "target": 0.5}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (" .25 ", 0.25),
        ("5e-1", 0.5),
        (1, 1.0),
        ("1", 1.0),
        ("2.7B", 2_700_000_000),
        ("2.7 b", 2_700_000_000),
        ("8.03B", 8_030_000_000),  # 8.03 * 1e9 is 8029999999.999999
        ("500M", 500_000_000),
        ("0.5B", 500_000_000),
        ("1.5k", 1_500),
        ("1T", 10**12),
        ("1_000_000", 1_000_000),
        ("1e9", 10**9),
        (2_700_000_000, 2_700_000_000),
        (1e9, 10**9),
        (10**400, 10**400),
    ],
)
def test_parse_size(text, size):
    found = parse_size(text)
    assert found == size
    assert type(found) is type(size)


@pytest.mark.parametrize("text", ["abc", "", "50%", "0.5x", "2.7BB", "B", "1,000,000", "½", "0x10"])
def test_parse_size_error(text):
    with pytest.raises(ValueError, match=r"neither a fraction of the parameters \(0.5\) nor a number of them \(2.7B"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        (0.5, {"params": 0.5}),
        ("2.7B", {"params": 2_700_000_000}),
        ("params=2.7B, kv_cache=0.5", {"params": 2_700_000_000, "kv_cache": 0.5}),
        ("latency=0.6,flops=1", {"latency": 0.6, "flops": 1.0}),
        ("memory=8GB", {"memory": 8 * 10**9}),
        ("memory=1.5GiB", {"memory": 3 * 2**29}),
        ("memory=0.25", {"memory": 0.25}),
    ],
)
def test_parse_target(text, limits):
    assert parse_target(text) == limits
    assert parse_target(make_recipe({**GIVEN, "target": text}).target) == limits


def test_split_targets():
    assert split_targets("0.8, 0.6,100M") == ["0.8", "0.6", "100M"]
    assert split_targets("params=0.5,kv_cache=0.5") == ["params=0.5,kv_cache=0.5"]
    assert split_targets(0.5) == [0.5]
