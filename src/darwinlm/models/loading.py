"""Loading of a checkpoint into a model of transformers' own layers, as a whole or one layer at a time."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
)

from darwinlm.errors import UserError
from darwinlm.models.balance import asked_balance
from darwinlm.models.checkpoint import Checkpoint
from darwinlm.models.config import load_config, load_settings, reason_of, text_type
from darwinlm.models.cutting import (
    Cut,
    build_model,
    count_parameters,
    cut_site,
    empty_model,
    fill,
    fill_layer,
    output_columns,
    pruned_config,
    sizes_by_layer,
)
from darwinlm.models.families import HEAD, LAYERS, dense_again, dense_config, empty_layer
from darwinlm.models.heads import Head
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.sites import ExpertUnit, Granularity, Site, find_sites
from darwinlm.models.streaming import stream_layers
from darwinlm.runtime.files import digest
from darwinlm.runtime.progress import log

_COMPARED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """A checkpoint to prune: as a whole (`model`, loaded on first access) or one layer at a time.

    It may already be pruned; then the remaining model is the `dense` model of all later stages.
    """

    source: str
    checkpoint: Checkpoint
    config: PrunedConfig
    sites: tuple[Site, ...]
    tokenizer: Any
    generation_config: GenerationConfig
    device: torch.device
    dtype: torch.dtype
    """Dtype of the checkpoint, in which the pruned model is saved."""
    fingerprint: str
    """Fingerprint of config and weights, which differs between checkpoints."""
    offload: bool = False
    """Whether layers are streamed through the device one at a time: this model's from its files, those of candidates
    from CPU memory."""
    balance: float = 0.0
    """Coefficient of the experts' load-balancing loss; 0 if the checkpoint does not enable it."""
    sites_before: tuple[Site, ...] = ()
    """Sites of the original model; empty unless this model was already pruned."""
    cut_from: "DenseModel | None" = None
    """Original model of a gradual run, in its later steps."""

    @property
    def reference(self) -> "DenseModel":
        """Model that candidates are compared with and distilled from: the original model of a gradual run, otherwise
        this one."""
        return self.cut_from or self

    @property
    def model(self) -> PrunedModel:
        """The whole model on the device, in `compute_dtype`; loaded on first access."""
        if not self.offload:
            self.loaded.to(self.device)
        return self.loaded

    @cached_property
    def loaded(self) -> PrunedModel:
        """The loaded model for access to embeddings, last norm and head; its layers may be offloaded."""
        if not self.offload:
            return self.load(self.device, self.compute_dtype)
        layers = [name for name in self.shapes if name.startswith(LAYERS)]
        others = [name for name in self.shapes if not name.startswith(LAYERS)]
        tensors = self.checkpoint.read(others, self.device, self.compute_dtype)
        tensors |= self.checkpoint.map(layers)
        return stream_layers(fill(empty_model(self.config), tensors), self.device, self.compute_dtype)

    def offload_layers(self) -> None:
        """Move the layers to CPU memory, also those of the reference, until `model` is accessed again."""
        for dense in (self, self.reference):
            if not dense.offload:
                dense.loaded.model.layers.to("cpu")

    def load(self, device: torch.device, dtype: torch.dtype) -> PrunedModel:
        """Load the whole model again from its checkpoint."""
        return fill(empty_model(self.config), self.checkpoint.read(self.shapes, device, dtype))

    def mapped(self, dtype: torch.dtype) -> PrunedModel:
        """Load the whole model on the CPU, memory-mapped where files are in `dtype`; it must not be modified."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.checkpoint.map(self.shapes).items()}
        return fill(empty_model(self.config), tensors)

    def release(self) -> None:
        """Drop `model`, also that of the reference, to free its memory; it is loaded again on the next access."""
        for dense in (self, self.reference):
            dense.__dict__.pop("loaded", None)

    @property
    def layers_device(self) -> torch.device:
        """Device of the layers of `model`."""
        return torch.device("cpu") if self.offload else self.device

    def cut(
        self,
        cuts: Mapping[str, Cut],
        *,
        trainable: bool = False,
        shared_ends: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> PrunedModel:
        """Call `build_model` on this model, with layers on the same device as this model's; `cuts` must be there
        already."""
        model = build_model(
            self.config, self.sites, self.weights, cuts, trainable=trainable, shared_ends=shared_ends, dtype=dtype,
            layers_on=self.layers_device,
        )  # fmt: skip
        return stream_layers(model, self.device) if self.offload else model

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state dict of `model`, with offloaded layers on the CPU, without a tied head."""
        state: dict[str, Tensor] = self.loaded.state_dict()
        if self.config.tie_word_embeddings:
            state.pop(HEAD, None)
        return state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, without a tied head."""
        return expected_shapes(self.config)

    @property
    def fixed_parameters(self) -> int:
        """Number of parameters outside all sites: embeddings, head, last norm."""
        in_sites = sum(count_parameters(site, self.shapes, range(site.num_units)) for site in self.sites)
        return self.parameters - in_sites

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the loaded model: the checkpoint's on an accelerator, otherwise float32."""
        return self.dtype if self.device.type == "cuda" else torch.float32

    def block(self, layer: int) -> nn.Module:
        """Load one decoder layer from the checkpoint onto the device, in `compute_dtype`."""
        names = [name for name in self.shapes if name.startswith(f"{LAYERS}{layer}.")]
        return fill_layer(self.config, layer, self.checkpoint.read(names, self.device, self.compute_dtype))

    def embedding_model(self) -> PrunedModel:
        """Load the model without the weights of its layers and head, on the CPU, in `compute_dtype`."""
        names = [name for name in self.shapes if not name.startswith((LAYERS, "lm_head."))]
        read = self.checkpoint.read(names, torch.device("cpu"), self.compute_dtype)
        return fill(empty_model(self.config), read, strict=False)

    @property
    def head(self) -> Head:
        """LM head of `model`."""
        return Head.of(self.loaded)


