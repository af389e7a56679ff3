"""Text to token blocks: documents from any source, packed into disjoint named splits."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from darwinlm.config.recipe import DataRecipe
from darwinlm.data import former_corpus
from darwinlm.data.documents import Chat, documents_from, find_documents, in_batches, local_path
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError
from darwinlm.runtime.files import damaged, read_metadata, read_tensors, write_bytes

SPLITS = ("test", "validation", "calibration", "train")
"""Splits in the order in which they are filled. `test` is used only for the final evaluation."""

FORMAT = 2
"""Version of `corpus.safetensors`; files of version 1 carry no number."""
_FORMAT_KEY = "format"
_FINGERPRINT_BYTES = 16
_RESERVED_KEY = "evaluation.fingerprints"
_MOST_CHARACTERS = 512 * 2**20
_HUB_CHARACTERS_PER_TOKEN = 12
"""Characters read from a shuffled stream per token needed; text has 3 to 5 characters per token."""


class Piece(NamedTuple):
    """Text that is tokenized as a whole."""

    text: str
    ends: bool
    """Whether its document ends here."""
    assistant_spans: tuple[tuple[int, int], ...] | None = None
    """Character spans [start, end) of the assistant's turns in `text`; None if the piece is not a chat."""


@dataclass(frozen=True)
class Corpus:
    """Token blocks of every split; splits share no text."""

    splits: Mapping[str, Tokens]
    """Tokens by split name, (blocks, sequence_length)."""
    reserved: frozenset[bytes] = frozenset()
    """Fingerprints of the pieces of text in the evaluation splits, `test` and `validation`."""


def needed_blocks(recipe: DataRecipe) -> dict[str, int]:
    """Return the number of blocks of each split."""
    return {split: recipe.blocks(getattr(recipe, f"{split}_tokens")) for split in SPLITS}


def read_corpus(recipe: DataRecipe, tokenizer: Any, seed: int) -> Corpus:
    """Read, tokenize and pack `recipe.source`.

    Documents longer than two blocks are split first and all pieces are shuffled, so that each token of the source is
    equally likely to be used, whether its document is short or long. Duplicate documents are used once.

    Raises:
        UserError: if the source is missing, unreadable or too short; the message gives the available and needed tokens.
    """
    documents, most = find_documents(recipe.source, recipe.text_field, seed), _MOST_CHARACTERS
    taken: list[bytes] = []
    if local_path(recipe.source) is None:
        # A split ends with a whole piece; the part that does not fit is discarded.
        tokens = (sum(needed_blocks(recipe).values()) + len(SPLITS)) * recipe.sequence_length
        most = min(most, _HUB_CHARACTERS_PER_TOKEN * tokens)
    pieces = _pieces(documents, recipe, tokenizer, most, seed)

    def tokenized() -> Iterator[Tokens]:
        for batch in in_batches(pieces, 256):
            for piece, document in zip(batch, _tokenize(batch, tokenizer), strict=True):
                taken.append(_fingerprint(piece.text))
                yield document

    corpus, reserved = _pack(tokenized(), recipe)
    return Corpus(corpus.splits, frozenset(taken[:reserved]))


def pack(documents: Iterable[Tokens], recipe: DataRecipe) -> Corpus:
    """Concatenate tokenized documents into the blocks of each split.

    No document is used in two splits.

    Raises:
        UserError: if there are too few tokens; the message gives the available and needed tokens.
    """
    return _pack(documents, recipe)[0]


def _pack(documents: Iterable[Tokens], recipe: DataRecipe) -> tuple[Corpus, int]:
    """Return the corpus, and the number of documents used by the evaluation splits."""
    needed, length = needed_blocks(recipe), recipe.sequence_length
    filled: dict[str, Tokens] = {}
    total, reserved, splits = 0, 0, iter(SPLITS)
    split, buffer, buffered = next(splits), list[Tokens](), 0
    for document in documents:
        total += len(document)
        reserved += split in ("test", "validation")
        buffer.append(document)
        buffered += len(document)
        if buffered >= needed[split] * length:
            filled[split] = Tokens.cat(buffer)[: needed[split] * length].view(needed[split], length)
            buffer, buffered = [], 0
            following = next(splits, None)
            if following is None:
                return Corpus(filled), reserved
            split = following
    parts = ", ".join(f"{name} {count * length:,}" for name, count in needed.items())
    raise UserError(
        f"data {recipe.source!r} has {total:,} tokens, but the splits need {sum(needed.values()) * length:,} "
        f"({parts}) and share no document; provide more text or lower data.*_tokens"
    )


