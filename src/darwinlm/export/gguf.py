"""GGUF files for llama.cpp with layers of different sizes.

Two of llama.cpp's architectures read heads and widths per layer everywhere: `deci` (like Llama) and `openelm` (with
norms on queries and keys, and a head tied to the embeddings). Where such an architecture needs a part that a layer does
not have, a stub of zeros is written, which adds exactly nothing; a layer without both parts is omitted. Factors that
the architecture does not support (Granite's multipliers) are multiplied into the weights.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from darwinlm.config.exports import installed
from darwinlm.engines import llama_cpp
from darwinlm.engines.quantize import K_QUANTS, quantize, quantizer
from darwinlm.errors import UserError
from darwinlm.export.engine import STORED_AS, Engine, Export
from darwinlm.export.form import STATIC_ROPE, Form, Rope, layer_tensors, read_form, read_rope
from darwinlm.export.gguf_tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from darwinlm.export.proof import LATIN, TEXT, ProofError
from darwinlm.export.shapes import LayerShape, check_equal_groups, kept_layers, layer_shapes
from darwinlm.models.families import EMBEDDINGS, HEAD, window_of
from darwinlm.models.loading import DenseModel, expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel

STUB_WIDTH = 32
"""Channels of a stub MLP: the smallest width that every quantization supports."""

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type` by the type of weight matrices; vectors are always float32."""

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
    """One of llama.cpp's architectures, and its requirements."""

    name: str
    rope_factors: bool
    """Whether it supports a factor per frequency, and so any rope scaling that does not depend on the length; otherwise
    it supports linear scaling, and YaRN with its default settings."""
    attention_everywhere: bool
    """Whether every layer needs attention; otherwise only the first."""
    interleaved: bool
    """Whether rope rotates neighboring rows (2i, 2i + 1) of a head, where transformers rotates (i, i + head_dim / 2).
    """
    fused: bool
    """Whether queries, keys and values are one matrix."""
    biases: bool
    qk_norm: bool
    """Whether it has norms on queries and keys."""
    untied: bool
    """Whether it supports an output head that is not tied to the embeddings."""


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
    """Return the architecture for a model. Raises UserError if llama.cpp has none."""
    form = read_form(config, "llama.cpp")
    chosen = DECI if form.qk_norm == "none" else OPENELM
    lacks = {
        "norms of the outputs of attention and MLP": form.norm_after,
        "norms over all heads at once": form.qk_norm == "all",
        "norms that multiply by 1 + their weight": form.norm_offset != 0,
        "logit softcap": form.logit_softcap is not None,
    }
    for what, needed in lacks.items():
        if needed:
            raise UserError(
                f"llama.cpp cannot run a {config.model_type} model whose layers differ in size: its "
                f"architectures with sizes per layer have no {what}; export --to vllm or mlx, or prune with "
                "--set search.uniform=true and export --to hf-native"
            )
    if not _tied(config, form) and not chosen.untied:
        raise UserError(
            f"llama.cpp cannot run a {config.model_type} model with an untied head (tie_word_embeddings is "
            "false) whose layers differ in size: its only architecture with norms on queries and keys and "
            f"sizes per layer ({chosen.name}) uses the embeddings as head; export --to vllm, or prune with "
            "--set search.uniform=true, export --to hf-native and convert that folder with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    if form.biases and not chosen.biases:
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, does not support biases "
            f"({form.biases[0]})"
        )
    if form.activation != "silu":
        raise UserError(f"llama.cpp's architecture {chosen.name} uses silu, but the model uses {form.activation}")
    rope = _rope(config)
    if not _can_scale(rope, chosen):
        settings = ", ".join(f"{name} {value}" for name, value in rope.settings.items() if name != "rope_theta")
        raise UserError(
            f"llama.cpp's architecture {chosen.name}, the one for this model, does not support this rope "
            f"scaling: {settings}"
        )
    check_equal_groups(config, "llama.cpp")
    return chosen


def _tied(config: PrunedConfig, form: Form) -> bool:
    """Whether the file needs no head, because it equals the embeddings and neither is scaled."""
    return bool(config.tie_word_embeddings) and form.embedding_scale == form.logit_scale == 1


