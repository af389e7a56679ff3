"""Cost of a token on a device: measured on this machine in a few seconds, or derived from the peak rates of a GPU."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from darwinlm.models.families import LAYERS, causal_lm, layer_class
from darwinlm.models.loading import expected_shapes, fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedConfig, make_layer
from darwinlm.models.walking import Given, enter
from darwinlm.runtime.memory import available_memory

_UTILISATION = 0.4
"""Fraction of a GPU's peak that whole models reach in practice."""
_LAUNCHES = 1e-4
"""Seconds to launch a layer's kernels on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of a GPU that is not in this machine."""

    memory: float
    """Memory in bytes."""
    fast: float
    """Peak bfloat16 FLOP/s, dense."""
    float32: float
    """Peak float32 FLOP/s."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""


GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(memory=80e9, fast=989e12, float32=67e12, bandwidth=3.35e12),
    "h200": Gpu(memory=141e9, fast=989e12, float32=67e12, bandwidth=4.8e12),
    "a100": Gpu(memory=80e9, fast=312e12, float32=19.5e12, bandwidth=2.0e12),
    "l40s": Gpu(memory=48e9, fast=362e12, float32=91.6e12, bandwidth=0.864e12),
    "rtx4090": Gpu(memory=24e9, fast=165e12, float32=82.6e12, bandwidth=1.01e12),
}
"""GPUs by name; peak rates as published by the vendors."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds per token on a device, for layers and head of the dense model."""

    layer_float32: float
    """Forward pass through one layer in float32."""
    layer_fast: float
    """Forward pass through one layer in the dtype that is fast on this device."""
    layer_training: float
    """Forward and backward pass through one layer in that dtype."""
    layer_alone: float
    """A single token through one layer, as in decoding."""
    head_float32: float
    """Forward pass through the head with log-probabilities, in float32."""
    head_alone: float
    """A single token through the head."""
    head_training: float
    """Two forward passes and a backward pass through the head."""
    product: float
    """One floating-point operation of a large float32 matrix product."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine to run on."""

    name: str
    devices: int
    memory: float
    """Memory in bytes, of each device."""
    accelerator: bool


def machine_here(device: torch.device) -> Machine:
    """Return this machine, with its total GPU memory or its available CPU memory."""
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
    """Derive rates from a GPU's peak rates; `tokens` is the number of tokens per block."""
    shapes = expected_shapes(config)
    # Expert weights have three dimensions; a token only uses the experts it is routed to.
    weights = sum(
        prod(shape) if len(shape) < 3 else prod(shape[1:]) * config.num_experts_per_tok
        for name, shape in shapes.items()
        if name.startswith(f"{LAYERS}0.")
    )
    # Each token attends to half of its block on average: products with keys and with values.
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
    """Measure rates on this device: one random layer and the head, timed on a block of `tokens` tokens for some
    seconds."""
    fast = fast_dtype(device)
    # A model without layers and vocabulary creates a layer's inputs cheaply.
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
    """Return the minimum time of several runs, after a warm-up run."""
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
