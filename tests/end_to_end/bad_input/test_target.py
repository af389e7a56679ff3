"""Tests of targets that are malformed or cannot be met."""

import pytest
from refusals import NEITHER, RANGE


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("abc", f"target 'abc' {NEITHER}"),
        ("", f"target '' {NEITHER}"),
        ("50%", f"target '50%' {NEITHER}"),
        ("0", f"target 0 {RANGE}"),
        ("-0.5", f"target -0.5 {RANGE}"),
        ("1.5", f"target 1.5 {RANGE}"),
        ("500", f"target 500 {RANGE}"),
        ("nan", f"target nan {RANGE}"),
        ("inf", f"target inf {RANGE}"),
        ("1e400", f"target 1e400 {RANGE}"),
        ("2.7B", "target 2700000000 is 2,700,000,000 parameters, but the dense model has only 72,192; lower it"),
        ("72193", "target 72193 is 72,193 parameters, but the dense model has only 72,192; lower it"),
        (
            "0.01",
            "0.01 is 721 of 72,192 parameters, but .* have 24,912; the smallest possible target is 0.3451$",
        ),
        ("0.345", "0.345 is 24,906 of 72,192 parameters.* the smallest possible target is 0.3451$"),
        ("size=0.5", "target 'size=0.5': unknown resource 'size'; did you mean '((active_)?params|latency|flops)'"),
        ("kvcache=0.5", "target 'kvcache=0.5': unknown resource 'kvcache'; did you mean 'kv_cache'"),
        ("params=0.5,0.4", "target 'params=0.5,0.4': unknown resource '0.4'"),
        ("params=0.5,params=0.4", "target 'params=0.5,params=0.4': params is limited twice"),
        ("params=", f"target '' {NEITHER}"),
        ("latency=2B", "target 'latency=2B': latency takes a fraction .0.5. of the dense model's"),
        ("memory=8B", "target 'memory=8B': memory takes a fraction .0.5. or bytes .8GB."),
        ("flops=1.5", r"target flops=1.5 must be above 0 and at most 1 \(a fraction\)"),
        ("params=0.01,kv_cache=0.5", "target 0.01 is 721 of 72,192 parameters"),
        ("0.8,0.8", "target '0.8,0.8': a size is given twice"),
        ("0.8,2.7B", "target '0.8,2.7B' mixes fractions and numbers of parameters; give all sizes in the same way"),
        ("0.8,abc", f"target 'abc' {NEITHER}"),
        ("0.8,", f"target '' {NEITHER}"),
        ("0.8,0.01", "target 0.01 is 721 of 72,192 parameters"),
        ("2K", "target 2000 is 2,000 of 72,192 parameters.* the smallest possible target is 0.3451$"),
    ],
)
def test_invalid_or_unreachable_target(target, message, refused):
    refused(message, target=target)
