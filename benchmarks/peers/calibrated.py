"""Calibration statistics of the dense model for the peers: one pass for each kind, cached for all.

Dimension letters: B blocks, T tokens of a block, D hidden size, I input columns of a site's output projection.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from darwinlm.database.grams import walk_blocks
from darwinlm.models.cutting import build_model
from darwinlm.models.loading import DenseModel, fast_dtype

_BATCH = 8


@dataclass(frozen=True)
class Calibrated:
    """Dense model and calibration text of all methods."""

    dense: DenseModel
    blocks_BT: Tensor

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """Gram matrix of the inputs of each site's output projection (I * I), as in this project's database."""
        with tempfile.TemporaryDirectory() as scratch:
            walk = walk_blocks(self.dense, self.blocks_BT, batch_size=_BATCH, scratch=Path(scratch))
            return {site.name: found.gram_II for site, found in walk if found is not None}

    @cached_property
    def input_norms(self) -> dict[str, Tensor]:
        """Norm over all tokens of each input of each site's output projection (I)."""
        dense = self.dense
        squares: dict[str, Tensor] = {}

        def record(name: str):  # type: ignore[no-untyped-def]
            def hook(module: object, inputs: tuple[Tensor, ...]) -> None:
                squares[name] = squares.get(name, 0) + inputs[0].float().square().sum((0, 1))

            return hook

        hooks = [
            dense.model.get_submodule(site.output).register_forward_pre_hook(record(site.name)) for site in dense.sites
        ]
        self._run()
        for hook in hooks:
            hook.remove()
        return {name: square_I.sqrt() for name, square_I in squares.items()}

    @cached_property
    def influence(self) -> list[float]:
        """Block influence of each layer: 1 - mean cosine of its input and output (arXiv 2403.03853)."""
        cosines: list[list[Tensor]] = [[] for _ in self.dense.model.model.layers]

        def record(layer: int):  # type: ignore[no-untyped-def]
            def hook(module: object, inputs: tuple[Tensor, ...], output_BTD: Tensor) -> None:
                cosines[layer].append(torch.cosine_similarity(inputs[0], output_BTD, dim=-1).flatten())

            return hook

        layers = self.dense.model.model.layers
        hooks = [layer.register_forward_hook(record(number)) for number, layer in enumerate(layers)]
        self._run()
        for hook in hooks:
            hook.remove()
        return [1 - torch.cat(found).mean().item() for found in cosines]

    @torch.no_grad()
    def _run(self) -> None:
        for batch_BT in self.blocks_BT.split(_BATCH):
            self.dense.model.model(batch_BT.to(self.dense.device, torch.long), use_cache=False)

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Gradient of the mean next-token loss, by parameter; in bfloat16 where the hardware is faster with it."""
        dense, dtype = self.dense, fast_dtype(self.dense.device)
        model = build_model(dense.config, dense.sites, dense.weights, {}, trainable=True)
        for block_BT in self.blocks_BT.split(1):
            ids_BT = block_BT.to(dense.device, torch.long)
            with torch.autocast(dense.device.type, dtype) if dtype != torch.float32 else nullcontext():
                loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            (loss / len(self.blocks_BT)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