def save_corpus(corpus: Corpus, file: Path, *, former: bool = False) -> None:
    """Write the token blocks, so that a resumed run needs neither the source nor the tokenizer; with `former`, as
    versions 0.1 and 0.2 did."""
    others: dict[str, Tensor] = {}
    if corpus.reserved:
        reserved = bytearray(b"".join(sorted(corpus.reserved)))
        others[_RESERVED_KEY] = torch.frombuffer(reserved, dtype=torch.uint8)
    if former:
        write_bytes(file, save(former_corpus.to_packed(corpus.splits, others)))
        return
    for split, tokens in corpus.splits.items():
        others |= tokens.columns(f"{split}.")
    write_bytes(file, save(others, {_FORMAT_KEY: str(FORMAT)}))


def load_corpus(file: Path) -> Corpus:
    """Read the token blocks of a run.

    Args:
        file: `corpus.safetensors` in a run directory.

    Returns:
        The blocks of every split.

    Raises:
        UserError: if it is missing or damaged, or this version cannot read it.
    """
    tensors, number = read_tensors(file), read_metadata(file).get(_FORMAT_KEY)
    if number is None:
        tensors = former_corpus.to_columns(tensors)
    elif number != str(FORMAT):
        raise UserError(
            f"{file} is of format {number}, but this version reads formats up to {FORMAT}; use the version that wrote "
            "it, or start the run again in a new folder"
        )
    reserved = bytes(tensors.pop(_RESERVED_KEY, torch.empty(0, dtype=torch.uint8)).tolist())
    starts = range(0, len(reserved), _FINGERPRINT_BYTES)
    names = dict.fromkeys(name.partition(".")[0] for name in tensors)
    try:
        splits = {split: Tokens.from_columns(tensors, f"{split}.") for split in names}
    except KeyError as error:
        raise damaged(file, f"{error} is missing") from None
    return Corpus(splits, frozenset(reserved[start : start + _FINGERPRINT_BYTES] for start in starts))


class TextStream:
    """Blocks streamed from a source, which is read again from its beginning when it ends.

    Documents come in the order of the source. Text of the evaluation splits is skipped.
    """

    def __init__(
        self,
        recipe: DataRecipe,
        tokenizer: Any,
        seed: int,
        reserved: frozenset[bytes],
        begin: Mapping[str, Any] | None = None,
    ) -> None:
        """Create the stream; `begin` is a state yielded by `blocks`, from which the first blocks continue."""
        self._recipe, self._tokenizer, self._seed, self._reserved = recipe, tokenizer, seed, reserved
        self._begin = begin

    def blocks(self, state: Mapping[str, Any] | None = None) -> Iterator[tuple[Tokens, Mapping[str, Any]]]:
        """Yield each block, (sequence_length,), with the state to continue after it.

        A state is plain data except for `tokens`, which may also be given as plain data (`Tokens.to_json`).

        Raises:
            UserError: if the source cannot be read, or holds less than a block beyond the evaluation splits.
        """
        length, state = self._recipe.sequence_length, state or self._begin
        begin = None if state is None else state["place"]
        left = Tokens.document([]) if state is None else _tokens_of(state["tokens"])
        while True:
            empty = True
            for documents, place in self._documents(begin):
                left = Tokens.cat([left, *documents])
                while len(left) >= length:
                    empty = False
                    block, left = left[:length], left[length:]
                    yield block, {"place": place, "tokens": left}
            if empty and begin is None:
                raise UserError(
                    f"data {self._recipe.source!r} has less than a block of {length} tokens beyond the "
                    "evaluation splits; provide more text, or set recovery.text=train"
                )
            begin = None

    def _documents(self, place: Any) -> Iterator[tuple[list[Tokens], Any]]:
        """Yield some tokenized documents and the position after them, from `place` to the end of the source."""
        for documents, behind in documents_from(self._recipe, self._seed, place):
            pieces = [
                piece
                for document in documents
                for piece in _cut(document, self._recipe, self._tokenizer)
                if piece.text.strip() and _fingerprint(piece.text) not in self._reserved
            ]
            if pieces:
                yield _tokenize(pieces, self._tokenizer), behind


