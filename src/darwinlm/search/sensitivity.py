"""Effect of every level of every site on the whole model, from a few backward passes.

Around a base plan, KL(dense || plan) is expanded to second order in the change of each site's output: `KL(base) + sum
of first[i][l] + second[i][l]` over sites i at levels l. The first order is the gradient w.r.t. the site's output times
the change; one backward pass gives it for *all* levels of *all* sites. The second order is the Fisher information along
the same change, sampled by a backward pass from tokens drawn from the model's own predictions, with one sample per
window of tokens. Running each neighbor of the plan would need a forward pass each.

Dimension letters: N tokens of a block, W windows of a block, O output rows, I input columns, K columns of all levels
together, L levels.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from darwinlm.metrics.kl import DenseReference
from darwinlm.models.cutting import Cut, build_model, cut_site
from darwinlm.models.device_memory import SPARE, free_memory, kept_bytes
from darwinlm.models.experts import Experts
from darwinlm.models.families import family_of
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.sites import Site
from darwinlm.models.streaming import stream_layers
from darwinlm.plan import Plan, Space
from darwinlm.runtime import dist
from darwinlm.search.descent import Sensitivity

_WINDOW = 16
"""Tokens per window, whose changes are summed before squaring. Joint effects of tokens further apart are ignored (about
a seventh of the second order); in return each draw gives one sample per window, not one per block."""


def measure_sensitivity(
    dense: DenseModel,
    cut: Callable[[int, int], Cut],
    space: Space,
    base: Plan,
    blocks_BT: Tensor,
    *,
    seed: int,
    draws: int = 1,
    after_block: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Expand KL around `base`. Blocks are distributed over ranks; the result does not depend on the number of ranks.

    Args:
        dense: dense model.
        cut: returns the database's cut of a site (by index) at a level above 0.
        space: levels of every site.
        base: base plan.
        blocks_BT: token ids, (blocks, tokens).
        seed: random seed of the draws.
        draws: random draws per block for the second order.
        after_block: called after each block.
    """
    mine = range(dist.rank(), len(blocks_BT), dist.world_size())
    reference = DenseReference(dense.reference.model, blocks_BT[mine.start :: mine.step]) if len(mine) else None
    place = _place_of_columns(dense, space, blocks_BT.shape[1])
    sites = [
        (_ExpertSite if site.routed else _WidenedSite)(dense, index, cut, space, base, place)
        for index, site in enumerate(dense.sites)
    ]
    model = _widened_model(dense, sites)
    changes: dict[int, list[Tensor]] = {}
    """First and second order of each block, each of shape (sites, levels)."""
    for row, block in enumerate(mine):
        assert reference is not None
        ids_1N = blocks_BT[block].to(dense.device, torch.long).unsqueeze(0)
        # Only gradients w.r.t. outputs are needed; the embeddings require gradients so that autograd reaches all
        # layers.
        embedded = model.get_input_embeddings()(ids_1N).requires_grad_(True)
        hidden_ND = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
        gradient_ND, scores_RND = reference.gradients(
            hidden_ND.detach(), row, dense.head, draws, seed=seed * len(blocks_BT) + block
        )
        hidden_ND.backward(gradient_ND.to(hidden_ND.dtype), retain_graph=draws > 0)
        first = torch.stack([site.changes_WL.sum(0) for site in sites])
        second = torch.zeros_like(first)
        for draw in range(draws):
            hidden_ND.backward(scores_RND[draw].to(hidden_ND.dtype), retain_graph=draw + 1 < draws)
            second += torch.stack([site.changes_WL.square().sum(0) for site in sites]) / (2 * draws)
        changes[block] = [first.cpu(), second.cpu()]
        after_block()
    everything: dict[int, list[Tensor]] = {}
    for part in dist.gather(changes):
        everything |= part
    first, second = torch.stack([torch.stack(everything[block]) for block in sorted(everything)]).mean(0)
    counts = [len(site.units) for site in space.sites]
    return Sensitivity(
        *(tuple(tuple(row[:n]) for row, n in zip(table.tolist(), counts, strict=True)) for table in (first, second))
    )


def _place_of_columns(dense: DenseModel, space: Space, tokens: int) -> torch.device:
    """Return the device for the columns of all levels: the model's device, or the CPU if there is not enough room."""
    dtype = fast_dtype(dense.device)
    widened = sum(site.columns(site.num_units) for site in dense.sites)
    # Experts also store the input projections of every level.
    columns = sum(
        site.columns(sum(levels.units)) * (3 if site.routed else 1)
        for site, levels in zip(dense.sites, space.sites, strict=True)
    )
    size = (columns + widened) * dense.config.hidden_size * dtype.itemsize + kept_bytes(
        dense.config, tokens, tokens, dtype
    )
    room = not dense.offload and SPARE * size < free_memory(dense.device)
    return dense.device if room else torch.device("cpu")


