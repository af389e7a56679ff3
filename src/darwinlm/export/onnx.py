"""ONNX files of the prefill: token ids in, logits out, with free batch size and length, without a KV cache."""

import importlib.util
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from darwinlm.errors import UserError
from darwinlm.export.engine import Engine, Export
from darwinlm.export.shapes import check_no_experts, check_no_linear_attention
from darwinlm.models.loading import DenseModel
from darwinlm.models.modeling_darwinlm import PrunedModel

FILE = "model.onnx"
PACKAGE = "onnxruntime"
_WRITERS = ("onnx", "onnxscript")
_LENGTH = 6
"""Length of the example for tracing the graph."""


class _Prefill(nn.Module):
    """Module that maps token ids to logits."""

    def __init__(self, model: PrunedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def check_writer() -> None:
    """Raise UserError if packages for writing ONNX are not installed."""
    missing = [name for name in _WRITERS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to ONNX needs {' and '.join(missing)}; run: pip install onnxscript onnxruntime")


def write_onnx(model: PrunedModel, folder: Path) -> None:
    """Write `model`, float32, to `FILE` in `folder`; its weights are in `model.onnx.data` next to it."""
    example_BT = torch.arange(2 * _LENGTH).view(2, _LENGTH) % model.config.vocab_size
    free = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    with warnings.catch_warnings(), torch.no_grad():
        # Warnings about the exporter's own use of PyTorch.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                _Prefill(model).eval(),
                (example_BT,),
                str(folder / FILE),
                dynamo=True,
                dynamic_shapes=free,
                input_names=["input_ids"],
                output_names=["logits"],
                external_data=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            # The message is pages long; the cause is at its beginning, or in `__cause__`.
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"torch {torch.__version__} cannot export this model to ONNX ({reason}); install another "
                "version of torch"
            ) from None


def onnx_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """Compute the logits of the file in `folder` in onnxruntime on the CPU, by position and vocabulary entry.

    The tokens are the second row of a batch, with their reverse as the first.
    """
    runtime: Any = importlib.import_module(PACKAGE)
    session = runtime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    batch_BT = np.array([list(tokens)[::-1], list(tokens)], dtype=np.int64)
    found: np.ndarray = session.run(["logits"], {"input_ids": batch_BT})[0][1]
    return found


def _check(model: Export | DenseModel) -> None:
    check_writer()
    check_no_experts(model.config, "export to ONNX")
    check_no_linear_attention(model.config, "export to ONNX")


def _write(export: Export, draft: Path) -> dict[str, Any]:
    write_onnx(export.load_exact(), draft)
    export.tokenizer.save_pretrained(draft)
    export.notes.append("the file has no KV cache: it processes whole texts")
    return {}


ENGINE = Engine(
    name="onnx",
    suffix="-onnx",
    check=_check,
    write=_write,
    logits=lambda _, draft, tokens: onnx_logits(draft, tokens),
    packages=(PACKAGE,),
)
