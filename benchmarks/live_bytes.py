"""Count the peak memory of a search on fake tensors, for models that are larger than this machine's memory.

    python benchmarks/scaling.py --trace --gpu-memory 80

The code of the stages runs on fake tensors, which have shapes, dtypes and devices but no content. Every storage is
counted from its creation until it is freed, on a simulated accelerator and in CPU memory. Decisions that depend on
content are replaced: level sizes are those of a uniform plan, learning rates are given, and a fake database returns
cuts of the right shapes. The result is a lower bound for the memory of a real run: memory fragmentation, libraries and
kernel workspaces come on top (`darwinlm plan` adds 15% and 0.65 GB for them).
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import darwinlm.models.cutting as cutting
import darwinlm.models.families as families
import darwinlm.models.loading as loading
import darwinlm.search.neighbourhood as neighbourhood
import darwinlm.search.sensitivity as sensitivity
import darwinlm.search.trial_training as trial_training
import darwinlm.search.trials as trials
from darwinlm.database.levels import level_sizes
from darwinlm.models.cutting import Cut, count_parameters
from darwinlm.models.heads import Head
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.models.sites import Site
from darwinlm.plan import SiteLevels, Space

GPU = "meta"
"""Device type of the simulated accelerator, which all code that distinguishes devices accepts."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all live storages by device type, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.empty = False
        """True while a model without weights is built, which is on the meta device too and needs no memory."""
        self._sizes: dict[int, tuple[str, int]] = {}
        """Device type and bytes of each live storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # any number: fake tensors have no content
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def restart(self) -> None:
        """Reset the peak to the present bytes."""
        self.peak = Counter(self.now)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew whose size has changed: FSDP frees gathered weights in this way."""
        if storage._cdata in self._sizes:
            device, size = self._sizes[storage._cdata]
            self._add(storage._cdata, device, storage.nbytes() - size)

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = tensor.device.type, 0
            self._add(storage._cdata, tensor.device.type, 0 if self.empty else storage.nbytes())
            weakref.finalize(storage, self._forget, storage._cdata)

    def _add(self, key: int, device: str, size: int) -> None:
        self._sizes[key] = device, self._sizes[key][1] + size
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])

    def _forget(self, key: int) -> None:
        device, size = self._sizes.pop(key)
        self.now[device] -= size


class _Attention(torch.autograd.Function):
    """Save what a fused attention kernel saves for its gradient: inputs, output, one number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return found


class FakeCheckpoint:
    """Fake checkpoint: returns tensors of the right shapes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def read(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.empty(self._shapes[name], device=device, dtype=dtype) for name in names}

    def map(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self.read(names, torch.device("cpu"), torch.bfloat16)


class FakeDatabase:
    """Fake database: returns cuts of the right shapes, memory-mapped on the CPU, and keeps none on the device."""

    def __init__(
        self,
        live: LiveBytes,
        config: PrunedConfig,
        sites: Sequence[Site],
        shapes: Mapping[str, tuple[int, ...]],
        levels: int,
    ):
        self._live, self._rows = live, config.hidden_size
        self._space = _space(sites, shapes, levels)

    def space(self, sites: Sequence[Site]) -> Space:
        return self._space

    def free(self) -> None:
        """Do nothing: no cuts are kept."""

    def cut(self, site: Site, level: int, device: torch.device) -> Cut:
        (levels,) = (one for one in self._space.sites if one.name == site.name)
        units = levels.units[level]
        columns = site.columns(units)
        self._live.empty = device.type == "cpu"
        weight = torch.empty(self._rows, columns, device=device, dtype=torch.bfloat16) if units else None
        self._live.empty = False
        return Cut(kept=tuple(range(units)), output_weight=weight)

    def cuts(self, sites: Sequence[Site], plan: Sequence[int], device: torch.device) -> dict[str, Cut]:
        return {site.name: self.cut(site, level, device) for site, level in zip(sites, plan, strict=True) if level}


def _space(sites: Sequence[Site], shapes: Mapping[str, tuple[int, ...]], levels: int) -> Space:
    found = []
    for site in sites:
        units = level_sizes(site, levels)
        parameters = tuple(count_parameters(site, shapes, range(kept)) for kept in units)
        nothing = (0.0,) * len(units)
        found.append(
            SiteLevels(
                name=site.name, layer=site.layer, kind=site.kind, units=units, parameters=parameters,
                kv_elements=(0,) * len(units), errors=nothing,
            )
        )  # fmt: skip
    every = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Space(sites=tuple(found), fixed_parameters=every - sum(site.parameters[0] for site in found))


@contextmanager
def as_on_a_gpu(live: LiveBytes, memory: float) -> Iterator[None]:
    """Patch device queries to answer as on a GPU."""

    def free(device: torch.device) -> float:
        return memory - live.now[GPU] if device.type == GPU else 1e15

    class Generator:
        def __init__(self, device: object = None) -> None: ...

        def manual_seed(self, seed: int) -> None:
            """Do nothing: no random numbers are needed."""

    def apply(module: torch.nn.Module, convert: Any, recurse: bool = True) -> torch.nn.Module:
        """Replace `Module._apply` without swapping tensors, which fails for fake tensors with other references."""
        for child in module.children():
            child._apply(convert)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    found = convert(parameter.data)
                if found.device != parameter.device or found.dtype != parameter.dtype:
                    module._parameters[name] = torch.nn.Parameter(found, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = convert(buffer)
        return module

    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """Copy a tensor without its data pointer, which fake tensors do not have."""
        found = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            found = torch.nn.Parameter(found, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = found
        return found

    own, own_resize = torch.tensor, torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        found = own_resize(storage, size)
        live.resized(storage)
        return found

    def tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """Call `torch.tensor`, which bypasses the dispatch modes, and move the result."""
        return own(data, dtype=dtype).to(device)

    def nothing(build: Any) -> Any:
        def empty(*arguments: Any) -> Any:
            live.empty = True
            try:
                return build(*arguments)
            finally:
                live.empty = False

        return empty

    places = (loading, neighbourhood, sensitivity, trial_training, trials)
    with ExitStack() as stack:
        for place in places:
            if hasattr(place, "fast_dtype"):
                stack.enter_context(patch.object(place, "fast_dtype", lambda device: torch.bfloat16))
            if hasattr(place, "free_memory"):
                stack.enter_context(patch.object(place, "free_memory", free))
        for place in (cutting, loading, families):
            for name in ("empty_model", "empty_layer"):
                if hasattr(place, name):
                    stack.enter_context(patch.object(place, name, nothing(getattr(place, name))))
        stack.enter_context(patch.object(Head, "float", lambda head: replace(head, wide=True)))
        stack.enter_context(patch.object(torch, "Generator", Generator))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention))
        stack.enter_context(patch.object(torch.nn.Module, "_apply", apply))
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        stack.enter_context(patch.object(Tensor, "__deepcopy__", deepcopy))
        yield
