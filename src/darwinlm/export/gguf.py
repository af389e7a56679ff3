"""A GGUF file for llama.cpp, whose layers may differ in size as ours do.

Two of llama.cpp's architectures read heads and widths by layer in every place that matters: `deci` (the shape of Llama)
and `openelm` (with norms on queries and keys, and a head tied to the embeddings). Where such an architecture needs a
part that a layer lacks, a stub of zeros stands in, which adds exactly nothing; a layer that lacks both is left out.
What such an architecture would have to multiply by (Granite's multipliers) is multiplied into the weights.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from darwinlm.adapters.families import EMBEDDINGS, HEAD, window_of
from darwinlm.adapters.loading import expected_shapes
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.errors import UserError
from darwinlm.export.form import STATIC_ROPE, Form, Rope, layer_tensors, read_form, read_rope
from darwinlm.export.gguf_tokenizer import Vocabulary, write_vocabulary
from darwinlm.export.shapes import LayerShape, check_equal_groups, kept_layers, layer_shapes

STUB_WIDTH = 32
"""Channels of an MLP that stands in: the smallest width that every quantisation can hold."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type` by what weight matrices are stored in; vectors are float32 always."""

_RENAMED = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = ("attn_q.weight", "attn_k.weight", "attn_v.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One of llama.cpp's, and what it asks for."""

    name: str
    rope_factors: bool
    """Whether it takes a factor for every frequency, and so any scaling of rope that does not depend on the length;
    else it knows linear scaling, and YaRN with its usual settings."""
    attention_everywhere: bool
    """Whether every layer needs attention; else only the first."""
    interleaved: bool
    """Whether rope turns neighbouring rows (2i, 2i + 1) of a head, where transformers turns (i, i + head_dim / 2)."""
    fused: bool
    """Whether queries, keys and values are one matrix."""
    biases: bool
    qk_norm: bool
    """Whether it has norms on queries and keys."""
    untied: bool
    """Whether it can hold an output head of its own."""


DECI = Architecture(
    name="deci",
    rope_factors=True,
    attention_everywhere=False,
    interleaved=True,
    fused=False,
    biases=True,
    qk_norm=False,
    untied=True,
)
OPENELM = Architecture(
    name="openelm",
    rope_factors=False,
    attention_everywhere=True,
    interleaved=False,
    fused=True,
    biases=False,
    qk_norm=True,
    untied=False,
)


def choose_architecture(config: PrunedConfig) -> Architecture:
    """The architecture for a model. Raises UserError where llama.cpp has none."""
    form = read_form(config, "llama.cpp")
    chosen = DECI if form.qk_norm == "none" else OPENELM
    lacks = {
        "norms of what attention and MLP add to the stream": form.norm_after,
        "norms over all heads at once": form.qk_norm == "all",
        "norms that multiply by 1 + their weight": form.norm_offset != 0,
        "a bound of logits": form.logit_softcap is not None,
    }
    for what, needed in lacks.items():
        if needed:
            raise UserError(
                f"llama.cpp cannot run a {config.model_type} model whose layers differ in size: its architectures that "
                f"read sizes by layer have no {what}; export --to vllm or mlx, or prune with --set search.uniform=true "
                "and export --to hf-native"
            )
    if not _tied(config, form) and not chosen.untied:
        raise UserError(
            f"llama.cpp cannot run a {config.model_type} model with a head of its own (tie_word_embeddings is "
            "false) whose layers differ in size: its one architecture with norms on queries and keys and sizes by "
            f"layer ({chosen.name}) takes the embeddings as head; export --to vllm, or prune with --set "
            "search.uniform=true, export --to hf-native and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if form.biases and not chosen.biases:
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, has no biases ({form.biases[0]})"
        )
    if form.activation != "silu":
        raise UserError(f"llama.cpp's architecture {chosen.name} computes silu, the model {form.activation}")
    rope = _rope(config)
    if not _can_scale(rope, chosen):
        settings = ", ".join(f"{name} {value}" for name, value in rope.settings.items() if name != "rope_theta")
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, cannot scale rope so: {settings}"
        )
    check_equal_groups(config, "llama.cpp")
    return chosen


def _tied(config: PrunedConfig, form: Form) -> bool:
    """Whether the file needs no head: it is the embeddings, and neither is multiplied by anything."""
    return bool(config.tie_word_embeddings) and form.embedding_scale == form.logit_scale == 1