def expected_shapes(config: PrunedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of a model, without allocating one; without a tied head."""
    state = empty_model(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(HEAD)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def choose_device(name: str) -> torch.device:
    """Return the device of a recipe; `auto` uses CUDA, then MPS, then the CPU. Raises UserError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the hardware multiplies it faster than float32, otherwise float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        fast = device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return torch.bfloat16 if fast else torch.float32


def served_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to run a checkpoint of `dtype` in on `device`: its own, or float32 if the hardware only emulates
    its half precision."""
    emulated = dtype == torch.bfloat16 and device.type in ("cpu", "cuda") and fast_dtype(device) != torch.bfloat16
    return torch.float32 if emulated or (dtype == torch.float16 and device.type == "cpu") else dtype


@torch.no_grad()
def load_dense(
    source: str,
    granularity: Granularity,
    device: torch.device,
    cut_from: DenseModel | None = None,
    *,
    expert_unit: ExpertUnit = "whole",
) -> DenseModel:
    """Load a checkpoint (safetensors only, no remote code).

    Args:
        source: folder or Hub model id; a model pruned by this package can be pruned further.
        granularity: attention unit.
        device: device to work on.
        cut_from: model to compare with and distill from, if it is another one.
        expert_unit: unit of a mixture of experts: an expert, or a channel of each.

    Returns:
        The model with its sites, config and tokenizer.

    Raises:
        UserError: if it cannot be loaded, weights are missing, or its head is not supported.
        InvalidTensorError: if a weight contains NaN or Inf; the message names the first one.
    """
    base_config, dense = open_dense(source, granularity, device, expert_unit)
    settings = {
        key: value
        for key, value in base_config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype")
    }
    if cut_from is None and text_type(load_settings(source)) != load_settings(source)["model_type"]:
        log.info("model %r is multimodal: only its text model is pruned, and the result only takes text", source)
    weights = dense.checkpoint.fingerprint(dense.shapes)
    _check_head(dense)
    fingerprint = digest(json.dumps(settings, sort_keys=True, default=str), weights)
    return replace(dense, fingerprint=fingerprint, cut_from=cut_from)


def open_dense(
    source: str, granularity: Granularity, device: torch.device, expert_unit: ExpertUnit = "whole"
) -> tuple[Any, DenseModel]:
    """Return the transformers config and the dense model, without reading or checking weights. Raises UserError."""
    base_config = load_config(source)
    try:
        # Without it, the tokenizer loader would warn about the unknown type of a pruned model's config.
        known = {"config": base_config} if isinstance(base_config, PrunedConfig) else {}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **known)
    except Exception as error:
        raise UserError(f"model {source!r}: its tokenizer cannot be loaded: {reason_of(error, source)}") from None
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    for name in templates:  # Each template becomes a file of the pruned model.
        if not re.fullmatch(r"[\w.-]+", str(name)) or str(name).startswith("."):
            raise UserError(
                f"model {source!r}: its tokenizer has a chat template named {name!r}, which is not a valid file "
                "name; rename it"
            )
    checkpoint = Checkpoint(source)
    try:
        config = dense_config(base_config)
        shapes = expected_shapes(config)
        sites = find_sites(config, granularity, expert_unit)
    except UserError as error:
        raise UserError(f"model {source!r}: {error}") from None
    except Exception as error:
        raise UserError(
            f"model {source!r}: no model can be built from its config.json: {reason_of(error, source)}"
        ) from None
    if not sites:
        raise UserError(f"model {source!r} has no attention or MLP left to prune")
    checkpoint.check_names(shapes)
    _check_cuts(config, sites, shapes, source)
    dense = DenseModel(
        source=source,
        checkpoint=checkpoint,
        config=config,
        sites=sites,
        tokenizer=tokenizer,
        generation_config=_generation_config(base_config, source),
        device=device,
        dtype=base_config.dtype if isinstance(base_config.dtype, torch.dtype) else torch.float32,
        fingerprint="",
        balance=asked_balance(base_config),
        sites_before=find_sites(dense_again(config), granularity, expert_unit) if config.is_heterogeneous else (),
    )
    return base_config, dense


def some_layers(config: Any, layers: Sequence[int]) -> Any:
    """Return the config of a model that consists of these `layers` of another one, in this order."""
    shortened = copy.deepcopy(config)
    if isinstance(config, PrunedConfig):
        sizes = sizes_by_layer(config)
        shortened.per_layer_config = None
    shortened.num_hidden_layers = len(layers)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(shortened, name, None):
            setattr(shortened, name, [getattr(config, name)[layer] for layer in layers])
    if isinstance(config, PrunedConfig):
        kept = {number: sizes[layer] for number, layer in enumerate(layers) if layer in sizes}
        shortened.per_layer_config = kept or None
    return shortened


def _check_cuts(
    config: PrunedConfig, sites: Sequence[Site], shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Cut one site of each kind on the meta device and check that transformers' layers of that size have the same
    shapes."""
    for site in {site.kind: site for site in sites}.values():
        weights = {name: torch.empty(shapes[name], device="meta") for name in site.tensors}
        kept = tuple(range(site.routed if site.of_experts else 1))
        cut = Cut(kept=kept, output_weight=output_columns(site, weights[site.output_tensor], kept))
        layer = empty_layer(pruned_config(config, sites, {site.name: cut}), site.layer).state_dict()
        for name, tensor in cut_site(site, weights, cut).items():
            built = layer.get(name.removeprefix(f"{LAYERS}{site.layer}."))
            if built is None or built.shape != tensor.shape:
                raise UserError(
                    f"model {source!r}: {site.name} with fewer units cannot be built by transformers ({name} "
                    f"has shape {list(tensor.shape)}, expected "
                    f"{built if built is None else list(built.shape)}); its config.json has a setting that is "
                    "not supported yet"
                )


def _check_head(dense: DenseModel) -> None:
    """Compare the logits of the first layer's model with those of `Head`."""
    config = some_layers(dense.config, [0])
    weights = dense.checkpoint.some_layers([0]).read(expected_shapes(config), torch.device("cpu"), torch.float32)
    model = fill(empty_model(config), weights)
    tokens = torch.arange(_COMPARED_TOKENS).unsqueeze(0) % config.vocab_size
    expected = model(tokens, use_cache=False).logits[0]
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0]
    difference = (expected - Head.of(model).logits(hidden)).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference < 1e-4:
        raise UserError(
            f"model {dense.source!r}: its LM head is not supported yet (relative error of its logits: {difference:.1e})"
        )


def _generation_config(base_config: Any, source: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_model_config(base_config)
    except Exception as error:
        raise UserError(
            f"model {source!r}: its generation_config.json cannot be used: {reason_of(error, source)}"
        ) from None
