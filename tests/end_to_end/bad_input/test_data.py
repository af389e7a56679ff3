"""Tests of text that cannot be read or is too short."""

import re

import pyarrow
import pytest
from pyarrow import parquet

SPLITS = (
    r"the splits need 160 \(test 32, validation 32, calibration 64, train 32\) and share no document; provide more text"
)
DATA = {
    "empty.txt": (b"", f"has 0 tokens, but {SPLITS}"),
    "blank.txt": (b" \n ", f"has 0 tokens, but {SPLITS}"),
    "empty.jsonl": (b"", f"has 0 tokens, but {SPLITS}"),
    "short.txt": (b"hello world", f"has 12 tokens, but {SPLITS}"),
    "table.xml": (b"a,b", r"unsupported file type; supported are \.txt, .*\.parquet \(.* also as \.gz, .*\)$"),
    "table.csv": (b"a,b\n1,2\n", r"line 2: no field 'text' \(found 'a', 'b'\); set data.text_field"),
    "none": (b"a,b", "unsupported file type; supported are"),
    "binary.txt": (b"abc\xff\xfe", r"is not UTF-8 text \(byte 3\); convert it"),
    "binary.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8 text; convert it"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text":\n', "line 3: not JSON; expected one object per line"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not JSON"),
    "array.json": (b'[{"text": "a"}, ["b"]]', "record 2: expected one object in the list, found list"),
    "array.jsonl": (b'[{"text": "a"}]', "line 1: expected one object per line, found list"),
    "deep.json": (b"[" * 100_000, "not JSON"),
    "other-key.jsonl": (
        b'{"text": "a"}\n{"body": "a", "n": 1}\n{"n": 2}',
        r"line 2: no field 'text' \(found 'body', 'n'\); set d",
    ),
    "no-key.jsonl": (b"{}", r"line 1: no field 'text' \(found nothing\); set data.text_field"),
    "number.jsonl": (b'{"text": 3}', "line 1: 'text' is not text but int; set data.text_field"),
    "broken.parquet": (b"PAR1xxxxxxxxPAR1", "cannot be read as a Parquet file: "),
    "empty.parquet": (b"", "cannot be read as a Parquet file: .*0 bytes"),
}


@pytest.mark.parametrize("name", DATA)
def test_invalid_data_file(name, refused, tmp_path):
    content, message = DATA[name]
    (tmp_path / name).write_bytes(content)
    refused(f"data '{re.escape(str(tmp_path / name))}'.*{message}", data=tmp_path / name)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, r"no field 'text' \(found 'body', 'id'\); set data.text_field"),
        ({"text": [1, 2]}, "'text' is not text but int; set data.text_field"),
    ],
)
def test_parquet_without_text(columns, message, refused, tmp_path):
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    refused(f"table.parquet': {message}", data=tmp_path / "table.parquet")


def test_parquet_damaged(refused, tmp_path):
    file = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"text": [f"number {n}" for n in range(500)]}), file)
    content = bytearray(file.read_bytes())
    content[20:400] = bytes(380)
    file.write_bytes(content)
    refused("data '.*table.parquet' cannot be read", data=file)


def test_folder_without_text(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        "data '.*empty': the folder contains no supported file; supported are .txt, .text, .md", data=tmp_path / "empty"
    )


@pytest.mark.parametrize("data", ["./nothing", "/nowhere/at/all", "~nobody/text", "nothing.txt", "a/b.parquet"])
def test_data_not_found(data, refused):
    refused(f"data '{re.escape(data)}': no such file or folder", data=data)


@pytest.mark.parametrize("data", ["owner/nothing", "word " * 100])
def test_data_not_found_on_hub(data, refused):
    refused(
        "' is not a local file, and loading it as a Hub dataset failed: .*; check the name, or give a local", data=data
    )
