"""Tests of packing text to blocks: disjoint splits, long and short documents, streams and chats."""

import itertools
import json
from collections import Counter

import datasets
import pyarrow
import pytest
import torch
from helpers import make_tokenizer
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import save_file

from darwinlm.config.recipe import DataRecipe
from darwinlm.data import corpus as corpus_module
from darwinlm.data.corpus import SPLITS, Corpus, TextStream, load_corpus, needed_blocks, pack, read_corpus, save_corpus
from darwinlm.data.documents import find_documents
from darwinlm.data.tokens import Tokens
from darwinlm.errors import UserError

END = 10**6
SIZES = [f"{split}_tokens" for split in SPLITS]


class Words:
    """Tokenizer of words such as `w17`, whose id is the number."""

    eos_token_id = END

    def __call__(self, texts):
        return {"input_ids": [[int(word[1:]) for word in text.split()] for text in texts]}


def words(start, stop):
    return " ".join(f"w{number}" for number in range(start, stop))


def write_lines(file, documents):
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(file)


def recipe(source, tokens=64, **changes):
    counts = {f"{split}_tokens": tokens for split in SPLITS}
    return DataRecipe(source=source, sequence_length=16, **{**counts, **changes})


LONG, SHORT, LENGTH = 5_000, 1_000, 5


@pytest.fixture
def mixed(tmp_path):
    """Write one document of 5,000 words and 1,000 of 5, without repeated words; the long one has those below 5,000."""
    short = [words(LONG + LENGTH * i, LONG + LENGTH * (i + 1)) for i in range(SHORT)]
    return write_lines(tmp_path / "mixed.jsonl", [*short[:300], words(0, LONG), *short[300:]])


def is_last(word):
    """Return whether a document of `mixed` ends with `word`."""
    return word == LONG - 1 or (word >= LONG and word % LENGTH == LENGTH - 1)


def test_splits_are_disjoint(mixed):
    corpus = read_corpus(recipe(mixed, tokens=900), Words(), seed=0)
    used = [word for text in corpus.splits.values() for word in text.input_ids_BT.flatten().tolist() if word != END]
    assert len(used) > 3_000
    assert Counter(used).most_common(1)[0][1] == 1


def test_splits_have_needed_blocks_without_padding(mixed):
    asked = recipe(mixed, tokens=64, test_tokens=1, validation_tokens=17, train_tokens=1_000)
    corpus = read_corpus(asked, Words(), seed=0)
    assert needed_blocks(asked) == {"test": 1, "validation": 2, "calibration": 4, "train": 63}
    for split, count in needed_blocks(asked).items():
        assert corpus.splits[split].input_ids_BT.shape == (count, 16)
        assert corpus.splits[split].input_ids_BT.dtype == torch.int32
        # Two end tokens in a row would be an empty document, that is padding.
        assert "-1, -1" not in str(corpus.splits[split].input_ids_BT.flatten().tolist())


def test_end_token_ends_documents(mixed):
    corpus = read_corpus(recipe(mixed, tokens=900), Words(), seed=0)
    for text in corpus.splits.values():
        tokens = text.input_ids_BT.flatten().tolist()
        assert END in tokens
        for word, following in itertools.pairwise(tokens):
            if word != END:
                assert (following == END) == is_last(word), word
                assert following in (END, word + 1) or word < LONG


def test_documents_not_shared_between_splits():
    asked = recipe("any", tokens=1, test_tokens=32)
    documents = [range(10), range(10, 40), range(40, 60), range(60, 80), range(80, 90), range(90, 96), range(96, 99)]
    splits = pack(map(Tokens.document, documents), asked).splits
    assert splits["test"].input_ids_BT.flatten().tolist() == list(range(32))
    assert splits["validation"].input_ids_BT.flatten().tolist() == list(range(40, 56))
    assert splits["calibration"].input_ids_BT.flatten().tolist() == list(range(60, 76))
    assert splits["train"].input_ids_BT.flatten().tolist() == list(range(80, 96))
    with pytest.raises(UserError, match="has 90 tokens, but the splits need 80"):
        pack(map(Tokens.document, documents[:5]), asked)


