"""Tests of documents from files of every supported type."""

import bz2
import csv
import gzip
import io
import json

import pyarrow
import pytest
from pyarrow import parquet

from darwinlm.data.documents import find_documents
from darwinlm.errors import UserError


def write_lines(file, documents):
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(file)


def test_find_documents_same_for_all_sources(tmp_path):
    documents = ["eins zwei\n", "drei", "vier é 😀\n\nfünf"]
    folder = tmp_path / "folder"
    (folder / "deeper" / "not-a-file.txt").mkdir(parents=True)
    for number, name in enumerate(["a.txt", "b.md", "deeper/c.rst"]):
        (folder / name).write_text(documents[number], encoding="utf-8")
    (folder / "ignored.pdf").write_text("1,2")
    write_lines(tmp_path / "lines.jsonl", documents)
    table = pyarrow.table({"text": documents, "number": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "table.parquet", row_group_size=2)
    for source in (folder, tmp_path / "lines.jsonl", tmp_path / "table.parquet"):
        assert sorted(find_documents(str(source), "text", seed=0)) == sorted(documents), source
    assert list(find_documents(str(folder / "a.txt"), "text", seed=0)) == documents[:1]


PACKERS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
HELD = {
    "t.txt": (lambda documents: "".join(documents), lambda documents: ["".join(documents)]),
    "l.jsonl": (lambda documents: "".join(json.dumps({"text": one}) + "\n" for one in documents), list),
    "l.json": (lambda documents: json.dumps([{"text": one} for one in documents], indent=1), list),
    "lines.json": (lambda documents: "".join(json.dumps({"text": one}) + "\n" for one in documents), list),
    "t.csv": (lambda documents: table_of(documents, ","), list),
    "t.tsv": (lambda documents: table_of(documents, "\t"), list),
}


def table_of(documents, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["id", "text"], *enumerate(documents)])
    return text.getvalue()


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", HELD)
def test_find_documents_file_types_and_compression(name, packed, tmp_path):
    documents = ['eins, "zwei"\n', "drei\tvier", "é 😀\n\nfünf"]
    write, expected = HELD[name]
    (tmp_path / f"{name}{packed}").write_bytes(PACKERS[packed](write(documents).encode("utf-8-sig")))
    for source in (tmp_path / f"{name}{packed}", tmp_path):
        assert list(find_documents(str(source), "text", seed=0)) == expected(documents)


def test_find_documents_records_without_field(tmp_path, caplog):
    def write(records):
        (tmp_path / "l.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return find_documents(str(tmp_path / "l.jsonl"), "text", seed=0)

    assert list(write([{"id": 1}, {"text": "a"}, {"text": "b"}, {"id": 2}, {"text": "c"}])) == ["a", "b", "c"]
    assert caplog.messages == [f"data {str(tmp_path / 'l.jsonl')!r}: 2 of 5 records have no 'text': skipped"]
    # A file that is not read to its end reports the records seen.
    beginning = write([{"id": 1}, *({"text": str(number)} for number in range(9))])
    assert [next(beginning) for _ in range(3)] == ["0", "1", "2"]
    beginning.close()
    assert caplog.messages[1].endswith("1 of 4 records have no 'text': skipped")
    refused = r"l\.jsonl', line 2: no field 'text' \(found 'id'\); set data\.text_field"
    with pytest.raises(UserError, match=refused):
        list(write([{"text": "a"}, {"id": 1}, {"id": 2}]))
    # A file without the field is refused long before its end.
    long = write([{"text": "a"}, *({"id": number} for number in range(500)), 5])
    with pytest.raises(UserError, match=refused):
        list(long)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl.gz", b"no gzip", "cannot be read"),
        ("l.jsonl.gz", gzip.compress(b'{"text": "abc"}' * 99, mtime=0)[:-20], "cannot be read|not JSON"),
        ("l.json", b'[{"text": "a"}, 3]', "record 2: expected one object in the list, found int"),
        ("l.json", b'[{"text": "a"}', r"not JSON \(.*\); expected a list of objects"),
        (
            "l.json.gz",
            gzip.compress(b'[{"text": "a"}', mtime=0),
            r"l\.json\.gz': not JSON \(.*\); expected a list of objects",
        ),
        ("t.csv", b"body,id\nx,1\n", r"line 2: no field 'text' \(found 'body', 'id'\); set data\.text_field"),
        ("t.parquet.gz", b"", "unsupported file type"),
        ("l.gz", b"", "unsupported file type"),
    ],
)
def test_find_documents_error(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(find_documents(str(tmp_path / name), "text", seed=0))


def test_find_documents_text_field(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": 1, "body": "a"}\n')
    assert list(find_documents(str(tmp_path / "lines.jsonl"), "body", seed=0)) == ["a"]
