"""What a token costs on a device: measured here in a few seconds, or from the peaks of a device that is not here."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from darwinlm.adapters.families import LAYERS, causal_lm, layer_class
from darwinlm.adapters.loading import expected_shapes, fast_dtype
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, make_layer
from darwinlm.adapters.walking import Given, enter
from darwinlm.memory import available_memory

_UTILISATION = 0.4
"""Of a GPU's peak, what whole models reach in practice."""
_LAUNCHES = 1e-4
"""Seconds in which a layer's kernels are started on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device that is not here."""

    memory: float
    """Bytes."""
    fast: float
    """Peak bfloat16 FLOP/s, dense."""
    float32: float
    """Peak float32 FLOP/s."""
    bandwidth: float
    """Of its memory, bytes a second."""


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(memory=80e9, fast=989e12, float32=67e12, bandwidth=3.35e12),
    "h200": Gpu(memory=141e9, fast=989e12, float32=67e12, bandwidth=4.8e12),
    "a100": Gpu(memory=80e9, fast=312e12, float32=19.5e12, bandwidth=2.0e12),
    "l40s": Gpu(memory=48e9, fast=362e12, float32=91.6e12, bandwidth=0.864e12),
    "rtx4090": Gpu(memory=24e9, fast=165e12, float32=82.6e12, bandwidth=1.01e12),
}
"""By name; peaks are the makers'."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a token costs on a device, in seconds; of layers and head as in the dense model."""

    layer_float32: float
    """Through one layer, forwards, in float32."""
    layer_fast: float
    """The same in the dtype that is fast here."""
    layer_training: float
    """Forwards and backwards through one layer, in that dtype."""
    layer_alone: float
    """A single token through one layer, as in decoding."""
    head_float32: float
    """Through the head, forwards, with its log-probabilities, in float32."""
    head_alone: float
    """A single token through the head."""
    head_training: float
    """Forwards (twice) and backwards through the head."""
    product: float
    """One floating-point operation of a large float32 matrix product."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is to be made."""

    name: str
    devices: int
    memory: float
    """Bytes, of each device."""
    accelerator: bool


def machine_here(device: torch.device) -> Machine:
    """This machine, with what is free on it."""
    if device.type == "cuda":
        return Machine(
            name=torch.cuda.get_device_name(device),
            devices=torch.cuda.device_count(),
            memory=torch.cuda.get_device_properties(device).total_memory,
            accelerator=True,
        )
    name = f"this machine ({torch.get_num_threads()} CPU threads)"
    return Machine(name=name, devices=1, memory=available_memory(), accelerator=False)


def rates_of(config: PrunedConfig, gpu: Gpu, tokens: int) -> Rates:
    """What a token costs on a device that is not here, from its peaks; `tokens` are those of a block."""
    shapes = expected_shapes(config)
    # Of experts, whose tensors have three dimensions, a token meets those that it goes to.
    weights = sum(
        prod(shape) if len(shape) < 3 else prod(shape[1:]) * config.num_experts_per_tok
        for name, shape in shapes.items()
        if name.startswith(f"{LAYERS}0.")
    )
    # Each token looks at half of its block on average: products with keys and with values.
    attention = 2 * tokens * config.num_attention_heads * config.head_dim
    layer, head = 2 * weights + attention, 2 * config.vocab_size * config.hidden_size
    fast, float32 = gpu.fast * _UTILISATION, gpu.float32 * _UTILISATION
    return Rates(
        layer_float32=layer / float32,
        layer_fast=layer / fast,
        layer_training=3 * layer / fast,
        layer_alone=2 * weights / gpu.bandwidth + _LAUNCHES,
        head_float32=head / float32,
        head_alone=2 * config.vocab_size * config.hidden_size / gpu.bandwidth + _LAUNCHES,
        head_training=4 * head / fast,
        product=1 / (gpu.float32 * 2 * _UTILISATION),
    )


def measure_rates(config: PrunedConfig, device: torch.device, tokens: int) -> Rates:
    """What a token costs here: one random layer and the head, timed on a block of `tokens` tokens for some seconds."""
    fast = fast_dtype(device)
    # Without layers and without a vocabulary, what a layer is given is cheap to make.
    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers, small.intermediate_size, small.pad_token_id = 1, 1, 1, None
    around = causal_lm(small)._from_config(small).to(device)

    def given(count: int, dtype: torch.dtype) -> Given:
        return enter(around, torch.zeros(1, count, dtype=torch.long, device=device), dtype)[1][0]

    def layer_of(dtype: torch.dtype) -> nn.Module:
        layer: nn.Module = make_layer(layer_class(config), config, 0).to(device, dtype)
        return layer

    def through(layer: nn.Module, states_BTD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer(states_BTD, **known[states_BTD.shape[1], states_BTD.dtype])
        return output

    def train(layer: nn.Module, states_BTD: torch.Tensor) -> None:
        through(layer, states_BTD.requires_grad_(True)).sum().backward()

    head_VD = torch.randn(config.vocab_size, config.hidden_size, device=device) / config.hidden_size
    rows = min(tokens, 128)

    def head() -> None:
        torch.mm(states[torch.float32][0, :rows], head_VD.T).log_softmax(-1).exp_()

    def train_head() -> None:
        hidden_ND = states[fast][0, :rows].detach().requires_grad_(True)
        for _ in range(2):
            loss = (hidden_ND @ head_fast_VD.T).float().log_softmax(-1).sum()
        loss.backward()

    head_fast_VD = head_VD.to(fast).requires_grad_(True)
    states = {
        dtype: torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype) for dtype in (torch.float32, fast)
    }
    layers = {dtype: layer_of(dtype) for dtype in states}
    known = {(count, dtype): given(count, dtype) for count in (1, tokens) for dtype in states}
    side = 2048
    square = torch.randn(side, side, device=device)
    with torch.no_grad():
        slow_forward = _seconds(lambda: through(layers[torch.float32], states[torch.float32]), device)
        fast_forward = _seconds(lambda: through(layers[fast], states[fast]), device)
        one_B1D = states[fast][:, :1]
        alone = _seconds(lambda: through(layers[fast], one_B1D), device)
        head_forward = _seconds(head, device)
        head_alone = _seconds(lambda: torch.mm(states[fast][0, :1], head_fast_VD.T), device)
        product = _seconds(lambda: square @ square, device)
    return Rates(
        layer_float32=slow_forward / tokens,
        layer_fast=fast_forward / tokens,
        layer_alone=alone,
        layer_training=_seconds(lambda: train(layers[fast], states[fast].detach()), device) / tokens,
        head_float32=head_forward / rows,
        head_alone=head_alone,
        head_training=_seconds(train_head, device) / rows,
        product=product / (2 * side**3),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least time of several runs, after one that is not counted."""
    best, spent = float("inf"), 0.0
    for number in range(20):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best = min(best, seconds) if number > 0 else best
        spent += seconds
        if number > 1 and spent > 1:
            break
    return best
