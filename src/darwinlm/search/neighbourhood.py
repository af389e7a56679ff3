"""Scores of plans near a base plan, without training, computed from the first layer that differs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from darwinlm.metrics.kl import DenseReference, Fidelity
from darwinlm.models.cutting import Cut, build_layer
from darwinlm.models.loading import DenseModel
from darwinlm.models.streaming import stream
from darwinlm.models.walking import Given, enter, leave
from darwinlm.plan import Plan


class Neighbourhood:
    """Shared computation of a base plan and plans near it.

    The base plan's hidden states before every layer are cached ((tokens, hidden size) per layer, in `dtype`), so a plan
    that first differs in layer l only runs the layers from l on, and only builds the layers that differ.
    """

    @torch.no_grad()
    def __init__(
        self,
        dense: DenseModel,
        reference: DenseReference,
        cut: Callable[[int, int], Cut],
        base: Plan,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Run the base plan once.

        Args:
            dense: dense model.
            reference: dense hidden states on the score tokens.
            cut: returns the database's cut of a site (by index) at a level above 0.
            base: base plan.
            dtype: compute dtype of the layers.
        """
        self._dense, self._reference, self._cut, self._dtype = dense, reference, cut, dtype
        self._base = base.levels
        self._weights = dense.weights
        self._sites_of: dict[int, list[int]] = {}
        for index, site in enumerate(dense.sites):
            self._sites_of.setdefault(site.layer, []).append(index)
        self._layers = [self._build(layer, base.levels) for layer in range(dense.config.num_hidden_layers)]
        self._before: list[list[Tensor]] = []
        """Hidden states before each layer and after the last, by batch."""
        self._given: list[Given] = []
        """Keyword arguments of each layer, the same for every block."""
        for ids_BT in reference.batches():
            states, _ = enter(dense.loaded, ids_BT, dtype)
            if not self._given:
                _, self._given = enter(dense.loaded, ids_BT[:1], dtype)
            self._before.append([states])
            for layer, module in enumerate(self._layers):
                self._before[-1].append(self._run(module, layer, self._before[-1][-1]))

    @torch.no_grad()
    def compare(self, levels: Sequence[int], tokens: int | None = None) -> Fidelity:
        """Compute KL and perplexity of the plan `levels` on the first `tokens` tokens (default: all)."""
        changed = {self._dense.sites[i].layer for i, level in enumerate(levels) if level != self._base[i]}
        first = min(changed, default=len(self._layers))
        modules = [
            self._build(layer, levels) if layer in changed else self._layers[layer]
            for layer in range(first, len(self._layers))
        ]

        def hidden(batch: int, rows: int) -> Tensor:
            states = self._before[batch][first][:rows]
            for layer, module in enumerate(modules, first):
                states = self._run(module, layer, states)
            return leave(self._dense.loaded, states)

        count = self._reference.count(tokens)
        last_hidden = (hidden(batch, len(ids_BT)) for batch, ids_BT in enumerate(self._reference.batches(count)))
        return self._reference.compare_hidden(last_hidden, self._dense.head, count)

    def _run(self, module: nn.Module, layer: int, states: Tensor) -> Tensor:
        after: Tensor = module(states, **self._given[layer])
        return after

    def _build(self, layer: int, levels: Sequence[int]) -> nn.Module:
        indices = self._sites_of.get(layer, [])
        sites = [self._dense.sites[i] for i in indices]
        cuts = {self._dense.sites[i].name: self._cut(i, levels[i]) for i in indices if levels[i] > 0}
        dense = self._dense
        module = build_layer(dense.config, layer, sites, self._weights, cuts, dense.layers_device).to(self._dtype)
        if dense.offload:
            stream(module, dense.device)
        return module
