"""Text to token blocks: documents from anywhere, packed into disjoint named splits."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from darwinlm.documents import Chat, documents_from, find_documents, in_batches, local_path
from darwinlm.errors import UserError
from darwinlm.files import read_tensors, write_bytes
from darwinlm.recipe import DataRecipe

SPLITS = ("held_out", "score", "calibration", "trial")
"""In filling order. `held_out` judges at the end and is read by nothing else."""

_FINGERPRINT_BYTES = 16
_BEGINS = 2**30
"""The bit that marks the first token of a piece."""
_JUDGED = "judged"
_MOST_CHARACTERS = 512 * 2**20
_HUB_CHARACTERS_PER_TOKEN = 12
"""Of a shuffled stream no more is read than this for each token needed; text has 3 to 5 of them."""


class Piece(NamedTuple):
    """Text that is tokenised as a whole."""

    text: str
    ends: bool
    """Whether its document ends here."""
    said: tuple[tuple[int, int], ...] | None = None
    """Of a chat: where in `text` the assistant speaks, first and behind the last character."""


@dataclass(frozen=True)
class Corpus:
    """Token blocks of every split; no token of the text is in two of them."""

    marked: Mapping[str, Tensor]
    """By split name: int32, blocks * sequence_length. The first token of a piece of text is `id + 2**30`; one that is
    read but not to be learnt is the complement (`~`, negative) of what it would be."""
    judged: frozenset[bytes] = frozenset()
    """Fingerprints of the pieces of text in the splits that judge, `held_out` and `score`."""

    @cached_property
    def blocks(self) -> Mapping[str, Tensor]:
        """The token ids of every split."""
        return {split: unmark(marked_BT)[0] for split, marked_BT in self.marked.items()}

    def tokens(self, split: str, count: int) -> Tensor:
        """The first blocks of `split` that hold `count` tokens; of a single block only as much as that (2 or more)."""
        blocks_BT = self.blocks[split]
        length = blocks_BT.shape[1]
        if count >= length:
            return blocks_BT[: -(-count // length)]
        return blocks_BT[:1, : max(2, count)]


def unmark(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, and labels for training: the same, but -100 where a token is not to be learnt."""
    ids = torch.where(marked < 0, ~marked, marked) & (_BEGINS - 1)
    return ids, ids.masked_fill(marked < 0, -100)


def positions(marked: Tensor) -> Tensor:
    """Of every token in its piece of text, counted from the piece's first token or, if that is earlier, the block's.

    Pieces are whole documents, or the parts of one that is longer than two blocks; these are not beside each other.
    """
    begins = (torch.where(marked < 0, ~marked, marked) & _BEGINS) != 0
    index = torch.arange(marked.shape[-1], device=marked.device).expand_as(marked)
    return index - (index * begins).cummax(-1).values


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
    taken: list[bytes] = []
    if local_path(recipe.source) is None:
        # A split ends with a whole piece, and what of that does not fit is lost.
        tokens = (sum(needed_blocks(recipe).values()) + len(SPLITS)) * recipe.sequence_length
        most = min(most, _HUB_CHARACTERS_PER_TOKEN * tokens)
    pieces = _pieces(documents, recipe, tokenizer, most, seed)

    def tokenised() -> Iterator[list[int]]:
        for batch in in_batches(pieces, 256):
            for piece, ids in zip(batch, _tokenise(batch, tokenizer), strict=True):
                taken.append(_fingerprint(piece.text))
                yield ids

    corpus, judging = _pack(tokenised(), recipe)
    return Corpus(corpus.marked, frozenset(taken[:judging]))


def pack(documents: Iterable[list[int]], recipe: DataRecipe) -> Corpus:
    """Concatenate tokenised documents (ids, marked as in `Corpus`) into the blocks of each split.

    No document reaches into two splits.

    Raises:
        UserError: if they are too few, with how many tokens there are and how many are needed.
    """
    return _pack(documents, recipe)[0]


def _pack(documents: Iterable[list[int]], recipe: DataRecipe) -> tuple[Corpus, int]:
    """The corpus, and how many documents the splits that judge have taken."""
    needed, length = needed_blocks(recipe), recipe.sequence_length
    filled: dict[str, Tensor] = {}
    total, judging, splits = 0, 0, iter(SPLITS)
    split, buffer = next(splits), list[int]()
    for tokens in documents:
        total += len(tokens)
        judging += split in ("held_out", "score")
        buffer += _begun(tokens)
        if len(buffer) >= needed[split] * length:
            kept = torch.tensor(buffer[: needed[split] * length], dtype=torch.int32)
            filled[split] = kept.view(needed[split], length)
            buffer = []
            following = next(splits, None)
            if following is None:
                return Corpus(filled), judging
            split = following
    parts = ", ".join(f"{name} {count * length:,}" for name, count in needed.items())
    raise UserError(
        f"data {recipe.source!r} holds {total:,} tokens, but the splits need {sum(needed.values()) * length:,} "
        f"({parts}) and share no document; give more text or lower data.*_tokens"
    )


