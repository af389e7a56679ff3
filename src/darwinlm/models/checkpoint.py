"""Tensors of a checkpoint, read from its safetensors files on demand and never all at once."""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from darwinlm.errors import InvalidTensorError, UserError
from darwinlm.models.families import LAYERS
from darwinlm.runtime.files import digest

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_KIND = ".safetensors"
_SAMPLES = 64
_TEXT_MODELS = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_RENAMED = {
    ".block_sparse_moe.input_linear.weight": ".block_sparse_moe.experts.gate_up_proj",
    ".block_sparse_moe.output_linear.weight": ".block_sparse_moe.experts.down_proj",
    ".block_sparse_moe.router.layer.weight": ".block_sparse_moe.router.weight",
    ".block_sparse_moe.gate.weight": ".mlp.gate.weight",
}
"""Renamed tensors: names in files, and their names in current transformers models."""
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>(gate|up|down)_proj|w[123])\.weight")
_MATRICES = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}
"""For each matrix of a single expert in a file: the fused tensor it belongs to, and its position among the rows there.
"""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def text_name(stored: str) -> str:
    """Return the name that a stored tensor has in transformers' text model; most names are unchanged."""
    for prefix, name in _TEXT_MODELS.items():
        if stored.startswith(prefix):
            stored = name + stored.removeprefix(prefix)
            break
    for old, new in _RENAMED.items():
        stored = stored.replace(old, new)
    return stored


@dataclass(frozen=True, slots=True)
class _Stored:
    """Location of a tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """Safetensors files of a local folder or a Hub model (downloaded if needed).

    Raises:
        UserError: if there are none, or one cannot be read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor by name, known without reading any."""
        self._places: dict[str, list[list[_Stored]]] = {}
        """Stored parts of every tensor: one tensor, or for each expert the tensors whose rows are concatenated."""
        self._dtypes: dict[str, str] = {}
        folder = Path(source) if Path(source).is_dir() else self._download(source)
        experts: dict[str, dict[int, dict[int, _Stored]]] = {}
        for file in self._shards(folder):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (not a dict)
                        part, name = tensors.get_slice(key), text_name(key)
                        stored = _Stored(file, key, tuple(part.get_shape()), part.get_dtype())
                        if (one := _EXPERT.fullmatch(name)) is not None:
                            matrix, place = _MATRICES[one["matrix"]]
                            name = f"{one['experts'].replace('.block_sparse_moe.', '.mlp.')}.{matrix}"
                            experts.setdefault(name, {}).setdefault(int(one["number"]), {})[place] = stored
                        else:
                            self._places[name], self.shapes[name] = [[stored]], stored.shape
                            self._dtypes[name] = stored.dtype
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from None
        for name, by_number in experts.items():
            self._places[name] = [[parts[place] for place in sorted(parts)] for _, parts in sorted(by_number.items())]
            first = self._places[name][0]
            if sorted(by_number) != list(range(len(by_number))) or any(
                [part.shape for part in parts] != [part.shape for part in first] for parts in self._places[name]
            ):
                raise UserError(
                    f"model {source!r}: its files are missing a part of {name}; download the whole checkpoint"
                )
            rows, columns = sum(part.shape[0] for part in first), first[0].shape[1]
            self.shapes[name], self._dtypes[name] = (len(by_number), rows, columns), first[0].dtype

    def some_layers(self, layers: Sequence[int]) -> "Checkpoint":
        """Return the checkpoint of a model that consists of these `layers`, in this order."""
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
        """Reject a checkpoint if one of the `expected` tensors is missing or has another shape. Raises UserError."""
        missing = [name for name in expected if name not in self.shapes]
        if missing:
            more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
            raise UserError(
                f"model {self.source!r}: its files are missing {missing[0]}{more}; download the whole checkpoint"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise UserError(
                    f"model {self.source!r}: {name} has shape {list(self.shapes[name])} in its files, but its "
                    f"config.json implies {list(shape)}"
                )
            if self._dtypes[name] not in _DTYPES:
                raise UserError(
                    f"model {self.source!r}: {name} has dtype {self._dtypes[name]}; use the original "
                    "unquantized checkpoint"
                )

    def map(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name, memory-mapped from their files: all processes of a machine share the pages, which the
        system can drop when memory is short. Experts that are stored separately are copied. Raises UserError."""
        return self._read(names, torch.device("cpu"), None, copied=False)

    def read(self, names: Iterable[str], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return copies of tensors by name, on `device`, in `dtype` or their stored dtype. Raises UserError."""
        return self._read(names, device, dtype, copied=True)

    def _read(
        self, names: Iterable[str], device: torch.device, dtype: torch.dtype | None, *, copied: bool
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[tuple[str, int, int, str]]] = {}
        for name in names:
            if len(self.shapes[name]) == 3 and self._places[name][0][0].shape != self.shapes[name]:
                found[name] = torch.empty(self.shapes[name], device=device, dtype=dtype or _DTYPES[self._dtypes[name]])
            for number, parts in enumerate(self._places[name]):
                row = 0
                for part in parts:
                    by_file.setdefault(part.file, []).append((name, number, row, part.name))
                    row += part.shape[0]
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name, number, row, stored in wanted:
                        tensor = tensors.get_tensor(stored)
                        if name in found:
                            found[name][number, row : row + len(tensor)] = tensor
                        else:
                            # Without a copy, the whole file stays mapped.
                            found[name] = tensor.to(device, dtype, copy=copied)
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from None
        return found

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a fingerprint of the tensors `names`: the shape and up to 64 values of each. Reads every tensor once.

        Raises:
            InvalidTensorError: if a tensor contains NaN or Inf; the message names the first one.
        """
        parts: list[bytes | str] = []
        for name in sorted(names):
            tensor = self.read([name], torch.device("cpu"))[name]
            low, high = tensor.aminmax()
            if not bool(torch.isfinite(low) and torch.isfinite(high)):
                raise InvalidTensorError(f"model {self.source!r}: {name} contains NaN or Inf; repair the checkpoint")
            flat = tensor.flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().contiguous()
            parts += [name, str(tuple(tensor.shape)), sample.numpy().tobytes()]
        return digest(*parts)

    def _download(self, source: str) -> Path:
        try:
            return Path(snapshot_download(source, allow_patterns=["*.safetensors", _INDEX]))
        except Exception as error:  # The Hub client raises many kinds of errors.
            reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
            raise UserError(f"model {source!r}: its weights cannot be downloaded: {reason}") from None

    def _shards(self, folder: Path) -> list[Path]:
        if (folder / _SINGLE).exists():
            return [folder / _SINGLE]
        if not (folder / _INDEX).exists():
            raise UserError(
                f"model {self.source!r}: its weights cannot be loaded: no {_SINGLE} (only safetensors files are "
                "supported; convert GGUF, or pickled .bin files, which can run code)"
            )
        try:
            names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            if not all(isinstance(name, str) and Path(name).name == name and name.endswith(_KIND) for name in names):
                raise ValueError("it lists files outside its folder, or of another type")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._unreadable(folder / _INDEX, error) from None
        return [folder / name for name in sorted(names)]

    def _unreadable(self, file: Path, error: object) -> UserError:
        return UserError(f"model {self.source!r}: {file.name} cannot be read ({error}); download the whole checkpoint")