def _rope(config: PrunedConfig) -> Rope:
    """Return the rope that all layers share. Raises UserError if some differ."""
    layers = [index for index in range(config.num_hidden_layers) if "attention" not in config.skipped(index)] or [0]
    found = {layer: read_rope(config, layer) for layer in layers}
    first = found[layers[0]]
    others = [layer for layer, rope in found.items() if rope != first or rope is None]
    if others or first is None:
        raise UserError(
            f"llama.cpp cannot run a {config.model_type} model whose layers differ in size: its architectures "
            f"with sizes per layer use the same rope in all layers, and layer {others[0]} of the model differs; "
            "export --to vllm or mlx"
        )
    return first


def file_shapes(config: PrunedConfig, architecture: Architecture) -> list[LayerShape]:
    """Return the sizes of the layers in the file, including stubs."""
    shapes = layer_shapes(config)
    found = []
    for number, index in enumerate(kept_layers(config)):
        shape = shapes[index]
        stub = not shape.heads and (architecture.attention_everywhere or number == 0)
        heads, kv_heads = (1, 1) if stub else (shape.heads, shape.kv_heads)
        found.append(LayerShape(heads=heads, kv_heads=kv_heads, width=shape.width or STUB_WIDTH))
    return found


def context_length(config: PrunedConfig) -> int:
    """Return the number of positions for which the file is exact: these architectures have no sliding windows."""
    sliding = any(
        window_of(config, index) and "attention" not in config.skipped(index)
        for index in range(config.num_hidden_layers)
    )
    longest: int = config.max_position_embeddings
    return min(longest, config.sliding_window) if sliding else longest


