"""A GGUF file for llama.cpp, whose layers may differ in size as ours do.

Two of llama.cpp's architectures read heads and widths by layer in every place that matters: `deci` (the shape of Llama)
and `openelm` (with norms on queries and keys, and a head tied to the embeddings). Where such an architecture needs a
part that a layer lacks, a stub of zeros stands in, which adds exactly nothing; a layer that lacks both is left out.
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

from darwinlm.adapters.families import EMBEDDINGS, HEAD, LAYERS, rotary_embedding, window_of
from darwinlm.adapters.loading import expected_shapes
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.errors import UserError
from darwinlm.export.gguf_tokenizer import Vocabulary, write_vocabulary
from darwinlm.export.shapes import LayerShape, check_equal_groups, kept_layers, layer_shapes, read_biases

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
    biases, rope = read_biases(config, "llama.cpp"), config.rope_parameters
    chosen = OPENELM if biases.qk_norm else DECI
    if not config.tie_word_embeddings and not chosen.untied:
        raise UserError(
            f"llama.cpp cannot run a {config.model_type} model with a head of its own (tie_word_embeddings is "
            "false) whose layers differ in size: its one architecture with norms on queries and keys and sizes by "
            f"layer ({chosen.name}) takes the embeddings as head; export --to vllm, or prune with --set "
            "search.uniform=true, export --to hf-native and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if biases.names and not chosen.biases:
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, has no biases ({biases.names[0]})"
        )
    if config.hidden_act != "silu":
        raise UserError(f"llama.cpp's architecture {chosen.name} computes silu, the model {config.hidden_act}")
    if not _can_scale(rope, chosen):
        settings = ", ".join(f"{name} {value}" for name, value in rope.items() if name != "rope_theta")
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, cannot scale rope so: {settings}"
        )
    check_equal_groups(config, "llama.cpp")
    return chosen


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
    embeddings = weights[EMBEDDINGS]
    yield "token_embd.weight", embeddings
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", weights[HEAD]
    if architecture.rope_factors and config.rope_parameters["rope_type"] != "default":
        yield "rope_freqs.weight", _rope_factors(config).to(embeddings.device)
    for number, (index, shape) in enumerate(zip(kept_layers(config), file_shapes(config, architecture), strict=True)):
        prefix = f"{LAYERS}{index}."
        layer = {
            _rename(name.removeprefix(prefix)): tensor for name, tensor in weights.items() if name.startswith(prefix)
        }
        missing = _stub(config, architecture, shape, embeddings)
        layer |= {name: tensor for name, tensor in missing.items() if not _has_part(layer, name)}
        if architecture.interleaved:
            for name in layer:
                if re.fullmatch(r"attn_[qk]\.(weight|bias)", name):
                    layer[name] = _interleave(layer[name], config.head_dim)
        if architecture.fused:
            layer["attn_qkv.weight"] = torch.cat([layer.pop(name) for name in _FUSED])
        for name, tensor in layer.items():
            yield f"blk.{number}.{name}", tensor


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
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    attention = rotary_embedding(config).attention_scaling
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


def _can_scale(rope: Mapping[str, Any], architecture: Architecture) -> bool:
    if architecture.rope_factors:
        return rope["rope_type"] in ("default", "linear", "llama3", "yarn")
    # The keys for other settings of YaRN exist, but this architecture of llama.cpp does not read them.
    usual = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)) == (32, 1, True)
    return rope["rope_type"] in ("default", "linear") or (rope["rope_type"] == "yarn" and usual)


def _rope_factors(config: PrunedConfig) -> Tensor:
    """By what llama.cpp is to divide each of the head_dim / 2 frequencies, float32."""
    rotary = rotary_embedding(config)
    plain, _ = rotary.compute_default_rope_parameters(config)
    factors: Tensor = plain / rotary.inv_freq
    return factors


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
