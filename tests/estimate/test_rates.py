"""Tests of measured rates, with a clock that counts operations."""

from math import prod
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from darwinlm.estimate.rates import measure_rates
from darwinlm.models.config import load_config
from darwinlm.models.families import dense_config
from darwinlm.models.loading import expected_shapes


def test_measure_rates(checkpoint, monkeypatch):
    config = dense_config(load_config(str(checkpoint("qwen2"))))
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr("darwinlm.estimate.rates.time", SimpleNamespace(perf_counter=counter.get_total_flops))
        rates = measure_rates(config, torch.device("cpu"), 32)
    shapes = expected_shapes(config)
    matrices = [prod(shape) for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2]
    layer, head = 2 * sum(matrices), 2 * config.vocab_size * config.hidden_size
    assert rates.layer_float32 == rates.layer_fast == rates.layer_alone == layer
    assert rates.layer_training == 3 * layer
    assert rates.head_float32 == rates.head_alone == head
    assert rates.head_training == 4 * head
    assert rates.product == 1