def _rope(config: PrunedConfig) -> Rope:
    """The rope that all layers have. Raises UserError if some differ."""
    layers = [index for index in range(config.num_hidden_layers) if "attention" not in config.skipped(index)] or [0]
    found = {layer: read_rope(config, layer) for layer in layers}
    first = found[layers[0]]
    others = [layer for layer, rope in found.items() if rope != first or rope is None]
    if others or first is None:
        raise UserError(
            f"llama.cpp cannot run a {config.model_type} model whose layers differ in size: its architectures that "
            f"read sizes by layer turn queries and keys alike in all layers, and layer {others[0]} of the model does "
            "not; export --to vllm or mlx"
        )
    return first


def file_shapes(config: PrunedConfig, architecture: Architecture) -> list[LayerShape]:
    """The sizes of the layers in the file, stubs included."""
    shapes = layer_shapes(config)
    found = []
    for number, index in enumerate(kept_layers(config)):
        shape = shapes[index]
        stub = not shape.heads and (architecture.attention_everywhere or number == 0)
        heads, kv_heads = (1, 1) if stub else (shape.heads, shape.kv_heads)
        found.append(LayerShape(heads=heads, kv_heads=kv_heads, width=shape.width or STUB_WIDTH))
    return found


def context_length(config: PrunedConfig) -> int:
    """The positions for which the file is exact: llama.cpp's architectures see all of them, without sliding windows."""
    sliding = any(
        window_of(config, index) and "attention" not in config.skipped(index)
        for index in range(config.num_hidden_layers)
    )
    longest: int = config.max_position_embeddings
    return min(longest, config.sliding_window) if sliding else longest


