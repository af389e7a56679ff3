"""Plans near another one, scored without training from the first layer on that differs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from darwinlm.adapters.cutting import Cut, build_layer
from darwinlm.adapters.loading import DenseModel
from darwinlm.adapters.modeling_darwinlm import DarwinLMDecoderLayer, attention_masks
from darwinlm.plan import Plan
from darwinlm.scoring import DenseReference, Fidelity


class Neighbourhood:
    """What a base plan and those near it have in common.

    The base plan's hidden states before every layer are kept (tokens * hidden * layers, float32), so a plan that
    differs from it first in layer l costs the layers from l on, and builds only those that differ.
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
            dense: the model.
            reference: its hidden states on the score text.
            cut: the database's cut of site number i at a level above 0.
            base: the plan in the middle.
            dtype: that layers compute in.
        """
        self._dense, self._reference, self._cut, self._dtype = dense, reference, cut, dtype
        self._base = base.levels
        self._weights = dense.weights
        self._sites_of: dict[int, list[int]] = {}
        for index, site in enumerate(dense.sites):
            self._sites_of.setdefault(site.layer, []).append(index)
        self._layers = [self._build(layer, base.levels) for layer in sorted(self._sites_of)]
        self._before: list[list[Tensor]] = []
        """By batch, the hidden states before each layer and after the last."""
        self._inputs = []
        model = dense.ends.model
        for ids_BT in reference.batches():
            states = model.embed_tokens(ids_BT).to(dtype)
            positions = torch.arange(ids_BT.shape[1], device=dense.device).unsqueeze(0)
            masks = attention_masks(dense.config, states, position_ids=positions)
            self._inputs.append((positions, masks, model.rotary_emb(states, positions)))
            self._before.append([states])
            for layer, module in enumerate(self._layers):
                self._before[-1].append(self._run(module, layer, self._before[-1][-1], len(self._before) - 1))

    @torch.no_grad()
    def compare(self, levels: Sequence[int], tokens: int | None = None) -> Fidelity:
        """KL and perplexity of the plan `levels` on the first `tokens` tokens (all by default)."""
        changed = {self._dense.sites[i].layer for i, level in enumerate(levels) if level != self._base[i]}
        first = min(changed, default=len(self._layers))
        modules = [
            self._build(layer, levels) if layer in changed else self._layers[layer]
            for layer in range(first, len(self._layers))
        ]

        def hidden(batch: int, rows: int) -> Tensor:
            states = self._before[batch][first][:rows]
            for layer, module in enumerate(modules, first):
                states = self._run(module, layer, states, batch)
            norm = self._dense.ends.model.norm
            normed: Tensor = norm(states.to(norm.weight.dtype))
            return normed

        count = self._reference.count(tokens)
        last_hidden = (hidden(batch, len(ids_BT)) for batch, ids_BT in enumerate(self._reference.batches(count)))
        return self._reference.compare_hidden(last_hidden, self._dense.ends.lm_head.weight, count)

    def _run(self, module: DarwinLMDecoderLayer, layer: int, states: Tensor, batch: int) -> Tensor:
        positions, masks, rotary = self._inputs[batch]
        mask = masks.get(self._dense.config.layer_types[layer])
        if mask is not None and len(mask) > 1:
            mask = mask[: len(states)]
        after: Tensor = module(states, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return after

    def _build(self, layer: int, levels: Sequence[int]) -> DarwinLMDecoderLayer:
        indices = self._sites_of[layer]
        sites = [self._dense.sites[i] for i in indices]
        cuts = {self._dense.sites[i].name: self._cut(i, levels[i]) for i in indices if levels[i] > 0}
        return build_layer(self._dense.config, layer, sites, self._weights, cuts).to(self._dtype)