def file_tensors(
    config: PrunedConfig, weights: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file with its name there, one at a time; meta tensors give meta tensors.

    Args:
        config: config of the pruned model.
        weights: its state dict; a tied head may be missing.
        architecture: architecture of the file.
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
    # llama.cpp scales query-key products by head_dim ** -0.5.
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
    """Scale a tensor in float32, so that the product is only rounded once, to the file's type."""
    return tensor if math.isclose(scale, 1, rel_tol=1e-6) else tensor.float() * scale


def gguf_package() -> Any:
    """Import the `gguf` package. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("export to GGUF needs the gguf package; run: pip install gguf") from None
    return gguf


def write_gguf(
    model: PrunedModel, vocabulary: Vocabulary, file: Path, dtype: str, name: str, architecture: Architecture
) -> None:
    """Write `model` to `file`.

    Args:
        model: the pruned model.
        vocabulary: its tokenizer.
        file: output file, replaced if it exists.
        dtype: type of weight matrices, one of `FILE_TYPES`; q8_0 falls back to f16 if rows are not multiples of 32.
        name: name of the model, for display.
        architecture: result of `choose_architecture`.

    Raises:
        UserError: if a weight exceeds the range of float16, or `gguf` is not installed.
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
        # Twice over the same tensors: a file starts with all names and shapes, which meta tensors provide.
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
                raise UserError(f"{key} contains values beyond the range of float16; use --dtype bf16 or f32")
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
        # llama.cpp's YaRN applies this factor itself.
        attention /= 0.1 * math.log(max(factor, 1)) + 1
    if attention != 1:
        writer.add_rope_scaling_attn_factors(attention)


def _can_scale(rope: Rope, architecture: Architecture) -> bool:
    settings, partial = rope.settings, 0 in rope.turns
    kind = settings["rope_type"]
    if architecture.rope_factors:
        # llama.cpp would apply the factor of rotated rows to all rows.
        return kind in STATIC_ROPE and not (partial and rope.scaling != 1)
    # This architecture of llama.cpp ignores the keys for other YaRN settings.
    usual = (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1, settings.get("truncate", True))
    return not partial and (kind in ("default", "linear") or (kind == "yarn" and usual == (32, 1, True)))


def _rope_factors(config: PrunedConfig) -> Tensor | None:
    """Return the divisors of the head_dim / 2 frequencies in llama.cpp, float32; None if all are 1.

    Pairs that are not rotated get a divisor so large that their angle is 0 in float32.
    """
    rope = _rope(config)
    turns = torch.tensor(rope.turns)
    plain = 1 / rope.settings["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return None if torch.equal(plain, turns) else plain / turns.clamp_min(1e-30)


def _rename(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{_RENAMED[module]}.{kind}"


def _has_part(layer: Mapping[str, Tensor], name: str) -> bool:
    """Whether the layer has the part (attention or MLP) of the tensor `name`."""
    return f"{name.split('_')[0]}_norm.weight" in layer


def _stub(config: PrunedConfig, architecture: Architecture, shape: LayerShape, like: Tensor) -> dict[str, Tensor]:
    """Create a layer of zeros with norms of ones, with the parts of `shape`."""
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
    """Interleave the rows (i, i + head_dim / 2) of each head; `rows` is a projection's weight or bias."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _storage(shape: Sequence[int], dtype: str, gguf: Any) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if dtype == "q8_0" and shape[-1] % 32:
        return kinds.F16
    return kinds[dtype.upper()]


def _check(model: Export | DenseModel) -> None:
    gguf_package()
    choose_architecture(model.config)
    read_vocabulary(model.tokenizer, model.config.vocab_size, Path(model.source))


def _check_export(export: Export) -> None:
    if export.requested_dtype in K_QUANTS:
        quantizer()


def _write(export: Export, file: Path) -> dict[str, Any]:
    model, config, name = export.model, export.config, Path(file.stem).stem
    architecture = choose_architecture(config)
    vocabulary = read_vocabulary(export.tokenizer, config.vocab_size, export.source)
    if export.dtype in K_QUANTS:
        whole = file.with_name(f"{file.name}.whole")
        try:
            # In the stored dtype of the weights, so that nothing is rounded twice.
            write_gguf(model, vocabulary, whole, STORED_AS[model.dtype], name, architecture)
            quantize(whole, file, export.dtype)
        finally:
            whole.unlink(missing_ok=True)
    else:
        write_gguf(model, vocabulary, file, export.dtype, name, architecture)
    if context_length(config) < config.max_position_embeddings:
        export.notes.append(
            "llama.cpp has no sliding windows in this architecture: the file supports "
            f"{context_length(config):,} positions (the window) instead of {config.max_position_embeddings:,}"
        )
    return {"architecture": architecture.name, "dtype": export.dtype}


def _logits(export: Export, file: Path, tokens: Sequence[int]) -> np.ndarray:
    """Run the file in llama.cpp. Raises ProofError if it tokenizes text differently."""
    answer, tokenizer = llama_cpp.ask(file, tokens, [TEXT, LATIN]), export.tokenizer
    for text, found in zip((LATIN, TEXT), reversed(answer.token_ids), strict=True):
        if found != tokenizer(text).input_ids:
            difference = _first_difference(tokenizer, text, found)
            message = f"{installed(llama_cpp.PACKAGE)} tokenizes some text differently: {difference}"
            if text == LATIN:
                raise ProofError(f"{message}; export discarded")
            export.notes.insert(0, message)
    return answer.logits_TV


def _first_difference(tokenizer: Any, text: str, found: list[int]) -> str:
    expected = tokenizer(text).input_ids
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False)))
    pieces = [tokenizer.convert_ids_to_tokens(ids[same : same + 4]) for ids in (found, expected)]
    return f"after {tokenizer.decode(expected[:same])[-20:]!r} {pieces[0]} instead of {pieces[1]}"


ENGINE = Engine(
    name="gguf",
    suffix="-{export.dtype}.gguf",
    magic=b"GGUF",
    # Only float32 has no rounding, to which strongly pruned models are sensitive.
    dtypes={"f32": 1e-3, "f16": 0.05, "q8_0": 0.5, "bf16": 0.2, **dict.fromkeys(K_QUANTS, 0.5)},
    kept_sites=frozenset({"layers.0.attention"}),
    check=_check,
    check_export=_check_export,
    write=_write,
    logits=_logits,
    packages=(llama_cpp.PACKAGE,),
    positions=context_length,
)
