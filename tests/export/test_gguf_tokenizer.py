"""Tests of tokenizers in llama.cpp: token ids equal those of transformers on a text that is hard to tokenize."""

import dataclasses
import json
import unicodedata

import pytest
from helpers import VOCABULARY, make_config, make_tokenizer, save_pruned
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from darwinlm import UserError
from darwinlm.engines.llama_cpp import Engine
from darwinlm.export import gguf
from darwinlm.export.gguf_tokenizer import PRE_TOKENIZERS, read_vocabulary
from darwinlm.export.proof import TEXT
from darwinlm.export.targets import export_model
from darwinlm.models import smollm2
from darwinlm.models.families import causal_lm


def trained(steps, ignore_merges, **wrapping):
    """Train a byte-level BPE tokenizer on the text, with the pre-tokenizer of a key of PRE_TOKENIZERS."""
    known = {
        "digits": pre_tokenizers.Digits(individual_digits=True),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "bytes, words of GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [known[step] if step in known else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, TEXT.swapcase(), TEXT[::2]], trainer)
    tokenizer.add_tokens(["<mine>", "<think>"])
    if wrapping:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece(prefix):
    """Train a BPE tokenizer with byte fallback, as in Llama 2 and the first Mistral."""
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat said the dog is a good one " * 9, "12 1 2 3 isn't"], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def engine_ids(tokenizer, folder, texts):
    size = len(tokenizer) + 5  # embeddings are often larger than the vocabulary
    config = make_config("llama", vocab_size=size, num_hidden_layers=1)
    architecture = gguf.choose_architecture(config)
    vocabulary = read_vocabulary(tokenizer, size, folder)
    gguf.write_gguf(causal_lm(config)(config), vocabulary, folder / "t.gguf", "f32", "t", architecture)
    engine = Engine(folder / "t.gguf")
    found = [engine.token_ids(text) for text in texts]
    engine.close()
    return found, vocabulary


TEXTS = [TEXT, "", " ", "<s>a</s>b<mine> c", *TEXT.splitlines(), *TEXT.split(" ")]


@pytest.mark.parametrize("key", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_byte_level_token_ids(key, tmp_path):
    tokenizer = trained(*key)
    texts = TEXTS
    if PRE_TOKENIZERS[key] == "tekken":  # llama.cpp handles combining marks differently
        texts = ["".join(c for c in text if not unicodedata.category(c).startswith("M")) for text in TEXTS]
    found, vocabulary = engine_ids(tokenizer, tmp_path, texts)
    assert vocabulary.pre == PRE_TOKENIZERS[key]
    assert found == tokenizer(texts).input_ids
    assert max(map(len, found)) < len(TEXT.encode())  # some merges were applied


def test_tokenizer_adds_bos_and_eos(tmp_path):
    tokenizer = trained(*next(iter(PRE_TOKENIZERS)), wrapped=True)
    found, vocabulary = engine_ids(tokenizer, tmp_path, ["a b"])
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, True)
    assert found == tokenizer(["a b"]).input_ids
    assert found[0][0] == 0 and found[0][-1] == 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_token_ids(prefix, tmp_path):
    tokenizer = sentencepiece(prefix)
    texts = [TEXT, "the cat", " the dog  said", "isn't 12123 ü 👍🏽"]
    found, vocabulary = engine_ids(tokenizer, tmp_path, texts)
    assert vocabulary.model == "llama" and vocabulary.add_space_prefix == prefix
    assert found == tokenizer(texts).input_ids
    assert len(found[1]) < 5


@pytest.mark.slow
def test_token_ids_of_smollm2(tmp_path):
    tokenizer = smollm2.smollm2_tokenizer()
    found, vocabulary = engine_ids(tokenizer, tmp_path, [TEXT, *TEXT.splitlines()])
    assert vocabulary.pre == "smollm"
    assert vocabulary.chat_template == tokenizer.chat_template
    assert found == tokenizer([TEXT, *TEXT.splitlines()]).input_ids


def test_different_tokenizer_refused(tmp_path, monkeypatch):
    read = read_vocabulary
    monkeypatch.setattr(
        "darwinlm.export.gguf.read_vocabulary", lambda *args: dataclasses.replace(read(*args), add_bos=True)
    )
    save_pruned(make_config("llama"), tmp_path / "model")
    with pytest.raises(UserError, match=r"tokenizes some text differently: after '' \['<s>', 'T'.*export discarded"):
        export_model(tmp_path, "gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_llama_cpp_splits_differently_is_noted(tmp_path):
    key = next(key for key, name in PRE_TOKENIZERS.items() if name == "tekken")
    tokenizer = trained(*key)
    save_pruned(make_config("llama", vocab_size=len(tokenizer)), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    exported = export_model(tmp_path, "gguf")
    assert "tokenizes some text differently" in exported.notes[0]
    assert exported.proof.difference < 1e-4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, r"is not supported by the export to GGUF \(Whitespace"),
        (
            {"pre_tokenizer": pre_tokenizers.Split(Regex("a+"), "isolated")},
            r"is not supported by the export to GGUF \(a\+\); supported are those",
        ),
        ({"model": models.WordLevel({"a": 0}, unk_token="a")}, "type WordLevel is not supported; export to GGUF"),
        (
            {"post_processor": processors.TemplateProcessing(single="a $A", special_tokens=[("a", 3)])},
            "adds more than beginning- and end-of-text",
        ),
    ],
)
def test_unsupported_tokenizers_refused(change, match, tmp_path):
    tokenizer = make_tokenizer()
    for name, value in change.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    with pytest.raises(UserError, match=match):
        read_vocabulary(tokenizer, VOCABULARY, tmp_path)
    with pytest.raises(UserError, match="has 259 tokens, but there are only 100 embeddings"):
        read_vocabulary(make_tokenizer(), 100, tmp_path)
