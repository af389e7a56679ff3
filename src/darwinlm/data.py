"""Text to token blocks: documents from anywhere, packed into disjoint named splits."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from darwinlm.errors import UserError
from darwinlm.files import read_tensors, write_bytes
from darwinlm.recipe import DataRecipe

SPLITS = ("held_out", "score", "calibration", "trial")
"""In filling order. `held_out` judges at the end and is read by nothing else."""

_TEXT, _JSON, _PARQUET = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson", ".json"), (".parquet",)
_MOST_CHARACTERS = 512 * 2**20


@dataclass(frozen=True)
class Corpus:
    """Token blocks of every split; no token of the text is in two of them."""

    blocks: Mapping[str, Tensor]
    """By split name: int32, blocks * sequence_length."""

    def tokens(self, split: str, count: int) -> Tensor:
        """The first blocks of `split` that hold `count` tokens; the last block is cut short where it has more."""
        blocks_BT = self.blocks[split]
        length = blocks_BT.shape[1]
        if count >= length:
            return blocks_BT[: -(-count // length)]
        return blocks_BT[:1, : max(2, count)]


def needed_blocks(recipe: DataRecipe) -> dict[str, int]:
    """How many blocks each split gets."""
    return {split: recipe.blocks(getattr(recipe, f"{split}_tokens")) for split in SPLITS}


def read_corpus(recipe: DataRecipe, tokenizer: Any, seed: int) -> Corpus:
    """Read `recipe.source`, tokenise and pack it.

    Documents longer than two blocks are taken apart first and everything is shuffled, so that each token of the source
    is as likely to be used as any other, whether its document is short or long. Repeated documents count once.

    Raises:
        UserError: if the source is missing, unreadable or has too little text (with how much is there and needed).
    """
    pieces = _pieces(find_documents(recipe.source, recipe.text_field, seed), 8 * recipe.sequence_length, seed)
    end = tokenizer.eos_token_id

    def tokenised() -> Iterator[list[int]]:
        for batch in _batches(pieces, 256):
            for (_, ends), ids in zip(batch, tokenizer([text for text, _ in batch])["input_ids"], strict=True):
                yield [*ids, end] if ends and end is not None else ids

    return pack(tokenised(), recipe)


def pack(documents: Iterable[list[int]], recipe: DataRecipe) -> Corpus:
    """Concatenate tokenised documents into the blocks of each split; no document reaches into two splits.

    Raises:
        UserError: if they are too few, with how many tokens there are and how many are needed.
    """
    needed, length = needed_blocks(recipe), recipe.sequence_length
    filled: dict[str, Tensor] = {}
    total, splits = 0, iter(SPLITS)
    split, buffer = next(splits), list[int]()
    for tokens in documents:
        total += len(tokens)
        buffer += tokens
        if len(buffer) >= needed[split] * length:
            kept = torch.tensor(buffer[: needed[split] * length], dtype=torch.int32)
            filled[split] = kept.view(needed[split], length)
            buffer = []
            following = next(splits, None)
            if following is None:
                return Corpus(filled)
            split = following
    parts = ", ".join(f"{name} {count * length:,}" for name, count in needed.items())
    raise UserError(
        f"data {recipe.source!r} holds {total:,} tokens, but the splits need {sum(needed.values()) * length:,} "
        f"({parts}), each of whole documents; give more text or lower data.*_tokens"
    )


def save_corpus(corpus: Corpus, file: Path) -> None:
    """Keep the token blocks, so that a resumed run needs neither the source nor the tokenizer."""
    write_bytes(file, save({split: blocks_BT.contiguous() for split, blocks_BT in corpus.blocks.items()}))


def load_corpus(file: Path) -> Corpus:
    """Read what `save_corpus` wrote. Raises UserError."""
    return Corpus(read_tensors(file))


def find_documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    """Yield the documents of a local file or folder, or of a Hub data set (`owner/name` or `owner/name:config`)."""
    path = Path(source).expanduser()
    if path.exists():
        return _local_documents(path, text_field, seed)
    if source.startswith((".", "/", "~")) or path.suffix in (*_TEXT, *_JSON, *_PARQUET):
        raise UserError(f"data {source!r}: no such file or folder")
    return _hub_documents(source, text_field, seed)


def _local_documents(path: Path, text_field: str, seed: int) -> Iterator[str]:
    known = (*_TEXT, *_JSON, *_PARQUET)
    files = sorted(file for file in path.rglob("*") if file.suffix in known) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data {str(path)!r}: the folder holds no {', '.join(known)} file")
    if path.is_file() and path.suffix not in known:
        raise UserError(f"data {str(path)!r}: unknown kind of file; known are {', '.join(known)}")
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            if file.suffix in _TEXT:
                yield file.read_text(encoding="utf-8")
            elif file.suffix in _JSON:
                yield from _json_documents(file, text_field)
            else:
                yield from _parquet_documents(file, text_field)
        except UnicodeDecodeError as error:
            raise UserError(f"data {str(file)!r} is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise UserError(f"data {str(file)!r} cannot be read: {error.strerror or error}") from None


def _json_documents(file: Path, text_field: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                raise UserError(f"data {str(file)!r}, line {number}: not JSON; one object a line is expected") from None
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                keys = ", ".join(record) if isinstance(record, dict) else "no keys at all"
                raise UserError(
                    f"data {str(file)!r}, line {number}: no text under {text_field!r} (it has {keys}); "
                    "set data.text_field"
                )
            yield record[text_field]


def _parquet_documents(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"data {str(file)!r} is not a Parquet file: {str(error).splitlines()[0]}") from None
    if text_field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"data {str(file)!r}: no column {text_field!r} (it has {names}); set data.text_field")
    for batch in table.iter_batches(columns=[text_field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    import datasets

    name, _, config = source.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for record in stream.shuffle(seed=seed, buffer_size=10_000):
            if not isinstance(record.get(text_field), str):
                raise UserError(
                    f"data {source!r}: no text under {text_field!r} (it has {', '.join(record)}); set data.text_field"
                )
            yield record[text_field]
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many kinds: connection, authorisation, configuration
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data {source!r} is no local file, and as a Hub data set it cannot be read: {reason}"
        ) from None


def _pieces(documents: Iterable[str], most_characters: int, seed: int) -> Iterator[tuple[str, bool]]:
    """Shuffled pieces of documents without repeats, each with whether its document ends there."""
    pieces, seen, read = list[tuple[str, bool]](), set[bytes](), 0
    for document in documents:
        fingerprint = hashlib.blake2b(document.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not document.strip() or fingerprint in seen:
            continue
        seen.add(fingerprint)
        start = 0
        while len(document) - start > most_characters:
            middle = start + most_characters // 2
            space = document.rfind(" ", middle, start + most_characters)
            cut = space if space > 0 else start + most_characters
            pieces.append((document[start:cut], False))
            start = cut
        pieces.append((document[start:], True))
        read += len(document)
        if read > _MOST_CHARACTERS:
            break
    random.Random(seed).shuffle(pieces)
    return iter(pieces)


def _batches(items: Iterator[tuple[str, bool]], size: int) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
