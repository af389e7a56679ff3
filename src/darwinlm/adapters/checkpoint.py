"""A checkpoint's tensors, read from its safetensors files when they are asked for, and never all at once."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from darwinlm.adapters.families import LAYERS
from darwinlm.errors import InvalidTensorError, UserError
from darwinlm.files import digest

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_KIND = ".safetensors"
_SAMPLES = 64
_TEXT_MODELS = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_DTYPES = ("F64", "F32", "F16", "BF16")


def text_name(stored: str) -> str:
    """What a tensor is called in the text model of a multimodal checkpoint; other names stay as they are."""
    for prefix, name in _TEXT_MODELS.items():
        if stored.startswith(prefix):
            return name + stored.removeprefix(prefix)
    return stored


class Checkpoint:
    """The safetensors files of a local folder or a Hub model (downloaded if need be).

    Raises:
        UserError: if there are none, or one cannot be read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of every tensor, by name; known without reading one."""
        self._places: dict[str, tuple[Path, str]] = {}
        """Of every tensor: its file, and its name there."""
        self._dtypes: dict[str, str] = {}
        folder = Path(source) if Path(source).is_dir() else self._download(source)
        for file in self._shards(folder):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for stored in tensors.keys():  # noqa: SIM118 (not a dict)
                        part, name = tensors.get_slice(stored), text_name(stored)
                        self._places[name], self._dtypes[name] = (file, stored), part.get_dtype()
                        self.shapes[name] = tuple(part.get_shape())
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from None

    def some_layers(self, layers: Sequence[int]) -> "Checkpoint":
        """The checkpoint of a model that has `layers` of this one, in this order, and no others."""
        some = copy.copy(self)
        some.shapes, some._places, some._dtypes = {}, {}, {}
        numbers = {str(layer): number for number, layer in enumerate(layers)}
        for stored, shape in self.shapes.items():
            name = stored
            if stored.startswith(LAYERS):
                layer, _, part = stored.removeprefix(LAYERS).partition(".")
                if layer not in numbers:
                    continue
                name = f"{LAYERS}{numbers[layer]}.{part}"
            some.shapes[name], some._places[name], some._dtypes[name] = (
                shape,
                self._places[stored],
                self._dtypes[stored],
            )
        return some

    def check_names(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint that lacks one of the `expected` tensors or has it in another shape. Raises UserError."""
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
            raise UserError(f"model {self.source!r}: its files lack {missing[0]}{more}; get the whole checkpoint")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"model {self.source!r}: {name} has shape {list(self.shapes[name])} in its files, but its "
                    f"config.json asks for {list(shape)}"
                )
            if self._dtypes[name] not in _DTYPES:
                raise UserError(
                    f"model {self.source!r}: {name} holds {self._dtypes[name]} numbers; give the unquantised "
                    "checkpoint it was made from"
                )

    def read(self, names: Iterable[str], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by name, on `device`, in `dtype` or the one they are stored in. Raises UserError."""
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            file, stored = self._places[name]
            by_file.setdefault(file, []).append((name, stored))
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name, stored in wanted:
                        # A copy: the file's mapping must not outlive this block.
                        found[name] = tensors.get_tensor(stored).to(device, dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from None
        return found

    def fingerprint(self, names: Iterable[str]) -> str:
        """Of the tensors `names`: of each its shape and up to 64 values spread over it. Reads all of every tensor once.

        Raises:
            InvalidTensorError: naming the first that holds NaN or Inf.
        """
        parts: list[bytes | str] = []
        for name in sorted(names):
            tensor = self.read([name], torch.device("cpu"))[name]
            low, high = tensor.aminmax()
            if not bool(torch.isfinite(low) and torch.isfinite(high)):
                raise InvalidTensorError(f"model {self.source!r}: {name} holds NaN or Inf; repair the checkpoint")
            flat = tensor.flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().contiguous()
            parts += [name, str(tuple(tensor.shape)), sample.numpy().tobytes()]
        return digest(*parts)

    def _download(self, source: str) -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=["*.safetensors", _INDEX]))
        except Exception as error:  # the Hub's client raises many kinds
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError(f"model {source!r}: its weights cannot be downloaded: {reason}") from None

    def _shards(self, folder: Path) -> list[Path]:
        if (folder / _SINGLE).exists():
            return [folder / _SINGLE]
        if not (folder / _INDEX).exists():
            raise UserError(
                f"model {self.source!r}: its weights cannot be loaded: there is no {_SINGLE} (only safetensors files "
                "are read; convert GGUF, or pickled .bin files, which can run code)"
            )
        try:
            names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            if not all(isinstance(name, str) and Path(name).name == name and name.endswith(_KIND) for name in names):
                raise ValueError("it names files outside its folder, or of another kind")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._unreadable(folder / _INDEX, error) from None
        return [folder / name for name in sorted(names)]

    def _unreadable(self, file: Path, error: object) -> UserError:
        return UserError(f"model {self.source!r}: {file.name} cannot be read ({error}); get the whole checkpoint")