def save_corpus(corpus: Corpus, file: Path) -> None:
    """Keep the token blocks, so that a resumed run needs neither the source nor the tokenizer."""
    tensors = {split: marked_BT.contiguous() for split, marked_BT in corpus.marked.items()}
    judged = torch.frombuffer(bytearray(b"".join(sorted(corpus.judged))), dtype=torch.uint8) if corpus.judged else None
    write_bytes(file, save(tensors | ({} if judged is None else {_JUDGED: judged})))


def load_corpus(file: Path) -> Corpus:
    """Read what `save_corpus` wrote. Raises UserError."""
    tensors = read_tensors(file)
    judged = bytes(tensors.pop(_JUDGED, torch.empty(0, dtype=torch.uint8)).tolist())
    starts = range(0, len(judged), _FINGERPRINT_BYTES)
    return Corpus(tensors, frozenset(judged[start : start + _FINGERPRINT_BYTES] for start in starts))


class TextStream:
    """Blocks from a source that is read as it is needed, again from its beginning when it ends.

    Documents come in the source's own order. What the splits that judge hold is left out.
    """

    def __init__(
        self,
        recipe: DataRecipe,
        tokenizer: Any,
        seed: int,
        judged: frozenset[bytes],
        begin: Mapping[str, Any] | None = None,
    ) -> None:
        """`begin` is a state that `blocks` has given: where the first blocks are to be had from."""
        self._recipe, self._tokenizer, self._seed, self._judged = recipe, tokenizer, seed, judged
        self._begin = begin

    def blocks(self, state: Mapping[str, Any] | None = None) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        """Yield each block (int32, tokens, marked as in `Corpus`) with the state that the next ones can be had from.

        A state is plain data but for `tokens`, a tensor or a list of token ids.

        Raises:
            UserError: if the source cannot be read, or there is nothing but what judges.
        """
        length, state = self._recipe.sequence_length, state or self._begin
        begin = None if state is None else state["place"]
        left_N = torch.tensor([] if state is None else state["tokens"], dtype=torch.int32)
        while True:
            empty = True
            for ids, place in self._tokens(begin):
                left_N = torch.cat([left_N, torch.tensor(ids, dtype=torch.int32)])
                while len(left_N) >= length:
                    empty = False
                    block_T, left_N = left_N[:length], left_N[length:]
                    yield block_T, {"place": place, "tokens": left_N}
            if empty and begin is None:
                raise UserError(
                    f"data {self._recipe.source!r} holds less than a block of {length} tokens beside what judges; give "
                    "more text, or set recovery.text=trial"
                )
            begin = None

    def _tokens(self, place: Any) -> Iterator[tuple[list[int], Any]]:
        """Tokens of some documents, and the place behind them; from `place` to the end of the source."""
        for documents, behind in documents_from(self._recipe, self._seed, place):
            pieces = [
                piece
                for document in documents
                for piece in _cut(document, self._recipe, self._tokenizer)
                if piece.text.strip() and _fingerprint(piece.text) not in self._judged
            ]
            if pieces:
                yield [token for ids in _tokenise(pieces, self._tokenizer) for token in _begun(ids)], behind


def _pieces(
    documents: Iterable[str | Chat], recipe: DataRecipe, tokenizer: Any, most: int, seed: int
) -> Iterator[Piece]:
    """Shuffled pieces of documents without repeats; documents are read until they hold `most` characters together."""
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
    """Pieces of at most so many characters as two blocks hold or so; a chat is one piece."""
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
    """The chat as the model's template writes it, and what of that the assistant says. Raises UserError."""
    where = f"data {recipe.source!r}"
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where} holds chats, but the model's tokenizer has no chat template; give text instead")

    def text(messages: Chat, opened: bool = False) -> str:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        return rendered

    try:
        whole, said = text(chat), []
        for number, message in enumerate(chat):
            if message["role"] == "assistant":
                before, after = text(chat[:number], opened=True), text(chat[: number + 1])
                if not (whole.startswith(after) and after.startswith(before)):
                    raise UserError(
                        f"{where} holds chats, and the model's chat template writes a message in another way when "
                        "others follow, so that the assistant's words cannot be told apart; give text instead"
                    )
                said.append((len(before), len(after)))
    except UserError:
        raise
    except Exception as error:  # templates are programs, and refuse chats in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} holds a chat that the model's chat template refuses: {reason}") from None
    return Piece(whole, True, tuple(said))


def _fingerprint(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_FINGERPRINT_BYTES).digest()


def _tokenise(pieces: Sequence[Piece], tokenizer: Any) -> list[list[int]]:
    """The token ids of each piece, marked as in `Corpus`; behind a text's last piece comes the end-of-text token."""
    end = tokenizer.eos_token_id
    plain = [piece for piece in pieces if piece.said is None]
    tokenised = iter(tokenizer([piece.text for piece in plain])["input_ids"] if plain else [])
    marked = []
    for piece in pieces:
        if piece.said is None:
            ids = next(tokenised)
            marked.append([*ids, end] if piece.ends and end is not None else ids)
        else:
            # The template has written what is special about beginning and end.
            encoded = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
            marked.append(
                [
                    token if any(first <= start < behind for first, behind in piece.said) else ~token
                    for token, (start, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                ]
            )
    return marked


def _begun(ids: list[int]) -> list[int]:
    """`ids` of a piece, marked but for that, with the mark of its beginning."""
    return [ids[0] ^ _BEGINS, *ids[1:]] if ids else ids
