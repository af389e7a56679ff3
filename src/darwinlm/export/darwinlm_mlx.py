# Copyright the DarwinLM authors. Licensed under the Apache License, Version 2.0.
"""A pruned model in MLX, for mlx-lm, which runs this file because of the key `model_file` in `config.json`.

It is part of the exported folder and only needs mlx and mlx-lm. Sizes are in `per_layer_config` of `config.json`;
tensors have Llama's names, whatever the family. A removed part has no tensors, and a layer without attention no cache.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: str
    norm_before: bool
    norm_after: bool
    norm_offset: float
    activation: str
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    layer_types: list
    ropes: list
    layer_ropes: list
    logit_softcap: float | None = None
    sliding_window: int | None = None
    per_layer_config: dict | None = None

    def __post_init__(self):
        self.per_layer_config = {int(layer): sizes for layer, sizes in (self.per_layer_config or {}).items()}

    def size(self, layer, name):
        return self.per_layer_config.get(layer, {}).get(name, getattr(self, name))

    def has(self, layer, part):
        return part not in self.per_layer_config.get(layer, {}).get("skip", ())


class RMSNorm(nn.Module):
    def __init__(self, args, size):
        super().__init__()
        self.weight = mx.ones((size,))
        self.offset, self.eps = args.norm_offset, args.rms_norm_eps

    def __call__(self, x):
        return mx.fast.rms_norm(x, self.weight + self.offset if self.offset else self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.heads = args.size(layer, "num_attention_heads")
        self.kv_heads = args.size(layer, "num_key_value_heads")
        self.head_dim, self.scale = args.head_dim, args.attention_scale
        rope = args.layer_ropes[layer]
        self._periods = None if rope is None else mx.array(args.ropes[rope]["periods"])
        self.rope_scaling = 1 if rope is None else args.ropes[rope]["scaling"]
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(args.hidden_size, queries, bias=args.qkv_bias)
        self.k_proj = nn.Linear(args.hidden_size, keys, bias=args.qkv_bias)
        self.v_proj = nn.Linear(args.hidden_size, keys, bias=args.qkv_bias)
        self.o_proj = nn.Linear(queries, args.hidden_size, bias=args.attention_output_bias)
        self.norm_heads = args.qk_norm == "head"
        if args.qk_norm != "none":
            self.q_norm = RMSNorm(args, self.head_dim if self.norm_heads else queries)
            self.k_norm = RMSNorm(args, self.head_dim if self.norm_heads else keys)

    def rope(self, x, offset):
        if self._periods is None:
            return x
        turned = mx.fast.rope(
            x, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )
        return turned if self.rope_scaling == 1 else turned * self.rope_scaling

    def __call__(self, x, mask=None, cache=None):
        batch, length, _ = x.shape
        queries, keys = self.q_proj(x), self.k_proj(x)
        if "q_norm" in self and not self.norm_heads:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = queries.reshape(batch, length, self.heads, -1)
        keys = keys.reshape(batch, length, self.kv_heads, -1)
        values = self.v_proj(x).reshape(batch, length, self.kv_heads, -1).transpose(0, 2, 1, 3)
        if "q_norm" in self and self.norm_heads:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        offset = 0 if cache is None else cache.offset
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset)
        keys = self.rope(keys.transpose(0, 2, 1, 3), offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        width = args.size(layer, "intermediate_size")
        self.activation = nn.silu if args.activation == "silu" else nn.gelu_approx
        self.gate_proj = nn.Linear(args.hidden_size, width, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.hidden_size, width, bias=args.mlp_bias)
        self.down_proj = nn.Linear(width, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.window = args.sliding_window if args.layer_types[layer] == "sliding_attention" else None
        self.residual_scale = args.residual_scale
        if args.has(layer, "attention"):
            self.self_attn = Attention(args, layer)
            if args.norm_before:
                self.input_layernorm = RMSNorm(args, args.hidden_size)
            if args.norm_after:
                self.attention_output_norm = RMSNorm(args, args.hidden_size)
        if args.has(layer, "mlp"):
            self.mlp = MLP(args, layer)
            if args.norm_before:
                self.post_attention_layernorm = RMSNorm(args, args.hidden_size)
            if args.norm_after:
                self.mlp_output_norm = RMSNorm(args, args.hidden_size)

    def norm(self, name, x):
        return self[name](x) if name in self else x

    def add(self, x, output):
        return x + (output if self.residual_scale == 1 else output * self.residual_scale)

    def __call__(self, x, mask=None, cache=None):
        if "self_attn" in self:
            output = self.self_attn(self.norm("input_layernorm", x), mask, cache)
            x = self.add(x, self.norm("attention_output_norm", output))
        if "mlp" in self:
            output = self.mlp(self.norm("post_attention_layernorm", x))
            x = self.add(x, self.norm("mlp_output_norm", output))
        return x


class DarwinLMModel(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args, args.hidden_size)
        self.embedding_scale = args.embedding_scale

    def __call__(self, inputs, cache=None, input_embeddings=None):
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        x = x if self.embedding_scale == 1 else x * self.embedding_scale
        attending = [layer for layer in self.layers if "self_attn" in layer]
        caches = iter(cache or [None] * len(attending))
        masks = {}
        for layer in self.layers:
            own = next(caches) if "self_attn" in layer else None
            if "self_attn" in layer and layer.window not in masks:
                # Created by the first cache of its kind, before that is filled.
                masks[layer.window] = create_attention_mask(x, own, window_size=layer.window)
            x = layer(x, masks.get(layer.window), own)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = DarwinLMModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None, input_embeddings=None):
        x = self.model(inputs, cache, input_embeddings)
        x = self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)
        x = x if self.args.logit_scale == 1 else x * self.args.logit_scale
        bound = self.args.logit_softcap
        return x if bound is None else mx.tanh(x / bound) * bound

    def sanitize(self, weights):
        return {k: v for k, v in weights.items() if not (self.args.tie_word_embeddings and k == "lm_head.weight")}

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        attending = [layer for layer in self.layers if "self_attn" in layer]
        return [RotatingKVCache(max_size=layer.window) if layer.window else KVCache() for layer in attending]