def test_positions_restart_with_pieces_and_blocks():
    # Three pieces, the second without loss, and one that is truncated.
    pieces = [Tokens.document([5, 6, 7]), Tokens.document([8, 9, 0, 3], [False] * 4)]
    pieces += map(Tokens.document, ([2], range(30), *[[1] * 16] * 3))
    text = pack(pieces, recipe("any", tokens=1, test_tokens=32)).splits["test"]
    assert text.input_ids_BT.flatten().tolist() == [5, 6, 7, 8, 9, 0, 3, 2, *range(24)]
    assert text.labels.flatten().tolist() == [5, 6, 7, *[-100] * 4, 2, *range(24)]
    assert text.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, *range(8)], list(range(16))]


def test_stream_marks_document_starts(mixed):
    blocks = TextStream(recipe(mixed), Words(), 0, frozenset()).blocks()
    for _ in range(100):
        block, _ = next(blocks)
        ids, found = block.input_ids_BT.tolist(), block.position_ids.tolist()
        begins = [0, *(place + 1 for place, word in enumerate(ids) if word == END)]
        assert found == [place - max(begin for begin in begins if begin <= place) for place in range(16)]


def test_read_corpus_seed(mixed):
    corpora = [read_corpus(recipe(mixed), Words(), seed) for seed in (3, 3, 4)]
    one, same, other = ([corpus.splits[split].input_ids_BT for split in SPLITS] for corpus in corpora)
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))


def test_long_documents_proportional_share(mixed):
    shares = []
    for seed in range(5):
        for text in read_corpus(recipe(mixed, tokens=900), Words(), seed).splits.values():
            drawn = [word for word in text.input_ids_BT.flatten().tolist() if word != END]
            shares.append(sum(word < LONG for word in drawn) / len(drawn))
    assert abs(sum(shares) / len(shares) - 0.5) < 0.04
    assert 0.25 < min(shares) < max(shares) < 0.75


def test_repeated_documents_deduplicated(tmp_path):
    source = write_lines(tmp_path / "repeated.jsonl", [words(0, 9), f"  {words(0, 9)}\n", words(0, 9), words(9, 18)])
    with pytest.raises(UserError, match=r"has 20 tokens, but the splits need 256 \(test 64, validation 64, cali"):
        read_corpus(recipe(source), Words(), seed=0)


def test_byte_order_marks_blank_lines_and_nulls(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "lines.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": null}\n{"text": "\\ud83d"}\n{"text": "b"}'
    )
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "table.parquet")
    found = {file.suffix: list(find_documents(str(file), "text", seed=0)) for file in tmp_path.iterdir()}
    assert found == {".txt": ["ab"], ".jsonl": ["a", "", "?", "b"], ".parquet": ["a", "", "b"]}
    # ab, a, ? and b with an end token each: `a` and `b` of the second file are duplicates.
    with pytest.raises(UserError, match="has 9 tokens"):
        read_corpus(recipe(str(tmp_path)), make_tokenizer(), seed=0)


def test_corpus_save_and_load(mixed, tmp_path):
    corpus = read_corpus(recipe(mixed), Words(), seed=0)
    save_corpus(corpus, tmp_path / "run" / "corpus.safetensors")
    loaded = load_corpus(tmp_path / "run" / "corpus.safetensors")
    assert set(loaded.splits) == set(SPLITS)
    for split in SPLITS:
        columns = loaded.splits[split].columns()
        assert [column.dtype for column in columns.values()] == [torch.int32, torch.bool, torch.bool]
        assert all(torch.equal(columns[name], column) for name, column in corpus.splits[split].columns().items())


def packed_into_one_number(input_ids, loss_mask, document_starts):
    """Pack tokens as in versions 0.1 and 0.2: bit 30 at the start of a document, all bits flipped without loss."""
    begun = [token + start * 2**30 for token, start in zip(input_ids, document_starts, strict=True)]
    return [number if learnt else -number - 1 for number, learnt in zip(begun, loss_mask, strict=True)]


def former_file(corpus, file):
    """Write the corpus file of version 0.2."""
    tensors = {}
    for split, name in (("test", "held_out"), ("validation", "score"), ("calibration",) * 2, ("train", "trial")):
        rows = zip(*corpus.splits[split].to_json().values(), strict=True)
        tensors[name] = torch.tensor([packed_into_one_number(*row) for row in rows], dtype=torch.int32)
    if corpus.reserved:
        tensors["judged"] = torch.tensor(list(b"".join(sorted(corpus.reserved))), dtype=torch.uint8)
    save_file(tensors, file)