def _tokens_of(saved: Any) -> Tokens:
    """Return the tokens in the state of a stream."""
    if isinstance(saved, Tokens):
        return saved
    if isinstance(saved, list):  # Versions 0.1 and 0.2 wrote packed tokens.
        return former_corpus.unpack(torch.tensor(saved, dtype=torch.int32))
    return Tokens.from_columns(saved)


def _pieces(
    documents: Iterable[str | Chat], recipe: DataRecipe, tokenizer: Any, most: int, seed: int
) -> Iterator[Piece]:
    """Return shuffled pieces of unique documents, reading until they hold `most` characters in total."""
    pieces, seen, read = list[Piece](), set[bytes](), 0
    for document in documents:
        cut = list(_cut(document, recipe, tokenizer))
        text = "".join(piece.text for piece in cut)
        fingerprint = _fingerprint(text.strip())
        if not text.strip() or fingerprint in seen:
            continue
        seen.add(fingerprint)
        pieces += cut
        read += len(text)
        if read >= most:
            break
    random.Random(seed).shuffle(pieces)
    return iter(pieces)


def _cut(document: str | Chat, recipe: DataRecipe, tokenizer: Any) -> Iterator[Piece]:
    """Yield pieces of at most about two blocks of characters; a chat is one piece."""
    if not isinstance(document, str):
        yield _render(document, recipe, tokenizer)
        return
    longest, start = 8 * recipe.sequence_length, 0
    while len(document) - start > longest:
        middle = start + longest // 2
        space = document.rfind(" ", middle, start + longest)
        end = space if space > 0 else start + longest
        yield Piece(document[start:end], False)
        start = end
    yield Piece(document[start:], True)


def _render(chat: Chat, recipe: DataRecipe, tokenizer: Any) -> Piece:
    """Render a chat with the model's template and find the assistant's turns. Raises UserError."""
    where = f"data {recipe.source!r}"
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} contains chats, but the model's tokenizer has no chat template; provide plain text instead"
        )

    def text(messages: Chat, opened: bool = False) -> str:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        return rendered

    try:
        whole, spans = text(chat), []
        for number, message in enumerate(chat):
            if message["role"] == "assistant":
                before, after = text(chat[:number], opened=True), text(chat[: number + 1])
                if not (whole.startswith(after) and after.startswith(before)):
                    raise UserError(
                        f"{where} contains chats, and the model's chat template renders a message differently "
                        "when others follow, so the assistant's turns cannot be located; provide plain text "
                        "instead"
                    )
                spans.append((len(before), len(after)))
    except UserError:
        raise
    except Exception as error:  # Templates are programs and reject chats with many kinds of errors.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} contains a chat that the model's chat template rejects: {reason}") from None
    return Piece(whole, True, tuple(spans))


def _fingerprint(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_FINGERPRINT_BYTES).digest()


def _tokenize(pieces: Sequence[Piece], tokenizer: Any) -> list[Tokens]:
    """Return each piece as a document; the end-of-text token follows the last piece of a text."""
    end = tokenizer.eos_token_id
    plain = [piece for piece in pieces if piece.assistant_spans is None]
    tokenized = iter(tokenizer([piece.text for piece in plain])["input_ids"] if plain else [])
    documents = []
    for piece in pieces:
        if piece.assistant_spans is None:
            ids = next(tokenized)
            documents.append(Tokens.document([*ids, end] if piece.ends and end is not None else ids))
        else:
            # The template has already written the special tokens.
            encoded = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
            loss_mask = [
                any(first <= start < behind for first, behind in piece.assistant_spans)
                for start, _ in encoded["offset_mapping"]
            ]
            documents.append(Tokens.document(encoded["input_ids"], loss_mask))
    return documents