class _WidenedSite:
    """Output projection of a site at its base level, widened to the dense width, and its columns at all levels."""

    def __init__(
        self,
        dense: DenseModel,
        index: int,
        cut: Callable[[int, int], Cut],
        space: Space,
        base: Plan,
        place: torch.device,
    ) -> None:
        self.site, self.base = dense.sites[index], base.levels[index]
        self.last = sum(units > 0 for units in space.sites[index].units)
        """Level that removes the site, if there is one."""
        self.dtype, self.device = fast_dtype(dense.device), dense.device
        self.offload = dense.offload
        """Whether layers are streamed; then the inputs are recomputed for each backward pass."""
        dense_OI = dense.weights[f"{self.site.output}.weight"].to(self.dtype)
        columns, weights = [torch.arange(dense_OI.shape[1], device=dense_OI.device)], [dense_OI]
        for level in range(1, self.last):
            found = cut(index, level)
            assert found.output_weight is not None
            columns.append(_columns(self.site, found.kept).to(dense_OI.device))
            weights.append(found.output_weight.to(self.dtype))
        self.weight_OI = torch.zeros_like(dense_OI)
        if self.base < self.last:
            self.weight_OI[:, columns[self.base]] = weights[self.base]
        self.bias_O = dense.weights.get(f"{self.site.output}.bias")
        self.columns_K = torch.cat(columns).to(dense.device)
        # Streamed, they stay mapped from the database's files, which all ranks share.
        self._weights = weights if dense.offload else [torch.cat(weights, dim=1).to(place)]
        self.widths = [len(one) for one in columns]
        self._inputs_NI: Tensor | None = None
        self._norm: nn.Module | None = None
        most = max(len(site.units) for site in space.sites)
        self.changes_WL = torch.zeros(0, most, device=dense.device)
        """Gradient times change of the output in the last backward pass, (windows, levels)."""

    def _all_columns(self) -> Tensor:
        """Return the columns of all levels on the device."""
        parts = [one.to(self.device, non_blocking=True) for one in self._weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that replace the dense output projection in the model."""
        found = {f"{self.site.output}.weight": self.weight_OI}
        if self.bias_O is not None:
            found[f"{self.site.output}.bias"] = self.bias_O if self.base < self.last else torch.zeros_like(self.bias_O)
        return found

    def watch(self, module: nn.Module, norm: nn.Module | None) -> None:
        """Register hooks so that every backward pass through `module`, the output projection, sets `changes_WL`.

        If a `norm` follows, the change is measured after it: the norm removes the scale of its input, so that removing
        the site would seem free otherwise.
        """
        # A copy: the model's own norm may be elsewhere by then, and would create a reference cycle through its hook.
        self._norm = None if norm is None else copy.deepcopy(norm).to(self.device)

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self._inputs_NI = inputs[0].detach()[0]

        def after(_: nn.Module, __: object, outputs: Tensor) -> None:
            if outputs.requires_grad:  # During the backward pass, if layers are streamed.
                outputs.register_hook(self._project if norm is None else self._project_normed)

        module.register_forward_pre_hook(before)
        (norm or module).register_forward_hook(after)

    def _project(self, gradient_1NO: Tensor) -> None:
        assert self._inputs_NI is not None
        gradient_NO = gradient_1NO[0]
        products_NK = (gradient_NO @ self._all_columns()).mul_(self._inputs_NI.index_select(1, self.columns_K))
        length, most = len(gradient_NO), self.changes_WL.shape[1]
        changes_NL = gradient_NO.new_zeros(-(-length // _WINDOW) * _WINDOW, most, dtype=torch.float32)
        for level, part in enumerate(products_NK.split(self.widths, dim=1)):
            changes_NL[:length, level] = part.sum(1, dtype=torch.float32)
        if self.bias_O is not None:
            bias_O = self.bias_O.to(gradient_NO.device, torch.float32)
            changes_NL[:length, : self.last] += (gradient_NO.float() @ bias_O)[:, None]
        self._found(changes_NL)

    def _found(self, changes_NL: Tensor) -> None:
        self.changes_WL = _by_window(changes_NL, self.base)
        if self.offload:
            self._inputs_NI = None

    @torch.no_grad()
    def _project_normed(self, gradient_1NO: Tensor) -> None:
        """Compute the changes from the norm's full output at each level: to first order, the norm is invariant to its
        input's scale."""
        assert self._inputs_NI is not None and self._norm is not None
        gradient_NO = gradient_1NO[0]
        length, most = len(gradient_NO), self.changes_WL.shape[1]
        changes_NL = gradient_NO.new_zeros(-(-length // _WINDOW) * _WINDOW, most, dtype=torch.float32)
        for level, (columns_K, weight_OK) in enumerate(
            zip(self.columns_K.split(self.widths), self._all_columns().split(self.widths, dim=1), strict=True)
        ):
            output_NO = self._inputs_NI.index_select(1, columns_K) @ weight_OK.T
            if self.bias_O is not None:
                output_NO += self.bias_O.to(output_NO)
            changes_NL[:length, level] = (gradient_NO.float() * self._norm(output_NO).float()).sum(1)
        self._found(changes_NL)


class _ExpertSite:
    """Experts of a layer at the base level and at all levels. Routing differs by level, so the whole output is
    computed."""

    def __init__(
        self,
        dense: DenseModel,
        index: int,
        cut: Callable[[int, int], Cut],
        space: Space,
        base: Plan,
        place: torch.device,
    ) -> None:
        self.site, self.base = dense.sites[index], base.levels[index]
        self.base_cut = cut(index, self.base) if self.base else None
        weights, dtype = dense.weights, fast_dtype(dense.device)
        own = {name: weights[name] for name in self.site.tensors}
        self._levels = [
            Experts.of(dense.config, self.site, cut_site(self.site, own, cut(index, level)) if level else own)
            .to(place, dtype)
            for level in range(len(space.sites[index].units))
        ]  # fmt: skip
        self._inputs_ND: Tensor | None = None
        most = max(len(site.units) for site in space.sites)
        self.changes_WL = torch.zeros(0, most, device=dense.device)

    def watch(self, block: nn.Module) -> None:
        """Register hooks so that every backward pass through `block` (router and experts) sets `changes_WL`."""

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            self._inputs_ND = inputs[0].detach()[0]
            output = output if isinstance(output, Tensor) else output[0]
            if output.requires_grad:
                output.register_hook(self._project)

        block.register_forward_hook(after)

    @torch.no_grad()
    def _project(self, gradient_1ND: Tensor) -> None:
        assert self._inputs_ND is not None
        gradient_ND, x_ND = gradient_1ND[0].float(), self._inputs_ND
        length, most = len(gradient_ND), self.changes_WL.shape[1]
        changes_NL = gradient_ND.new_zeros(-(-length // _WINDOW) * _WINDOW, most)
        for level, stored in enumerate(self._levels):
            experts = stored.to(gradient_ND.device, x_ND.dtype)
            output_ND = experts.sum_of(x_ND, experts.gates(experts.logits(x_ND)))
            changes_NL[:length, level] = (gradient_ND * output_ND.float()).sum(1)
        self.changes_WL = _by_window(changes_NL, self.base)


def _by_window(changes_NL: Tensor, base: int) -> Tensor:
    """Return changes relative to the level `base`, summed over the tokens of each window."""
    changes_NL = changes_NL - changes_NL[:, base].clone()[:, None]
    return changes_NL.view(-1, _WINDOW, changes_NL.shape[1]).sum(1)


def _widened_model(dense: DenseModel, sites: Sequence[_WidenedSite | _ExpertSite]) -> PrunedModel:
    weights = dict(dense.weights)
    cuts = {}
    for site in sites:
        if isinstance(site, _WidenedSite):
            weights |= site.tensors()
        elif site.base_cut is not None:
            cuts[site.site.name] = site.base_cut
    model = build_model(dense.config, dense.sites, weights, cuts, layers_on=dense.layers_device)
    model.to(fast_dtype(dense.device))
    if dense.offload:
        stream_layers(model, dense.device)
    family = family_of(dense.config)
    for site in sites:
        if isinstance(site, _ExpertSite):
            site.watch(model.model.layers[site.site.layer].get_submodule(family.mlp))
            continue
        norm = family.norm_after(site.site.kind)
        layer = model.model.layers[site.site.layer]
        site.watch(model.get_submodule(site.site.output), layer.get_submodule(norm) if norm else None)
    return model


def _columns(site: Site, kept: tuple[int, ...]) -> Tensor:
    width = site.columns_per_unit
    return (torch.tensor(kept)[:, None] * width + torch.arange(width)).flatten()
