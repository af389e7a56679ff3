"""Gram matrices of every site's inputs, from one forward pass through the dense model, a block at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from darwinlm.adapters.families import Site
from darwinlm.adapters.loading import DenseModel
from darwinlm.errors import InvalidTensorError


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What calibration knows of a site."""

    gram_II: Tensor
    """X^T X / tokens over the inputs X of the site's output projection: float32, I = its columns."""
    residual_power: float
    """Median over tokens of the squared norm of the residual stream after the site. Not the mean: a few tokens with
    massive activations (the first of a text) would set it, and nearly every block would look free to remove."""


@torch.no_grad()
def walk_blocks(
    dense: DenseModel, tokens_BT: Tensor, *, batch_size: int, first_layer: int = 0
) -> Iterator[tuple[Site, SiteStatistics]]:
    """Yield each site with its statistics, in the model's order.

    The hidden states of all tokens go through one block at a time; the Gram matrices of a block and the inputs of the
    next come from the same pass. Every site sees the dense model's activations.

    Args:
        dense: the model; nothing in it is changed.
        tokens_BT: token ids without padding, blocks * tokens.
        batch_size: blocks in one pass.
        first_layer: earlier blocks are passed through without statistics (they are already in the database).

    Raises:
        InvalidTensorError: naming the site and the batch whose activations hold NaN or Inf.
    """
    model = dense.model.model
    batches = [batch.to(dense.device, torch.long) for batch in tokens_BT.split(batch_size)]
    hidden = [model.embed_tokens(batch) for batch in batches]
    positions = torch.arange(tokens_BT.shape[1], device=dense.device).unsqueeze(0)
    rotary = model.rotary_emb(hidden[0], positions)
    masks = [model.attention_masks(states, None, None, positions) for states in hidden]
    by_layer: dict[int, list[Site]] = {}
    for site in dense.sites:
        by_layer.setdefault(site.layer, []).append(site)

    for index, layer in enumerate(model.layers):
        sites = by_layer[index] if index >= first_layer else []
        with _Recorder(layer, sites) as recorder:
            for number, (states, mask) in enumerate(zip(hidden, masks, strict=True)):
                recorder.batch = number
                kind = dense.config.layer_types[index]
                hidden[number] = layer(
                    states, attention_mask=mask.get(kind), position_ids=positions, position_embeddings=rotary
                )
        for site in sites:
            yield site, recorder.statistics(site)


class _Recorder:
    """Hooks on one block that sum what its sites see."""

    def __init__(self, layer: nn.Module, sites: Sequence[Site]) -> None:
        self.batch = 0
        self._grams: dict[str, Tensor] = {}
        self._power: dict[str, list[Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._hooks = []
        for site in sites:
            module = layer.get_submodule(site.output.split(".", 3)[3])
            self._hooks.append(module.register_forward_pre_hook(self._record_inputs(site)))
        # The stream after attention is what the MLP's norm reads; after the MLP it is what the block returns.
        for site in sites:
            target = layer.get_submodule("post_attention_layernorm") if site.kind == "attention" else layer
            hook = self._record_power(site)
            if site.kind == "attention":
                self._hooks.append(target.register_forward_pre_hook(lambda _, inputs, hook=hook: hook(inputs[0])))
            else:
                self._hooks.append(target.register_forward_hook(lambda *args, hook=hook: hook(args[2])))

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def statistics(self, site: Site) -> SiteStatistics:
        tokens = self._tokens[site.name]
        power = torch.cat(self._power[site.name]).median().item()
        return SiteStatistics(self._grams[site.name] / tokens, power)

    def _record_inputs(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_NI = inputs[0].flatten(0, -2).float()
            gram_II = x_NI.T @ x_NI
            if not bool(torch.isfinite(gram_II).all()):
                raise InvalidTensorError(
                    f"{site.name}: its activations hold NaN or Inf in calibration batch {self.batch}; the checkpoint "
                    "is damaged or overflows in float32"
                )
            if site.name in self._grams:
                self._grams[site.name] += gram_II
            else:
                self._grams[site.name] = gram_II
            self._tokens[site.name] = self._tokens.get(site.name, 0) + len(x_NI)

        return hook

    def _record_power(self, site: Site):  # type: ignore[no-untyped-def]
        def hook(states: Tensor) -> None:
            self._power.setdefault(site.name, []).append(states.float().square().sum(-1).flatten())

        return hook
