"""Text to token blocks: documents from anywhere, packed into disjoint named splits."""

import hashlib
import json
import os
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
_HUB_CHARACTERS_PER_TOKEN = 12
"""Of a shuffled stream no more is read than this for each token needed; text has 3 to 5 of them."""


@dataclass(frozen=True)
class Corpus:
    """Token blocks of every split; no token of the text is in two of them."""

    blocks: Mapping[str, Tensor]
    """By split name: int32, blocks * sequence_length."""

    def tokens(self, split: str, count: int) -> Tensor:
        """The first blocks of `split` that hold `count` tokens; of a single block only as much as that (2 or more)."""
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
    documents, most = find_documents(recipe.source, recipe.text_field, seed), _MOST_CHARACTERS
    if _local(recipe.source) is None:
        # A split ends with a whole piece, and what of that does not fit is lost.
        tokens = (sum(needed_blocks(recipe).values()) + len(SPLITS)) * recipe.sequence_length
        most = min(most, _HUB_CHARACTERS_PER_TOKEN * tokens)
    pieces = _pieces(documents, 8 * recipe.sequence_length, most, seed)
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
        f"({parts}) and share no document; give more text or lower data.*_tokens"
    )


def save_corpus(corpus: Corpus, file: Path) -> None:
    """Keep the token blocks, so that a resumed run needs neither the source nor the tokenizer."""
    write_bytes(file, save({split: blocks_BT.contiguous() for split, blocks_BT in corpus.blocks.items()}))


def load_corpus(file: Path) -> Corpus:
    """Read what `save_corpus` wrote. Raises UserError."""
    return Corpus(read_tensors(file))


def find_documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    """Yield the documents of a local file or folder, or of a Hub data set (`owner/name` or `owner/name:config`)."""
    path = _local(source)
    if path is not None:
        return _local_documents(path, text_field, seed)
    if source.startswith((".", "/", "~")) or source.endswith((*_TEXT, *_JSON, *_PARQUET)):
        raise UserError(f"data {source!r}: no such file or folder")
    return _hub_documents(source, text_field, seed)


def _local(source: str) -> Path | None:
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else None


def _local_documents(path: Path, text_field: str, seed: int) -> Iterator[str]:
    known = (*_TEXT, *_JSON, *_PARQUET)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in known and file.is_file())
    if not files:
        raise UserError(f"data {str(path)!r}: the folder holds no {', '.join(known)} file")
    if path.is_file() and path.suffix not in known:
        raise UserError(f"data {str(path)!r}: unknown kind of file; known are {', '.join(known)}")
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            if file.suffix in _TEXT:
                yield file.read_text(encoding="utf-8-sig")
            elif file.suffix in _JSON:
                yield from _json_documents(file, text_field)
            else:
                yield from _parquet_documents(file, text_field)
        except UnicodeDecodeError as error:
            raise UserError(f"data {str(file)!r} is not UTF-8 text (byte {error.start}); convert it") from None
        except OSError as error:
            raise UserError(f"data {str(file)!r} cannot be read: {error.strerror or error}") from None


def _json_documents(file: Path, text_field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"data {str(file)!r}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text; convert it") from None
            except (ValueError, RecursionError):
                raise UserError(f"{where}: not JSON; one object a line is expected") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: one object a line is expected, this is a {type(record).__name__}")
            # JSON can hold halves of surrogate pairs (a cut emoji), which no tokenizer takes.
            yield _text_of(record, text_field, where).encode("utf-8", "replace").decode("utf-8")


def _text_of(record: Mapping[str, Any], text_field: str, where: str) -> str:
    """The document of `record`; a null is an empty one. Raises UserError that begins with `where`."""
    text = record.get(text_field)
    if isinstance(text, str):
        return text
    if text_field not in record:
        raise _lacks(text_field, record, where)
    if text is None:
        return ""
    raise UserError(f"{where}: {text_field!r} holds no text but {type(text).__name__}; set data.text_field")


def _lacks(text_field: str, names: Iterable[str], where: str) -> UserError:
    found = ", ".join(map(repr, names)) or "nothing"
    return UserError(f"{where}: there is no {text_field!r} (it has {found}); set data.text_field")


def _parquet_documents(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    where = f"data {str(file)!r}"
    try:
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise _lacks(text_field, table.schema_arrow.names, where)
        for batch in table.iter_batches(columns=[text_field]):
            yield from (_text_of({text_field: text}, text_field, where) for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read as a Parquet file: {reason}") from None


def _hub_documents(source: str, text_field: str, seed: int) -> Iterator[str]:
    import datasets

    name, _, config = source.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for record in stream.shuffle(seed=seed, buffer_size=10_000):
            yield _text_of(record, text_field, f"data {source!r}")
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many kinds: connection, authorisation, configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data {source!r} is no local file, and as a Hub data set it cannot be read: {reason}; check the name, or "
            "give a local file"
        ) from None


def _pieces(documents: Iterable[str], longest: int, most: int, seed: int) -> Iterator[tuple[str, bool]]:
    """Shuffled pieces of documents without repeats, each with whether its document ends there.

    A piece has at most `longest` characters. Documents are read until they hold `most` characters together.
    """
    pieces, seen, read = list[tuple[str, bool]](), set[bytes](), 0
    for document in documents:
        fingerprint = hashlib.blake2b(document.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not document.strip() or fingerprint in seen:
            continue
        seen.add(fingerprint)
        start = 0
        while len(document) - start > longest:
            middle = start + longest // 2
            space = document.rfind(" ", middle, start + longest)
            cut = space if space > 0 else start + longest
            pieces.append((document[start:cut], False))
            start = cut
        pieces.append((document[start:], True))
        read += len(document)
        if read >= most:
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
