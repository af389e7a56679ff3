"""Gram matrices of every site's inputs, from one forward pass through the dense model, one layer at a time.

Dimension letters: N tokens of a batch, I input columns of a site, B text blocks, T tokens per block, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from darwinlm.config.recipe import Offload
from darwinlm.database.activations import open_activations
from darwinlm.database.symmetric import add_symmetric, mirror
from darwinlm.errors import InvalidTensorError
from darwinlm.models.device_memory import Portion
from darwinlm.models.families import Family, family_of
from darwinlm.models.loading import DenseModel
from darwinlm.models.sites import Rows, Site
from darwinlm.models.walking import Given, carried, enter
from darwinlm.runtime import dist
from darwinlm.runtime.progress import Phases

_LEAST_NORM = 1e-6
_NO_LIMIT = ("cpu", "meta")
"""Devices that do not raise out-of-memory errors."""


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """Calibration statistics of a site."""

    gram_II: Tensor
    """Gram matrix, float32: mean over tokens of x x^T / |r|^2, where x is the input of the site's output projection and
    r the residual stream after the site. With it, `tr(dW G dW^T)` is the squared error of the output relative to the
    stream it is added to, averaged over tokens, which is what the next norm sees. Without the weights, a few tokens
    with massive activations (the first of a text) would dominate the sites that write them. If a norm follows the site,
    x is also divided by the norm's divisor, so that the error is measured after the norm (`docs/method.md`)."""
    gain_O: Tensor | None = None
    """Gain of the norm that follows, by output row; None if there is none."""
    shares: Mapping[str, Tensor] = field(default_factory=dict)
    """For norms over all heads, by tensor: the share of each group of rows in the mean square."""


@dataclass(frozen=True, slots=True)
class ExpertStatistics:
    """Calibration data of a layer's experts, whose outputs must be computed again for each choice of experts."""

    inputs_ND: Tensor
    """Inputs of the router and the experts, on the CPU, in their compute dtype."""
    norms_N: Tensor
    """Norm |r| of each token's residual stream after the layer: float32, on the CPU."""


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
) -> Iterator[tuple[Site, SiteStatistics | ExpertStatistics | None]]:
    """Yield each site with its statistics, in the model's order.

    The hidden states of all tokens pass through one layer at a time; the Gram matrices of a layer and the inputs of the
    next come from the same pass. Only that layer's weights are in memory. Every site sees the dense model's
    activations. With several ranks each processes its share of the text, and a site's sums are reduced to its owner.

    Args:
        dense: dense model; its weights are read as needed.
        tokens_BT: token ids without padding, (blocks, tokens): the same on every rank.
        batch_size: text blocks per pass; halved when out of memory.
        scratch: folder for activations offloaded to disk.
        owner: rank that gets a site's statistics; the others get None.
        first_layer: earlier layers are run without statistics (they are already in the database).
        offload: where to keep the hidden states between layers.
        phases: clock for `forward` and `Gram`.

    Raises:
        InvalidTensorError: if activations contain NaN or Inf; the message names the site.
    """
    phases = phases or Phases()
    mine_BT = tokens_BT[dist.rank() :: dist.world_size()]
    portion = Portion(min(batch_size, max(1, len(mine_BT))), "database")
    by_layer: dict[int, list[Site]] = {}
    for site in dense.sites:
        by_layer.setdefault(site.layer, []).append(site)

    shape = (*mine_BT.shape, dense.config.hidden_size)
    with open_activations(shape, dense.compute_dtype, dense.device, offload, scratch) as hidden_BTD:
        given, embedding_model = list[Given](), dense.embedding_model()
        for row in range(len(mine_BT)):
            hidden_BTD[row : row + 1], given = enter(embedding_model, mine_BT[row : row + 1].long().cpu())
        # The same for every block, since none has padding.
        given = carried(given, dense.device)
        del embedding_model
        for index in range(dense.config.num_hidden_layers):
            with phases("read"):
                layer = dense.block(index)
            sites = by_layer.get(index, []) if index >= first_layer else []

            def forward(rows: slice, layer: nn.Module = layer, index: int = index) -> Tensor:
                with phases("forward"):
                    states_BTD = hidden_BTD[rows].to(dense.device, non_blocking=True)
                    output_BTD: Tensor = layer(states_BTD, **given[index])
                    return output_BTD

            with _Recorder(layer, sites, phases, family_of(dense.config)) as recorder:
                if index in (0, first_layer) and len(mine_BT) and dense.device.type not in _NO_LIMIT:
                    portion(lambda size, forward=forward: forward(slice(0, size)))  # type: ignore[misc]
                    recorder.reset()
                for rows in _slices(len(mine_BT), portion.size):
                    hidden_BTD[rows] = forward(rows)
                del layer, forward
                for site in sites:
                    yield site, recorder.statistics(site, owner(site))


