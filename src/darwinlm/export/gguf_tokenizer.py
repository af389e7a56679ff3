"""A Hugging Face tokenizer in llama.cpp's terms: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

llama.cpp knows the ways of splitting text before BPE by name (`tokenizer.ggml.pre`) and has no other, so the way that a
tokenizer splits must be one of those; it is read from the tokenizer itself. Unicode normalisation is not llama.cpp's: a
tokenizer with NFC gives other ids there for text that is not in that form.
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
"""llama.cpp's name by the steps of a byte-level pre-tokenizer, and whether words in the vocabulary skip the merges."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NO_MERGE = "ÿ ÿ"
"""A merge of a byte that UTF-8 does not have: llama.cpp refuses a vocabulary without any."""
_NO_SCORE = -1e6
"""Of a SentencePiece token that no merge makes."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What the `tokenizer.*` keys of a GGUF file say."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    """Of `gpt2` alone."""
    scores: Sequence[float]
    """Of `llama` alone."""
    special: Mapping[str, int]
    """Ids of `bos`, `eos`, `unk` and `pad`, as far as there are any."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def read_vocabulary(tokenizer: Any, size: int, folder: Path) -> Vocabulary:
    """The vocabulary of `tokenizer`.

    Args:
        tokenizer: a fast tokenizer of transformers.
        size: rows of the embeddings; ids that the tokenizer does not use get placeholders.
        folder: named in errors.

    Raises:
        UserError: if llama.cpp has no such tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{folder}: its tokenizer has no tokenizer.json, which the export reads; save it as a fast one")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise UserError(f"{folder}: its tokenizer is of kind {model['type']}; the export to GGUF knows BPE only")
    if len(tokenizer) > size:
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its embeddings hold {size}")
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
    """llama.cpp's name for the way in which a byte-level tokenizer splits text. Raises UserError."""
    steps = tuple(_steps(described["pre_tokenizer"]))
    pre = PRE_TOKENIZERS.get((steps, bool(described["model"].get("ignore_merges"))))
    if pre is None:
        raise UserError(
            f"{folder}: its tokenizer splits text in a way that the export to GGUF does not know "
            f"({' then '.join(steps) or 'not at all'}); known are those of {', '.join(sorted(PRE_TOKENIZERS.values()))}"
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
    """Whether the tokenizer puts its beginning and its end of text around what it reads. Raises UserError."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise UserError(f"{folder}: its tokenizer adds more than a beginning and an end of text, which llama.cpp cannot")


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """SentencePiece scores that make llama.cpp merge in the order of `merges`: the earlier, the higher."""
    made = {merge.replace(" ", "", 1): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
    return [made.get(token, _NO_SCORE) for token in tokens]


def _steps(described: Mapping[str, Any] | None) -> list[str]:
    """A pre-tokenizer, step by step, in the words of `PRE_TOKENIZERS`."""
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
