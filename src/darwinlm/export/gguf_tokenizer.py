"""Conversion of Hugging Face tokenizers to llama.cpp: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

llama.cpp only supports a fixed set of pre-tokenizers, by name (`tokenizer.ggml.pre`), so the pre-tokenizer must be one
of them; it is identified from the tokenizer itself. llama.cpp does no Unicode normalization: a tokenizer with NFC gives
other ids there for text that is not normalized.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from darwinlm.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_BYTES, _GPT2 = "bytes", "bytes, words of GPT-2"
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_WORDS + r"|\p{N}{1,3}" + _REST, _BYTES), True): "llama-bpe",
    ((_WORDS + r"|\p{N}{1,3}" + _REST, _BYTES), False): "smaug-bpe",
    ((_WORDS + r"|\p{N}" + _REST, _BYTES), False): "qwen2",
    ((_CASED + r"|\p{N}" + _REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1), _BYTES), True): "tekken",
}
"""llama.cpp's name by the steps of a byte-level pre-tokenizer, and whether vocabulary words skip the merges."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NO_MERGE = "ÿ ÿ"
"""A merge that never applies (a byte invalid in UTF-8): llama.cpp rejects a vocabulary without merges."""
_NO_SCORE = -1e6
"""Score of a SentencePiece token that no merge produces."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Content of the `tokenizer.*` keys of a GGUF file."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    """Merges, only for `gpt2`."""
    scores: Sequence[float]
    """Scores, only for `llama`."""
    special: Mapping[str, int]
    """Ids of `bos`, `eos`, `unk` and `pad`, if they exist."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Transformers raises many kinds of errors.
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def read_vocabulary(tokenizer: Any, size: int, folder: Path) -> Vocabulary:
    """Convert the vocabulary of `tokenizer`.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: rows of the embeddings; ids that the tokenizer does not use get placeholders.
        folder: named in error messages.

    Raises:
        UserError: if llama.cpp does not support the tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{folder}: its tokenizer has no tokenizer.json, which the export needs; save it as a fast tokenizer"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"{folder}: its tokenizer type {model['type']} is not supported; export to GGUF needs BPE")
    if len(tokenizer) > size:
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, but there are only {size} embeddings")
    tokens, types = _tokens(tokenizer, model, size)
    begins, ends = _added_ends(tokenizer, folder)
    template = tokenizer.chat_template
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bytewise = not model.get("byte_fallback")
    return Vocabulary(
        model="gpt2" if bytewise else "llama",
        pre=_pre(described, folder) if bytewise else "default",
        tokens=tokens,
        types=types,
        merges=(merges or [_NO_MERGE]) if bytewise else [],
        scores=[] if bytewise else _scores(tokens, merges),
        special={
            name: id_
            for name in ("bos", "eos", "unk", "pad")
            if (id_ := getattr(tokenizer, f"{name}_token_id")) is not None
        },
        add_bos=begins,
        add_eos=ends,
        add_space_prefix=not bytewise and tokenizer.tokenize("a")[0].startswith("▁"),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def write_vocabulary(vocabulary: Vocabulary, writer: Any) -> None:
    """Add the `tokenizer.*` keys to `writer`, a GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    for name, id_ in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(id_)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _pre(described: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer. Raises UserError."""
    steps = tuple(_steps(described["pre_tokenizer"]))
    pre = PRE_TOKENIZERS.get((steps, bool(described["model"].get("ignore_merges"))))
    if pre is None:
        raise UserError(
            f"{folder}: its pre-tokenizer is not supported by the export to GGUF "
            f"({' then '.join(steps) or 'none'}); supported are those of "
            f"{', '.join(sorted(PRE_TOKENIZERS.values()))}"
        )
    return pre


def _tokens(tokenizer: Any, model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for token, id_ in model["vocab"].items():
        byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[id_], types[id_] = token, _BYTE if byte else _NORMAL
    for id_, added in tokenizer.added_tokens_decoder.items():
        tokens[id_], types[id_] = added.content, _CONTROL if added.special else _USER_DEFINED
    if model.get("byte_fallback") and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = _UNKNOWN
    return tokens, types


def _added_ends(tokenizer: Any, folder: Path) -> tuple[bool, bool]:
    """Whether the tokenizer adds beginning- and end-of-text tokens. Raises UserError."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise UserError(
        f"{folder}: its tokenizer adds more than beginning- and end-of-text tokens, which llama.cpp does not support"
    )


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return SentencePiece scores that make llama.cpp apply `merges` in order: earlier merges score higher."""
    made = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
    return [made.get(token, _NO_SCORE) for token in tokens]


def _steps(described: Mapping[str, Any] | None) -> list[str]:
    """Return the steps of a pre-tokenizer in the terms of `PRE_TOKENIZERS`."""
    if described is None:
        return []
    kind = described["type"]
    if kind == "Sequence":
        return [step for part in described["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not described["add_prefix_space"]:
        return [_GPT2 if described["use_regex"] else _BYTES]
    if kind == "Digits" and described["individual_digits"]:
        return ["digits"]
    if kind == "Split" and described["behavior"] == "Isolated" and not described["invert"]:
        return [str(described["pattern"].get("Regex", described["pattern"]))]
    return [f"{kind} {json.dumps({name: value for name, value in described.items() if name != 'type'})}"]