def file_tensors(
    config: PrunedConfig, weights: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its name there, one at a time; meta tensors give meta tensors.

    Args:
        config: of the pruned model.
        weights: its state dict; of a tied head none is needed.
        architecture: that it is written for.
    """
    form, embeddings = read_form(config, "llama.cpp"), weights[EMBEDDINGS]
    yield "token_embd.weight", _times(embeddings, form.embedding_scale)
    yield "output_norm.weight", weights["model.norm.weight"]
    if not _tied(config, form):
        head = embeddings if config.tie_word_embeddings else weights[HEAD]
        yield "output.weight", _times(head, form.logit_scale)
    factors = _rope_factors(config) if architecture.rope_factors else None
    if factors is not None:
        yield "rope_freqs.weight", factors.to(embeddings.device)
    # A score is a product of queries and keys by head_dim ** -0.5 in llama.cpp.
    queries = "attn_q_norm" if architecture.qk_norm else "attn_q"
    scales = {queries: form.attention_scale * config.head_dim**0.5}
    scales |= dict.fromkeys(("attn_output", "ffn_down"), form.residual_scale)
    for number, (index, shape) in enumerate(zip(kept_layers(config), file_shapes(config, architecture), strict=True)):
        layer = {_rename(name): tensor for name, tensor in layer_tensors(config, weights, index).items()}
        missing = _stub(config, architecture, shape, embeddings)
        layer |= {name: tensor for name, tensor in missing.items() if not _has_part(layer, name)}
        for name in layer:
            layer[name] = _times(layer[name], scales.get(name.rpartition(".")[0], 1))
            if architecture.interleaved and re.fullmatch(r"attn_[qk]\.(weight|bias)", name):
                layer[name] = _interleave(layer[name], config.head_dim)
        if architecture.fused:
            layer["attn_qkv.weight"] = torch.cat([layer.pop(name) for name in _FUSED])
        for name, tensor in layer.items():
            yield f"blk.{number}.{name}", tensor


def _times(tensor: Tensor, scale: float) -> Tensor:
    """In float32 if anything changes: the product is rounded once, to what the file stores."""
    return tensor if math.isclose(scale, 1, rel_tol=1e-6) else tensor.float() * scale


def gguf_package() -> Any:
    """The package that writes such files. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("the export to GGUF needs the package gguf; run: pip install gguf") from None
    return gguf


def write_gguf(
    model: PrunedModel, vocabulary: Vocabulary, file: Path, dtype: str, name: str, architecture: Architecture
) -> None:
    """Write `model` to `file`.

    Args:
        model: the pruned model.
        vocabulary: its tokenizer.
        file: replaced, if it is there.
        dtype: of weight matrices, one of `FILE_TYPES`; where a row is no multiple of 32, q8_0 gives way to f16.
        name: of the model, for people.
        architecture: what `choose_architecture` says.

    Raises:
        UserError: if a weight does not fit into float16, or `gguf` is not installed.
    """
    gguf = gguf_package()
    config, weights = cast(PrunedConfig, model.config), model.state_dict()
    with contextlib.closing(gguf.GGUFWriter(file, architecture.name)) as writer:
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_sizes(config, architecture, writer)
        _write_rope(config, architecture, writer, gguf.RopeScalingType)
        write_vocabulary(vocabulary, writer)
        # Twice over the same tensors: a file begins with all names and shapes, which meta tensors tell.
        shapes = {key: torch.empty(shape, device="meta") for key, shape in expected_shapes(config).items()}
        for key, tensor in file_tensors(config, shapes, architecture):
            kind = _storage(tensor.shape, dtype, gguf)
            size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
            writer.add_tensor_info(key, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, tensor in file_tensors(config, weights, architecture):
            kind = _storage(tensor.shape, dtype, gguf)
            values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                raise UserError(f"{key} holds values beyond the range of float16; use --dtype bf16 or f32")
            writer.write_tensor_data(gguf.quantize(values, kind))


def _write_sizes(config: PrunedConfig, architecture: Architecture, writer: Any) -> None:
    shapes = file_shapes(config, architecture)
    writer.add_block_count(len(shapes))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([shape.width for shape in shapes])
    writer.add_head_count([shape.heads for shape in shapes])
    writer.add_head_count_kv([shape.kv_heads for shape in shapes])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_rope(config: PrunedConfig, architecture: Architecture, writer: Any, scaling: Any) -> None:
    found = _rope(config)
    rope, attention = found.settings, found.scaling
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if not architecture.rope_factors and rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(scaling.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if not architecture.rope_factors and rope["rope_type"] == "yarn":
        factor = rope["factor"] or config.max_position_embeddings / rope["original_max_position_embeddings"]
        writer.add_rope_scaling_type(scaling.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # This much llama.cpp's YaRN does by itself.
        attention /= 0.1 * math.log(max(factor, 1)) + 1
    if attention != 1:
        writer.add_rope_scaling_attn_factors(attention)


def _can_scale(rope: Rope, architecture: Architecture) -> bool:
    settings, partial = rope.settings, 0 in rope.turns
    kind = settings["rope_type"]
    if architecture.rope_factors:
        # What turned rows are multiplied by, llama.cpp would multiply all rows by.
        return kind in STATIC_ROPE and not (partial and rope.scaling != 1)
    # The keys for other settings of YaRN exist, but this architecture of llama.cpp does not read them.
    usual = (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1, settings.get("truncate", True))
    return not partial and (kind in ("default", "linear") or (kind == "yarn" and usual == (32, 1, True)))


def _rope_factors(config: PrunedConfig) -> Tensor | None:
    """By what llama.cpp is to divide each of the head_dim / 2 frequencies, float32; None if by nothing.

    A pair that is not to be turned gets a factor so large that it is turned by less than float32 can tell from 0.
    """
    rope = _rope(config)
    turns = torch.tensor(rope.turns)
    plain = 1 / rope.settings["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return None if torch.equal(plain, turns) else plain / turns.clamp_min(1e-30)


def _rename(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{_RENAMED[module]}.{kind}"


def _has_part(layer: Mapping[str, Tensor], name: str) -> bool:
    """Whether the layer has the part, attention or MLP, that the tensor `name` belongs to."""
    return f"{name.split('_')[0]}_norm.weight" in layer


def _stub(config: PrunedConfig, architecture: Architecture, shape: LayerShape, like: Tensor) -> dict[str, Tensor]:
    """A layer of zeros with norms of ones, of the parts that `shape` has."""
    hidden, queries, keys = config.hidden_size, shape.heads * config.head_dim, shape.kv_heads * config.head_dim
    sizes: dict[str, Sequence[int]] = {"ffn_norm": [hidden]}
    sizes |= {"ffn_gate": [shape.width, hidden], "ffn_up": [shape.width, hidden], "ffn_down": [hidden, shape.width]}
    if shape.heads:
        sizes |= {"attn_norm": [hidden], "attn_q": [queries, hidden], "attn_output": [hidden, queries]}
        sizes |= {"attn_k": [keys, hidden], "attn_v": [keys, hidden]}
        if architecture.qk_norm:
            sizes |= {"attn_q_norm": [config.head_dim], "attn_k_norm": [config.head_dim]}
    return {
        f"{name}.weight": torch.full(tuple(size), float(len(size) == 1), dtype=like.dtype, device=like.device)
        for name, size in sizes.items()
    }


def _interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of each head (i, i + head_dim / 2) as neighbours; `rows` are a projection's weight or bias."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _storage(shape: Sequence[int], dtype: str, gguf: Any) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if dtype == "q8_0" and shape[-1] % 32:
        return kinds.F16
    return kinds[dtype.upper()]
