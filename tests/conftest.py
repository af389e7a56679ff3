"""Tiny random checkpoints of every family, with everything a real one has, and databases pruned from them."""

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors: a second thread only waits, and on a busy machine for long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from darwinlm import training
from darwinlm.adapters.families import dense_config
from darwinlm.adapters.loading import DenseModel, load_dense
from darwinlm.adapters.modeling_darwinlm import DarwinLMConfig, DarwinLMForCausalLM, DarwinLMModel
from darwinlm.database.build import build_database
from darwinlm.database.store import Database
from darwinlm.pipeline import Run, prune
from darwinlm.recipe import DatabaseRecipe
from darwinlm.recovery import stage

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GRANULARITIES = ("kv_group", "query_head")
VOCABULARY = 259

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,
}
_OWN = {
    "llama": {"model_type": "llama", "head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}


SETTINGS: dict[str, Any] = {
    "data.sequence_length": 16,
    "data.calibration_tokens": 256,
    "data.trial_tokens": 128,
    "data.score_tokens": 64,
    "data.held_out_tokens": 64,
    "database.levels": 4,
    "search.generations": 2,
    "search.offspring": 3,
    "search.survivors": [2, 1],
    "search.trial_tokens": [16, 32],
    "search.score_tokens": [32, 64],
    "recovery.tokens": 64,
    "evaluation.prefill_tokens": 8,
    "evaluation.decode_tokens": 2,
    "evaluation.repeats": 1,
}
TARGET = 0.7


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens: nothing to download, any text can be written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )


def make_config(family: str, **changes: Any) -> DarwinLMConfig:
    """A dense config in the words of our modelling file, as pruning `family` begins with."""
    settings = {**_SIZES, **_OWN[family], **changes}
    return dense_config(transformers.AutoConfig.for_model(settings.pop("model_type"), **settings))


_SCALES = {
    **dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), 8),
    **dict.fromkeys(("q_proj.weight", "k_proj.weight", "gate_proj.weight"), 1 / 8),
    "v_proj.weight": 1 / 2,
    "v_proj.bias": 4,
    "o_proj.weight": 1 / 4,
    "up_proj.weight": 1 / 4,
    "up_proj.bias": 2,
    "down_proj.weight": 1 / 2,
}


def rescaled(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights of the same function, to the last bit: all factors are powers of two."""
    return {name: tensor * _SCALES.get(".".join(name.split(".")[-2:]), 1) for name, tensor in weights.items()}


def save_pruned(config: DarwinLMConfig, folder: Path) -> DarwinLMForCausalLM:
    """A model of the sizes in `config`, its every parameter random, as a folder that `darwinlm.load` takes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DarwinLMForCausalLM(config).eval()
        randomise(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def randomise(model: torch.nn.Module) -> None:
    """Biases and norms too."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)


def make_checkpoint(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint whose every parameter, biases and norms too, is random."""
    settings = {**_SIZES, **_OWN[family], **changes}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint."""
    folders: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in folders:
            folders[family] = make_checkpoint(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return get


@pytest.fixture(scope="session")
def calibration() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def pruned(
    checkpoint: Callable[[str], Path], calibration: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[DenseModel, Database]]:
    """A family at a granularity: the dense model and its database of 4 levels a site or fewer."""
    known: dict[tuple[str, str], tuple[DenseModel, Database]] = {}

    def get(family: str, granularity: str) -> tuple[DenseModel, Database]:
        key = (family, granularity)
        if key not in known:
            dense = load_dense(str(checkpoint(family)), granularity, torch.device("cpu"))
            folder = tmp_path_factory.mktemp("database")
            known[key] = dense, build_database(dense, calibration, DatabaseRecipe(levels=4, batch_size=3), folder)
        return known[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up sentences of a few words: enough structure for second-order pruning to work on."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(50)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(rng.choices(words, k=2_000)))
    return file


@pytest.fixture(scope="session")
def run(
    checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, dict[str, Any]]:
    """A finished run, and the settings it was made with."""
    out = tmp_path_factory.mktemp("run") / "whole"
    settings = {**SETTINGS, "data.source": str(text)}
    return prune(checkpoint("qwen3"), target=TARGET, out=out, settings=settings), settings


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Call it, and passes of more than one block run out of memory (of two, halfway); the sizes of all passes."""
    forward = DarwinLMModel.forward
    for user in (training, stage):
        monkeypatch.setattr(user, "fast_dtype", lambda device: torch.float32)

    def begin() -> list[int]:
        seen: list[int] = []

        def small(model: DarwinLMModel, input_ids: torch.Tensor, **arguments: Any) -> Any:
            seen.append(len(input_ids))
            # The first part of the first batch in two parts gets through: what it has left must not count.
            if len(input_ids) > 2 or seen[-2:] == [2, 2]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, input_ids, **arguments)

        monkeypatch.setattr(DarwinLMModel, "forward", small)
        return seen

    return begin


def apart(models: tuple[torch.nn.Module, torch.nn.Module], start: torch.nn.Module) -> float:
    """How far apart two models have come, as a share of the way that the first went from `start`."""
    one, other, begin = (torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in (*models, start))
    return float((one - other).norm() / (one - begin).norm())


CLOCKS = ("manifest.json", "measured.json", "metrics.json", "index.html", "README.md", "recipe.yaml", "lock")


def files_of(folder: Path) -> dict[str, bytes]:
    """What must be the same whatever happened on the way: everything but clocks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in CLOCKS
    }


def cut_short(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete(file):
    file.unlink()


DAMAGES = (cut_short, flip_a_bit, delete)
