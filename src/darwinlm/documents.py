"""Documents from anywhere: text files, JSON lines, Parquet, the Hub; plain text or chats."""

import json
import os
import random
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from darwinlm.errors import UserError
from darwinlm.recipe import DataRecipe

Chat = list[dict[str, str]]
"""Messages with `role` and `content`."""

_TEXT, _JSON, _PARQUET = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson", ".json"), (".parquet",)
_MESSAGES = "messages"
_STREAM_BATCH = 64
"""Documents that a stream reads and tokenises together."""
_Item = TypeVar("_Item")


def documents_from(recipe: DataRecipe, seed: int, place: Any) -> Iterator[tuple[list[str | Chat], Any]]:
    """Batches of documents, each with the place behind it: a count for local text, a data set's own state else."""
    if local_path(recipe.source) is not None:
        documents = find_documents(recipe.source, recipe.text_field, seed)
        done = place or 0
        for _ in range(done):
            next(documents, None)
        for batch in in_batches(documents, _STREAM_BATCH):
            done += len(batch)
            yield batch, done
        return
    with _naming_hub_faults(recipe.source):
        stream = _hub_stream(recipe.source)
        if place is not None:
            stream.load_state_dict(place)
        texts = (_text_of(record, recipe.text_field, f"data {recipe.source!r}") for record in stream)
        for batch in in_batches(texts, _STREAM_BATCH):
            yield batch, stream.state_dict()


def find_documents(source: str, text_field: str, seed: int) -> Iterator[str | Chat]:
    """Yield the documents of a local file or folder, or of a Hub data set (`owner/name` or `owner/name:config`).

    A record without `text` but with `messages` is a chat, and so is one whose `text_field` holds a list of messages.
    """
    path = local_path(source)
    if path is not None:
        return _local_documents(path, text_field, seed)
    if source.startswith((".", "/", "~")) or source.endswith((*_TEXT, *_JSON, *_PARQUET)):
        raise UserError(f"data {source!r}: no such file or folder")
    return _hub_documents(source, text_field, seed)


def local_path(source: str) -> Path | None:
    """Where `source` lies here; None if it does not."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else None


def _local_documents(path: Path, text_field: str, seed: int) -> Iterator[str | Chat]:
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


def _json_documents(file: Path, text_field: str) -> Iterator[str | Chat]:
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
            yield _text_of(record, text_field, where)


def _text_of(record: Mapping[str, Any], text_field: str, where: str) -> str | Chat:
    """The document of `record`; a null is an empty one. Raises UserError that begins with `where`."""
    text_field = _field_of(record, text_field)
    text = record.get(text_field)
    if isinstance(text, str):
        return _whole_characters(text)
    if text_field not in record:
        raise _lacks(text_field, record, where)
    if text is None:
        return ""
    if not isinstance(text, list):
        raise UserError(f"{where}: {text_field!r} holds no text but {type(text).__name__}; set data.text_field")
    for message in text:
        known = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not known:
            raise UserError(f"{where}: a chat is a list of messages with 'role' and 'content', both text")
    return [{key: _whole_characters(message[key]) for key in ("role", "content")} for message in text]


def _field_of(names: Container[str], text_field: str) -> str:
    return _MESSAGES if text_field == "text" and "text" not in names and _MESSAGES in names else text_field


def _whole_characters(text: str) -> str:
    """JSON can hold halves of surrogate pairs (a cut emoji), which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _lacks(text_field: str, names: Iterable[str], where: str) -> UserError:
    found = ", ".join(map(repr, names)) or "nothing"
    return UserError(f"{where}: there is no {text_field!r} (it has {found}); set data.text_field")


def _parquet_documents(file: Path, text_field: str) -> Iterator[str | Chat]:
    import pyarrow
    from pyarrow import parquet

    where = f"data {str(file)!r}"
    try:
        table = parquet.ParquetFile(file)
        text_field = _field_of(table.schema_arrow.names, text_field)
        if text_field not in table.schema_arrow.names:
            raise _lacks(text_field, table.schema_arrow.names, where)
        for batch in table.iter_batches(columns=[text_field]):
            yield from (_text_of({text_field: text}, text_field, where) for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} cannot be read as a Parquet file: {reason}") from None


def _hub_documents(source: str, text_field: str, seed: int) -> Iterator[str | Chat]:
    with _naming_hub_faults(source):
        for record in _hub_stream(source).shuffle(seed=seed, buffer_size=10_000):
            yield _text_of(record, text_field, f"data {source!r}")


def _hub_stream(source: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    return datasets.load_dataset(name, config or None, split="train", streaming=True)


@contextmanager
def _naming_hub_faults(source: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many kinds: connection, authorisation, configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data {source!r} is no local file, and as a Hub data set it cannot be read: {reason}; check the name, or "
            "give a local file"
        ) from None


def in_batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    """`items`, so many at a time."""
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
