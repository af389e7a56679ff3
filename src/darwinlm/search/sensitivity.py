"""What the whole model makes of every level of every site, from a few backward passes.

Around a base plan, KL(dense || plan) is modelled to second order in the change of each site's output:
`KL(base) + sum of first[i][l] + second[i][l]` over sites i at levels l. The first order is the gradient by the site's
output times the change; one backward pass gives it for *all* levels of *all* sites. The second is the Fisher
information along the same change: a backward pass from tokens drawn from the model's own predictions samples it, in
every window of tokens anew. Running each neighbour of the plan would take a forward pass each.

Dimension letters: N tokens of a block, W windows of a block, O output rows, I input columns, K columns of all levels
together, L levels.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from darwinlm import dist
from darwinlm.adapters.cutting import Cut, build_model, cut_site
from darwinlm.adapters.experts import Experts
from darwinlm.adapters.families import Site, family_of
from darwinlm.adapters.loading import DenseModel, fast_dtype
from darwinlm.adapters.memory import SPARE, free_memory, kept_bytes
from darwinlm.adapters.modeling_darwinlm import PrunedModel
from darwinlm.adapters.streaming import stream_layers
from darwinlm.plan import Plan, Space
from darwinlm.scoring import DenseReference
from darwinlm.search.descent import Sensitivity

_WINDOW = 16
"""Tokens whose changes are summed before they are squared. What changes at tokens further apart do to the same
prediction together is left out (it is about a seventh of the second order), and in return each draw is one sample a
window, not one a block."""


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
    """Expand KL around `base`; each rank takes its share of the blocks, and the result is the same for any number.

    Args:
        dense: the model.
        cut: the database's cut of site number i at a level above 0.
        space: the levels of every site.
        base: the plan in the middle.
        blocks_BT: token ids, blocks * tokens.
        seed: of the draws.
        draws: random draws in each block for the second order.
        after_block: called whenever a block is done.
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
    """By block: the first order and the second, sites * levels."""
    for row, block in enumerate(mine):
        assert reference is not None
        ids_1N = blocks_BT[block].to(dense.device, torch.long).unsqueeze(0)
        # Gradients by outputs alone: they need something at the bottom to flow to.
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
    """Where the columns of all levels are: on the device, or where it has no room for them, on the CPU."""
    dtype = fast_dtype(dense.device)
    widened = sum(site.columns(site.num_units) for site in dense.sites)
    # Of experts the input projections of every level too.
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
    """A site's output projection at its base level, as wide as the dense one, and its columns at all levels."""

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
        """The level that removes the site, if there is one."""
        self.dtype, self.device = fast_dtype(dense.device), dense.device
        self.offload = dense.offload
        """Then what it reads is computed again for each backward pass."""
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
        self.columns_K, self.weights_OK = torch.cat(columns).to(dense.device), torch.cat(weights, dim=1).to(place)
        self.widths = [len(one) for one in columns]
        self._inputs_NI: Tensor | None = None
        self._norm: nn.Module | None = None
        most = max(len(site.units) for site in space.sites)
        self.changes_WL = torch.zeros(0, most, device=dense.device)
        """What the last backward pass found: by window of tokens and level, gradient times change of the output."""

    def tensors(self) -> dict[str, Tensor]:
        """What stands in the model for the dense output projection."""
        found = {f"{self.site.output}.weight": self.weight_OI}
        if self.bias_O is not None:
            found[f"{self.site.output}.bias"] = self.bias_O if self.base < self.last else torch.zeros_like(self.bias_O)
        return found

    def watch(self, module: nn.Module, norm: nn.Module | None) -> None:
        """Have every backward pass through `module`, the output projection, leave its `changes_WL` here.

        Where a `norm` follows, what counts is behind it: it does not see how large its input is, and so removing that
        would look free.
        """
        # A copy: the model's own may be elsewhere by then, and would hold this, which holds it.
        self._norm = None if norm is None else copy.deepcopy(norm).to(self.device)

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self._inputs_NI = inputs[0].detach()[0]

        def after(_: nn.Module, __: object, outputs: Tensor) -> None:
            if outputs.requires_grad:  # in the backward pass, where layers are streamed
                outputs.register_hook(self._project if norm is None else self._project_normed)

        module.register_forward_pre_hook(before)
        (norm or module).register_forward_hook(after)

    def _project(self, gradient_1NO: Tensor) -> None:
        assert self._inputs_NI is not None
        gradient_NO = gradient_1NO[0]
        weights_OK = self.weights_OK.to(gradient_NO.device, non_blocking=True)
        products_NK = (gradient_NO @ weights_OK).mul_(self._inputs_NI.index_select(1, self.columns_K))
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
        """The same with the norm's output at each level in full: to first order it does not change with its input."""
        assert self._inputs_NI is not None and self._norm is not None
        gradient_NO = gradient_1NO[0]
        length, most = len(gradient_NO), self.changes_WL.shape[1]
        changes_NL = gradient_NO.new_zeros(-(-length // _WINDOW) * _WINDOW, most, dtype=torch.float32)
        for level, (columns_K, weight_OK) in enumerate(
            zip(self.columns_K.split(self.widths), self.weights_OK.split(self.widths, dim=1), strict=True)
        ):
            output_NO = self._inputs_NI.index_select(1, columns_K) @ weight_OK.to(gradient_NO.device).T
            if self.bias_O is not None:
                output_NO += self.bias_O.to(output_NO)
            changes_NL[:length, level] = (gradient_NO.float() * self._norm(output_NO).float()).sum(1)
        self._found(changes_NL)


class _ExpertSite:
    """A layer's experts at the base level, and at all levels: where a token goes differs, and so all of its output."""

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
        """Have every backward pass through `block`, router and experts, leave its `changes_WL` here."""

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
    """Changes from the level `base` on, summed over the tokens of each window."""
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