def root_mean_square(x: Tensor, norm: nn.Module) -> Tensor:
    """Return the divisor of an RMS `norm` for `x`: over the last dimension, kept with size 1; float32."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", _LEAST_NORM))
    return (x.float().square().mean(-1, keepdim=True) + epsilon).sqrt()


def _slices(blocks: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, blocks)) for first in range(0, blocks, size))


class _Recorder:
    """Hooks on one layer that accumulate statistics of its sites."""

    def __init__(self, layer: nn.Module, sites: list[Site], phases: Phases, family: Family) -> None:
        """Register hooks for the `sites` of `layer`."""
        self._phases = phases
        self._grams: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs_NI: dict[str, Tensor] = {}
        """Inputs of the current batch, until its residual stream is known."""
        self._hooks = []
        self._gains: dict[str, Tensor] = {}
        self._shares: dict[str, dict[str, Tensor]] = {}
        self._read: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """Inputs and stream norms by site of experts and batch."""
        for site in sites:
            self._tokens[site.name] = 0
            if site.routed:
                self._read[site.name] = []
                self._hooks.append(
                    layer.get_submodule(family.mlp).register_forward_hook(self._record_inputs(site, None))
                )
                hook = self._record_tokens(site)
                self._hooks.append(layer.register_forward_hook(lambda *args, hook=hook: hook(args[2])))
                continue
            module = cast(nn.Linear, layer.get_submodule(family.output(site.kind)))
            columns = site.num_units * site.columns_per_unit
            device = next(module.parameters()).device
            self._grams[site.name] = torch.zeros(columns, columns, device=device)
            norm = layer.get_submodule(name) if (name := family.norm_after(site.kind)) else None
            if norm is not None:
                ones_O = torch.ones(module.out_features, device=device, dtype=module.weight.dtype)
                self._gains[site.name] = norm(ones_O).float()
            self._hooks.append(module.register_forward_hook(self._record_inputs(site, norm)))
            self._shares[site.name] = {}
            for rows in site.inputs:
                if rows.norm:
                    one = layer.get_submodule(rows.tensor.split(".", 3)[3].removesuffix(".weight"))
                    groups = one.get_parameter("weight").numel() // rows.rows
                    self._shares[site.name][rows.tensor] = torch.zeros(groups, device=device)
                    self._hooks.append(one.register_forward_pre_hook(self._record_shares(site, rows)))
            # The stream after attention is the input of the MLP's norm; after the MLP it is the output of the layer.
            hook = self._record_stream(site)
            if site.kind == "attention" and family.reads_after_attention:
                reader = layer.get_submodule(family.reads_after_attention)
                self._hooks.append(reader.register_forward_pre_hook(lambda _, inputs, hook=hook: hook(inputs[0])))
            else:
                self._hooks.append(layer.register_forward_hook(lambda *args, hook=hook: hook(args[2])))

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def reset(self) -> None:
        """Reset all statistics."""
        for sums in (*self._grams.values(), *(one for shares in self._shares.values() for one in shares.values())):
            sums.zero_()
        self._read = {name: [] for name in self._read}
        self._tokens = dict.fromkeys(self._tokens, 0)

    def statistics(self, site: Site, owner: int) -> SiteStatistics | ExpertStatistics | None:
        """Reduce the site's sums, or gather the inputs of its experts, to rank `owner`, and free them."""
        if site.routed:
            return self._tokens_of(site, owner)
        with self._phases("Gram"):
            gram_II = self._grams.pop(site.name)
            tokens = sum(dist.gather(self._tokens[site.name]))
            dist.sum_to(gram_II, owner)
            shares = self._shares.pop(site.name)
            for sums_G in shares.values():
                dist.sum_to(sums_G, owner)
            if dist.rank() != owner:
                return None
            if not bool(torch.isfinite(gram_II.diagonal()).all()):
                raise InvalidTensorError(
                    f"{site.name}: its activations contain NaN or Inf on the calibration text; the checkpoint "
                    f"is damaged or overflows in {str(gram_II.dtype).removeprefix('torch.')}"
                )
            gram_II /= tokens
            mirror(gram_II)
            return SiteStatistics(
                gram_II, self._gains.get(site.name), {name: (sums_G / tokens).cpu() for name, sums_G in shares.items()}
            )

    def _tokens_of(self, site: Site, owner: int) -> ExpertStatistics | None:
        batches = self._read.pop(site.name)
        parts = dist.gather([torch.cat(one) for one in zip(*batches, strict=True)])
        if dist.rank() != owner:
            return None
        inputs_ND, norms_N = (torch.cat(one) for one in zip(*(part for part in parts if part), strict=True))
        if not bool(torch.isfinite(inputs_ND).all()):
            raise InvalidTensorError(
                f"{site.name}: its activations contain NaN or Inf on the calibration text; the checkpoint is "
                f"damaged or overflows in {str(inputs_ND.dtype).removeprefix('torch.')}"
            )
        return ExpertStatistics(inputs_ND, norms_N)

    def _record_tokens(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(stream: Tensor) -> None:
            norms_N = stream.flatten(0, -2).float().norm(dim=-1).clamp_min(_LEAST_NORM)
            self._read[site.name].append((self._inputs_NI.pop(site.name).cpu(), norms_N.cpu()))

        return hook

    def _record_inputs(self, site: Site, norm: nn.Module | None):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_NI = inputs[0].flatten(0, -2)
            if norm is not None:
                x_NI = x_NI.float() / root_mean_square(output, norm).flatten(0, -2)
            self._inputs_NI[site.name] = x_NI

        return hook

    def _record_shares(self, site: Site, rows: Rows):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares_NG = inputs[0].float().square().flatten(0, -2).unflatten(-1, (-1, rows.rows)).sum(-1)
            total_N1 = squares_NG.sum(-1, keepdim=True).clamp_min(_LEAST_NORM)
            self._shares[site.name][rows.tensor] += (squares_NG / total_N1).sum(0)

        return hook

    def _record_stream(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(stream: Tensor) -> None:
            with self._phases("Gram"):
                x_NI = self._inputs_NI.pop(site.name).float()
                norm_N = stream.flatten(0, -2).float().norm(dim=-1)
                # Avoid division by zero; then x is usually zero too.
                x_NI = x_NI / norm_N.clamp_min(_LEAST_NORM)[:, None]
                add_symmetric(self._grams[site.name], x_NI.T, x_NI)
                self._tokens[site.name] += len(x_NI)

        return hook
