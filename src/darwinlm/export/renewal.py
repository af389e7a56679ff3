"""Folders of pruned models, written again with the modelling file of this version."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from darwinlm.errors import UserError
from darwinlm.export.engine import Engine, Export
from darwinlm.export.hf import MODULE, name_tokenizer
from darwinlm.export.proof import logits_of
from darwinlm.models import modeling_darwinlm
from darwinlm.models.families import auto_map, causal_lm
from darwinlm.runtime.files import write_json


def _check(export: Export) -> None:
    if not (export.source / f"{MODULE}.py").exists():
        raise UserError(
            f"{export.source} contains no {MODULE}.py to update; give a run, or a folder written by --to hf or vllm"
        )


def _write(export: Export, draft: Path) -> dict[str, Any]:
    """Copy the folder with this version's modelling file; weights are hard-linked if possible."""
    folder, config = export.source, export.config
    shutil.copytree(folder, draft, dirs_exist_ok=True, copy_function=_link_weights)
    # Rewritten, because earlier versions used another format.
    settings = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    kept = {name: settings[name] for name in ("dtype", "transformers_version") if name in settings}
    kept |= {"architectures": [causal_lm(config).__name__], "auto_map": auto_map(config, MODULE)}
    write_json(draft / "config.json", json.loads(config.to_json_string()) | kept)
    shutil.copyfile(modeling_darwinlm.__file__, draft / f"{MODULE}.py")
    name_tokenizer(draft / "tokenizer_config.json")
    return {}


def _logits(_: Export, draft: Path, tokens: Sequence[int]) -> np.ndarray:
    return logits_of(AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32, trust_remote_code=True), tokens)


def _link_weights(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


ENGINE = Engine(name="hf", suffix="", check_export=_check, write=_write, logits=_logits)
