"""Gram matrices of every site's inputs, from one forward pass through the dense model, a block at a time.

Dimension letters: N tokens of a batch, I input columns of a site, B text blocks, T tokens of one, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from darwinlm import dist
from darwinlm.adapters.families import Site
from darwinlm.adapters.loading import DenseModel
from darwinlm.adapters.memory import Portion
from darwinlm.adapters.modeling_darwinlm import DarwinLMRotaryEmbedding, attention_masks
from darwinlm.calibration.activations import open_activations
from darwinlm.errors import InvalidTensorError
from darwinlm.progress import Phases
from darwinlm.recipe import Offload
from darwinlm.symmetric import add_symmetric, mirror

_LEAST_NORM = 1e-6
_NO_LIMIT = ("cpu", "meta")
"""Devices that do not say when their memory does not suffice."""


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What calibration knows of a site."""

    gram_II: Tensor
    """Mean over tokens of x x^T / |r|^2, where x is the input of the site's output projection and r the residual stream
    after the site: float32, I = its columns. With it, `tr(dW G dW^T)` is the mean over tokens of the output's squared
    error as a share of the stream that it enters, which is what the next norm passes on. Unweighted, a few tokens with
    massive activations (the first of a text) would outweigh all others in the sites that write them."""


@torch.no_grad()
def walk_blocks(
    dense: DenseModel,
    tokens_BT: Tensor,
    *,
    batch_size: int,
    scratch: Path,
    owner: Callable[[Site], int] = lambda site: 0,
    first_layer: int = 0,
    offload: Offload = "auto",
    phases: Phases | None = None,
) -> Iterator[tuple[Site, SiteStatistics | None]]:
    """Yield each site with its statistics, in the model's order.

    The hidden states of all tokens go through one block at a time; the Gram matrices of a block and the inputs of the
    next come from the same pass. Only that block's weights are in memory. Every site sees the dense model's
    activations. With several ranks each takes its share of the text, and a site's sums end up with its owner alone.

    Args:
        dense: the model; its weights are read as they are needed.
        tokens_BT: token ids without padding, blocks * tokens: the same on every rank.
        batch_size: text blocks in one pass; halved as often as the device's memory asks for it.
        scratch: a folder for activations, should they go to disk.
        owner: the rank that gets a site's statistics; the others get None.
        first_layer: earlier blocks are passed through without statistics (they are already in the database).
        offload: where the hidden states lie between blocks.
        phases: a clock for `forward` and `Gram`.

    Raises:
        InvalidTensorError: naming the site whose activations hold NaN or Inf.
    """
    phases = phases or Phases()
    mine_BT = tokens_BT[dist.rank() :: dist.world_size()]
    portion = Portion(min(batch_size, max(1, len(mine_BT))), "database")
    positions = torch.arange(tokens_BT.shape[1], device=dense.device).unsqueeze(0)
    rotary = DarwinLMRotaryEmbedding(dense.config).to(dense.device)
    by_layer: dict[int, list[Site]] = {}
    for site in dense.sites:
        by_layer.setdefault(site.layer, []).append(site)

    shape = (*mine_BT.shape, dense.config.hidden_size)
    with open_activations(shape, dense.compute_dtype, dense.device, offload, scratch) as hidden_BTD:
        for rows in _slices(len(mine_BT), portion.size):
            hidden_BTD[rows] = dense.embed(mine_BT[rows].long())
        for index in range(dense.config.num_hidden_layers):
            with phases("read"):
                layer = dense.block(index)
            sites = by_layer.get(index, []) if index >= first_layer else []

            def forward(rows: slice, layer: nn.Module = layer, index: int = index) -> Tensor:
                with phases("forward"):
                    states_BTD = hidden_BTD[rows].to(dense.device, non_blocking=True)
                    mask = attention_masks(dense.config, states_BTD, position_ids=positions)
                    output_BTD: Tensor = layer(
                        states_BTD,
                        attention_mask=mask.get(dense.config.layer_types[index]),
                        position_ids=positions,
                        position_embeddings=rotary(states_BTD, positions),
                    )
                    return output_BTD

            with _Recorder(layer, sites, phases) as recorder:
                if index in (0, first_layer) and len(mine_BT) and dense.device.type not in _NO_LIMIT:
                    portion(lambda size, forward=forward: forward(slice(0, size)))  # type: ignore[misc]
                    recorder.reset()
                for rows in _slices(len(mine_BT), portion.size):
                    hidden_BTD[rows] = forward(rows)
                del layer, forward
                for site in sites:
                    yield site, recorder.statistics(site, owner(site))


def _slices(blocks: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, blocks)) for first in range(0, blocks, size))


class _Recorder:
    """Hooks on one block that sum what its sites see."""

    def __init__(self, layer: nn.Module, sites: list[Site], phases: Phases) -> None:
        self._phases = phases
        self._grams: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs_NI: dict[str, Tensor] = {}
        """Of the batch on its way, until its residual stream is known."""
        self._hooks = []
        for site in sites:
            self._tokens[site.name] = 0
            module = layer.get_submodule(site.output.split(".", 3)[3])
            columns = site.num_units * site.columns_per_unit
            device = next(module.parameters()).device
            self._grams[site.name] = torch.zeros(columns, columns, device=device)
            self._hooks.append(module.register_forward_pre_hook(self._record_inputs(site)))
            # The stream after attention is what the MLP's norm reads; at the end it is what the block returns.
            hook = self._record_stream(site)
            if site.kind == "attention" and layer.has_mlp:
                norm = layer.get_submodule("post_attention_layernorm")
                self._hooks.append(norm.register_forward_pre_hook(lambda _, inputs, hook=hook: hook(inputs[0])))
            else:
                self._hooks.append(layer.register_forward_hook(lambda *args, hook=hook: hook(args[2])))

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def reset(self) -> None:
        """Forget what was seen so far."""
        for gram_II in self._grams.values():
            gram_II.zero_()
        self._tokens = dict.fromkeys(self._tokens, 0)

    def statistics(self, site: Site, owner: int) -> SiteStatistics | None:
        """The site's sums over all ranks, on rank `owner`; its own are freed."""
        with self._phases("Gram"):
            gram_II = self._grams.pop(site.name)
            tokens = sum(dist.gather(self._tokens[site.name]))
            dist.sum_to(gram_II, owner)
            if dist.rank() != owner:
                return None
            if not bool(torch.isfinite(gram_II.diagonal()).all()):
                raise InvalidTensorError(
                    f"{site.name}: its activations hold NaN or Inf on the calibration text; the checkpoint is damaged "
                    f"or overflows in {str(gram_II.dtype).removeprefix('torch.')}"
                )
            gram_II /= tokens
            mirror(gram_II)
            return SiteStatistics(gram_II)

    def _record_inputs(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs_NI[site.name] = inputs[0].flatten(0, -2)

        return hook

    def _record_stream(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(stream: Tensor) -> None:
            with self._phases("Gram"):
                x_NI = self._inputs_NI.pop(site.name).float()
                norm_N = stream.flatten(0, -2).float().norm(dim=-1)
                # A stream of zeros says nothing, and its x is zero too unless the site undoes what it adds to.
                x_NI = x_NI / norm_N.clamp_min(_LEAST_NORM)[:, None]
                add_symmetric(self._grams[site.name], x_NI.T, x_NI)
                self._tokens[site.name] += len(x_NI)

        return hook
