"""Tries an installed darwinlm from outside the source: checks, prunes and loads a tiny random model.

PYTHON -I .ci/try_installed.py VERSION
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import darwinlm

TEXT = "A small model is pruned from a large one and then trained until it reads text as well as it can."
SETTINGS = [
    "data.sequence_length=16",
    "data.calibration_tokens=256",
    "data.train_tokens=128",
    "data.validation_tokens=64",
    "data.test_tokens=64",
    "database.levels=4",
    "search.generations=2",
    "search.offspring=3",
    "search.trial_tokens=[16,32]",
    "search.score_tokens=[32,64]",
    "recovery.tokens=64",
    "workload.prompt_tokens=8",
    "workload.new_tokens=2",
]


def write_model(folder: Path) -> None:
    """A Llama of three small layers; its tokens are bytes."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def darwinlm_command(*arguments: str) -> str:
    """What the installed command prints. Raises CalledProcessError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(Path(sys.executable).with_name("darwinlm")), *arguments]
    done = subprocess.run(command, env={**environment, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout


def main() -> None:
    """Raises AssertionError or CalledProcessError if anything is amiss."""
    (version,) = sys.argv[1:]
    assert Path(darwinlm.__file__).is_relative_to(sys.prefix), f"{darwinlm.__file__} is not the installed package"
    assert darwinlm_command("--version").strip() == darwinlm.__version__ == version
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        write_model(folder / "tiny")
        (folder / "text.txt").write_text("\n\n".join(TEXT[start:] for start in range(60)) * 3)
        darwinlm_command("doctor", "tiny", "--quiet")
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        darwinlm_command("prune", "tiny", "--target", "0.7", "--data", "text.txt", "--out", "run", "--quiet", *settings)
        assert (folder / "run" / "report" / "index.html").stat().st_size > 10_000
        tokens = AutoTokenizer.from_pretrained("run/model")("a small model", return_tensors="pt")["input_ids"]
        theirs = AutoModelForCausalLM.from_pretrained("run/model", trust_remote_code=True)
        ours = darwinlm.load("run")
        with torch.no_grad():
            assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
        share = ours.num_parameters() / LlamaForCausalLM.from_pretrained("tiny").num_parameters()
        assert share <= 0.7, share
    print(f"darwinlm {version} in {sys.prefix}: a tiny model was checked, pruned to {share:.0%} and loaded")


if __name__ == "__main__":
    main()