def columns_of(corpus):
    return {split: text.to_json() for split, text in corpus.splits.items()}


@pytest.fixture
def chat_corpus(tmp_path):
    """Corpus of chats and plain text: every column has both values in every split."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(60)))
    (tmp_path / "plain.txt").write_text("word " * 400)
    corpus = read_corpus(
        DataRecipe(source=str(tmp_path), sequence_length=32, **dict.fromkeys(SIZES, 320)), tokenizer, 0
    )
    for text in corpus.splits.values():
        assert all(0 < column.float().mean() < 1 for name, column in text.columns().items() if name != "input_ids")
    return corpus


@pytest.mark.parametrize("reserved", [True, False])
def test_corpus_of_version_0_2(reserved, chat_corpus, tmp_path):
    corpus = chat_corpus if reserved else Corpus(chat_corpus.splits)
    former_file(corpus, tmp_path / "former.safetensors")
    loaded = load_corpus(tmp_path / "former.safetensors")
    assert columns_of(loaded) == columns_of(corpus)
    assert loaded.reserved == corpus.reserved
    save_corpus(loaded, tmp_path / "restored.safetensors", former=True)
    assert (tmp_path / "restored.safetensors").read_bytes() == (tmp_path / "former.safetensors").read_bytes()


def test_corpus_file_tensors(chat_corpus, tmp_path):
    """Compare the tensors with docs/formats.md."""
    save_corpus(chat_corpus, tmp_path / "corpus.safetensors")
    with safe_open(tmp_path / "corpus.safetensors", "pt") as file:
        assert file.metadata() == {"format": "2"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fingerprints = found.pop("evaluation.fingerprints")
    assert bytes(fingerprints.tolist()) == b"".join(sorted(chat_corpus.reserved))
    columns = {"input_ids": torch.int32, "loss_mask": torch.bool, "document_starts": torch.bool}
    assert {name: (tensor.dtype, *tensor.shape) for name, tensor in found.items()} == {
        f"{split}.{column}": (dtype, 10, 32) for split in SPLITS for column, dtype in columns.items()
    }


def test_corpus_invalid_file_refused(tmp_path):
    save_file({"train.input_ids": torch.zeros(1, 16)}, tmp_path / "corpus.safetensors", {"format": "3"})
    with pytest.raises(UserError, match=r"corpus.safetensors is of format 3, but this version reads formats up to 2"):
        load_corpus(tmp_path / "corpus.safetensors")
    save_file({"train.input_ids": torch.zeros(1, 16)}, tmp_path / "corpus.safetensors", {"format": "2"})
    with pytest.raises(UserError, match=r"corpus.safetensors is damaged \('train.loss_mask' is missing\)"):
        load_corpus(tmp_path / "corpus.safetensors")


def test_stream_resumes_from_state_of_version_0_2(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 9}) + "\n" for n in range(200)))
    stream = TextStream(DataRecipe(source=str(tmp_path), sequence_length=32), make_tokenizer(), 0, frozenset())
    _, state = streamed(stream, 5)
    assert sum(state["tokens"]["document_starts"]) > 0
    former = {**state, "tokens": packed_into_one_number(*state["tokens"].values())}
    assert streamed(stream, 20, former)[0] == streamed(stream, 20, state)[0]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 2)), (5, (1, 5)), (16, (1, 16)), (17, (2, 16)), (64, (4, 16))])
def test_corpus_tokens_prefix(mixed, count, shape):
    corpus = read_corpus(recipe(mixed), Words(), seed=0)
    tokens = corpus.splits["train"].first(count).input_ids_BT
    assert tokens.shape == shape
    assert torch.equal(tokens, corpus.splits["train"].input_ids_BT[: shape[0], : shape[1]])


class Stream:
    """Hub dataset of endless documents that counts how many were taken."""

    def __init__(self, records):
        self.records, self.taken, self.shuffled = records, 0, None

    def shuffle(self, *, seed, buffer_size):
        self.shuffled = seed
        return self

    def __iter__(self):
        for record in self.records:
            self.taken += 1
            if isinstance(record, Exception):
                raise record
            yield record


@pytest.fixture
def hub(monkeypatch):
    """Return a function that puts `records` on the Hub; the arguments of the call are in `asked`."""

    def put(records):
        stream = Stream(records)

        def load_dataset(name, config, *, split, streaming):
            stream.asked = (name, config, split, streaming)
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return stream

    return put


def endless(characters):
    """Yield documents of `characters` characters, in words of 8."""
    for number in itertools.count(step=characters // 8):
        yield {"text": " ".join(f"w{word:06d}" for word in range(number, number + characters // 8))}


@pytest.mark.parametrize("characters", [80, 4_000])
def test_hub_dataset_read_only_as_needed(characters, hub):
    stream = hub(endless(characters))
    corpus = read_corpus(recipe("owner/name:en"), Words(), seed=5)
    assert stream.asked == ("owner/name", "en", "train", True)
    assert stream.shuffled == 5
    assert corpus.splits["train"].input_ids_BT.shape == (4, 16)
    needed = 4 * 64
    assert stream.taken * characters <= 12 * (needed + 4 * 16) + 2 * characters


def test_hub_dataset_one_token_per_character(hub):
    hub({"text": f"{number:040d}"} for number in range(10**9))
    asked = recipe("owner/name", tokens=16)
    corpus = read_corpus(asked, make_tokenizer(), seed=0)
    assert [len(corpus.splits[split]) for split in SPLITS] == [1, 1, 1, 1]


def test_local_files_read_completely(tmp_path):
    # The first documents of a sorted file are not a random sample.
    source = write_lines(tmp_path / "sorted.jsonl", [words(10 * i, 10 * i + 10) for i in range(2_000)])
    corpus = read_corpus(recipe(source, tokens=16), Words(), seed=0)
    assert max(text.input_ids_BT.max() for text in corpus.splits.values()) > 10_000


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([ConnectionError("no route\nto host")], "not a local file, .* as a Hub dataset failed: no route to"),
        ([{"text": words(0, 3)}, TimeoutError()], "dataset failed: TimeoutError; check the name, or give a"),
        ([{"body": "a", "id": 1}], r"no field 'text' \(found 'body', 'id'\); set data.text_field"),
        ([{"text": 3}], "'text' is not text but int; set data.text_field"),
        ([{"text": words(0, 3)}], "'owner/name' has 4 tokens, but the splits need 256"),
    ],
)
def test_hub_error_one_line(records, message, hub):
    hub(iter(records))
    with pytest.raises(UserError, match=message) as caught:
        read_corpus(recipe("owner/name"), Words(), seed=0)
    assert "\n" not in str(caught.value)


def streamed(stream, count, state=None):
    """Return the columns of `count` blocks, and the state after them as JSON."""
    blocks = stream.blocks(state)
    found, state = [], state
    for _ in range(count):
        block, state = next(blocks)
        found.append(block.to_json())
    return found, json.loads(json.dumps({**state, "tokens": state["tokens"].to_json()}))


def test_stream_resumes_and_excludes_evaluation_text(tmp_path):
    tokenizer = make_tokenizer()
    documents = [f"document {number}: " + "word " * (number % 30) for number in range(400)]
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    asked = DataRecipe(
        source=str(tmp_path), sequence_length=32, calibration_tokens=320, train_tokens=320, validation_tokens=640,
        test_tokens=640,
    )  # fmt: skip
    save_corpus(read_corpus(asked, tokenizer, 0), tmp_path / "corpus.safetensors")
    corpus = load_corpus(tmp_path / "corpus.safetensors")
    assert corpus.reserved == read_corpus(asked, tokenizer, 0).reserved
    stream = TextStream(asked, tokenizer, 0, corpus.reserved)

    whole, _ = streamed(stream, 1500)
    for cut in (1, 777, 1400):
        before, state = streamed(stream, cut)
        after, _ = streamed(stream, 1500 - cut, state)
        assert before + after == whole

    text = tokenizer.decode([token for block in whole for token in block["input_ids"]])
    judging = "</s>".join(
        tokenizer.decode(corpus.splits[name].input_ids_BT.flatten().tolist()) for name in ("test", "validation")
    )
    seen = {piece.strip() for piece in text.split("</s>")}
    judge = {text.strip() for text in documents if corpus_module._fingerprint(text) in corpus.reserved}
    assert len(judge) > 10
    # 1500 blocks are more than one epoch: all other documents were read.
    assert {text.strip() for text in documents} - seen == judge
    whole_ones = {piece.strip() for piece in judging.split("</s>")} & {text.strip() for text in documents}
    assert whole_ones <= judge and len(judge - whole_ones) <= 2  # those truncated at the end of a split


def test_stream_with_only_evaluation_text(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 100)
    asked = DataRecipe(source=str(tmp_path / "text.txt"), sequence_length=32)
    stream = TextStream(asked, make_tokenizer(), 0, frozenset())
    assert len(streamed(stream, 3)[0]) == 3
    everything = frozenset(
        corpus_module._fingerprint(piece.text) for piece in corpus_module._cut("word " * 100, asked, None)
    )
    with pytest.raises(UserError, match=r"has less than a block of 32 tokens beyond the evaluation"):
        next(TextStream(asked, make_tokenizer(), 0, everything).blocks())


def test_hub_stream_resumes_from_dataset_state(monkeypatch):
    rows = [{"text": f"row {number} " * 5} for number in range(500)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    )
    asked = DataRecipe(source="owner/name", sequence_length=32)
    stream = TextStream(asked, make_tokenizer(), 0, frozenset())
    whole, _ = streamed(stream, 900)
    before, state = streamed(stream, 333)
    assert before + streamed(stream, 567, state)[0] == whole


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chats(count):
    rng = itertools.count()
    return [
        [
            {"role": "user", "content": f"question {next(rng)}?"},
            {"role": "assistant", "content": f"answer {next(rng)} " * (number % 5 + 1)},
            {"role": "user", "content": f"again {next(rng)}?"},
            {"role": "assistant", "content": f"and again {next(rng)}"},
        ]
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub", "field"])
def test_chat_labels_only_assistant_messages(kind, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    field = "conversation" if kind == "field" else "messages"
    rows = [{field: chat} for chat in chats(60)]
    source = tmp_path / ("text.parquet" if kind == "parquet" else "text.jsonl")
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows).to_iterable_dataset()
    )
    asked = DataRecipe(
        source="owner/name" if kind == "hub" else str(source), text_field="text" if kind != "field" else field,
        sequence_length=32, calibration_tokens=320, train_tokens=640, validation_tokens=320, test_tokens=320,
    )  # fmt: skip
    save_corpus(read_corpus(asked, tokenizer, 0), tmp_path / "corpus.safetensors")
    corpus = load_corpus(tmp_path / "corpus.safetensors")
    ids, labels = corpus.splits["train"].input_ids_BT.flatten(), corpus.splits["train"].labels.flatten()
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    text = tokenizer.decode(ids.tolist())
    assert "<|user|>question" in text
    # Tokens with loss, found by the words only: the answers and their end tokens.
    learnt = tokenizer.decode(labels[labels != -100].tolist())
    answers = [part.split("<|")[0] for part in text.split("<|assistant|>")[1:]]
    assert learnt in ("".join(answers), text.split("<|")[0] + "".join(answers))
    # A stream has the same labels.
    blocks = TextStream(asked, tokenizer, 0, frozenset()).blocks()
    labels = torch.cat([next(blocks)[0].labels for _ in range(9)])
    words = tokenizer.decode(labels[labels != -100].tolist())
    assert "answer 1" in words and "question" not in words


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"role": "user"}], CHATML, "line 1: a chat must be a list of messages with text 'role' and 'content'"),
        (["hello"], CHATML, "line 1: a chat must be a list of messages with text 'role' and 'content'"),
        (chats(1)[0], None, "contains chats, but the model's tokenizer has no chat template; provide plain text"),
        (chats(1)[0], "{{ raise_exception('no') }}", "contains a chat that the model's chat template rejects: no"),
        (
            chats(1)[0],
            "{{ messages | length }}{{ messages[0].content }}",
            "renders a message differently when others",
        ),
    ],
)
def test_chat_error(messages, template, message, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (tmp_path / "text.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=message):
        read_corpus(DataRecipe(source=str(tmp_path)), tokenizer, 0)
