"""Documents from text, JSON, CSV and Parquet files or the Hub; plain text or chats."""

import csv
import io
import json
import os
import random
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from darwinlm.config.recipe import DataRecipe
from darwinlm.errors import UserError
from darwinlm.runtime.progress import log

Chat = list[dict[str, str]]
"""A chat: messages with `role` and `content`."""

_TEXT, _JSON = (".txt", ".text", ".md", ".rst"), (".jsonl", ".ndjson", ".json")
_TABLES, _PARQUET = (".csv", ".tsv"), (".parquet",)
_KNOWN = (*_TEXT, *_JSON, *_TABLES, *_PARQUET)
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Supported compression formats of text, JSON and tables."""
_FEW = 100
"""Number of records without the field after which a file is rejected, if they are the majority."""
_MESSAGES = "messages"
_STREAM_BATCH = 64
"""Documents that are read and tokenized together when streaming."""
_Item = TypeVar("_Item")


def documents_from(recipe: DataRecipe, seed: int, place: Any) -> Iterator[tuple[list[str | Chat], Any]]:
    """Yield batches of documents with the position after them: a count for local text, otherwise the dataset's own
    state."""
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
    """Yield the documents of a local file or folder, or of a Hub dataset (`owner/name` or `owner/name:config`).

    A record is a chat if it has `messages` but no `text`, or if its `text_field` holds a list of messages.
    """
    path = local_path(source)
    if path is not None:
        return _local_documents(path, text_field, seed)
    if source.startswith((".", "/", "~")) or _kind(Path(source)) is not None:
        raise UserError(f"data {source!r}: no such file or folder")
    return _hub_documents(source, text_field, seed)


def local_path(source: str) -> Path | None:
    """Return `source` as a local path; None if it does not exist."""
    path = os.path.expanduser(source)
    return Path(path) if os.path.exists(path) else None


def _local_documents(path: Path, text_field: str, seed: int) -> Iterator[str | Chat]:
    known = f"{', '.join(_KNOWN)} (the first {len(_KNOWN) - 1} also as {', '.join(_PACKED)})"
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _kind(file) is not None and file.is_file())
    if not files:
        raise UserError(f"data {str(path)!r}: the folder contains no supported file; supported are {known}")
    if path.is_file() and _kind(path) is None:
        raise UserError(f"data {str(path)!r}: unsupported file type; supported are {known}")
    random.Random(seed).shuffle(files)
    for file in files:
        kind = _kind(file)
        try:
            if kind in _TEXT:
                with _opened(file) as content:
                    yield content.read().decode("utf-8-sig")
            elif kind in _PARQUET:
                yield from _parquet_documents(file, text_field)
            else:
                records = _table_records(file, kind) if kind in _TABLES else _json_records(file)
                yield from _texts_of(records, text_field, file)
        except UnicodeDecodeError as error:
            raise UserError(f"data {str(file)!r} is not UTF-8 text (byte {error.start}); convert it") from None
        except (OSError, EOFError) as error:
            raise UserError(f"data {str(file)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _kind(file: Path) -> str | None:
    """Return the suffix of the content type of `file`, ignoring compression; None if it is not supported."""
    suffixes = file.suffixes
    if len(suffixes) > 1 and suffixes[-1] in _PACKED and suffixes[-2] not in _PARQUET:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _KNOWN else None


def _opened(file: Path) -> BinaryIO:
    """Open `file`, decompressed."""
    if file.suffix not in _PACKED:
        return file.open("rb")
    import pyarrow

    content = pyarrow.input_stream(str(file), compression=_PACKED[file.suffix])
    return cast(BinaryIO, io.BufferedReader(content))


def _json_records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects in `file`, one per line or all in one list, each with its location for error messages."""
    name = f"data {str(file)!r}"
    with _opened(file) as lines:
        if _kind(file) == ".json" and (content := _list_in(lines, name)) is not None:
            for number, record in enumerate(content, 1):
                yield f"{name}, record {number}", _an_object(record, f"{name}, record {number}", "in the list")
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text; convert it") from None
            except (ValueError, RecursionError):
                raise UserError(f"{where}: not JSON; expected one object per line") from None
            yield where, _an_object(record, where, "per line")


def _an_object(record: Any, where: str, place: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected one object {place}, found {type(record).__name__}")
    return record


def _list_in(content: BinaryIO, name: str) -> list[Any] | None:
    """Return `content` parsed as a list; None, with nothing read, if it is not a list. Raises UserError starting with
    `name`."""
    start = cast(io.BufferedReader, content).peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return None
    try:
        found = json.loads(content.read().decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error}); expected a list of objects") from None
    return cast(list[Any], found)


def _table_records(file: Path, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a table with a header, each with its location for error messages."""
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_opened(file), encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
        try:
            for row in rows:
                yield f"data {str(file)!r}, line {rows.line_num}", row
        except csv.Error as error:
            raise UserError(f"data {str(file)!r}, line {rows.line_num}: not a valid table: {error}") from None


def _texts_of(records: Iterable[tuple[str, Mapping[str, Any]]], text_field: str, file: Path) -> Iterator[str | Chat]:
    """Yield the documents of `records`; records without the field are skipped and counted.

    Raises:
        UserError: if most records lack the field; the message gives the first of them.
    """
    found, without, first = 0, 0, None
    try:
        for where, record in records:
            field = _field_of(record, text_field)
            if field in record:
                found += 1
                yield _text_of(record, text_field, where)
                continue
            without += 1
            first = first or _lacks(field, record, where)
            if without >= _FEW and without > found:
                raise first
        if first is not None and without > found:
            raise first
    finally:
        if 0 < without <= found:
            log.warning(
                "data %r: %d of %d records have no %r: skipped", str(file), without, found + without, text_field
            )


def _text_of(record: Mapping[str, Any], text_field: str, where: str) -> str | Chat:
    """Return the document of `record`; null is an empty document. Raises UserError starting with `where`."""
    text_field = _field_of(record, text_field)
    text = record.get(text_field)
    if isinstance(text, str):
        return _whole_characters(text)
    if text_field not in record:
        raise _lacks(text_field, record, where)
    if text is None:
        return ""
    if not isinstance(text, list):
        raise UserError(f"{where}: {text_field!r} is not text but {type(text).__name__}; set data.text_field")
    for message in text:
        known = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not known:
            raise UserError(f"{where}: a chat must be a list of messages with text 'role' and 'content'")
    return [{key: _whole_characters(message[key]) for key in ("role", "content")} for message in text]


def _field_of(names: Container[str], text_field: str) -> str:
    return _MESSAGES if text_field == "text" and "text" not in names and _MESSAGES in names else text_field


def _whole_characters(text: str) -> str:
    """Replace unpaired surrogates, which JSON can contain (a truncated emoji) and tokenizers reject."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _lacks(text_field: str, names: Iterable[str], where: str) -> UserError:
    found = ", ".join(map(repr, names)) or "nothing"
    return UserError(f"{where}: no field {text_field!r} (found {found}); set data.text_field")


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
    except Exception as error:  # The Hub client raises many kinds of errors: connection, authorization, configuration.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data {source!r} is not a local file, and loading it as a Hub dataset failed: {reason}; check the "
            "name, or give a local file"
        ) from None


def in_batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    """Yield `items` in lists of `size`."""
    batch: list[_Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
