"""Operations counted, as an accelerator would run them."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what an accelerator would launch, and what would make it wait for a value."""

    VIEWS = frozenset(
        {"_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "expand", "permute"}
        | {"select", "slice"}
        | {"split", "squeeze", "t", "transpose", "unsqueeze", "view"}
    )
    WAITS = frozenset(["_linalg_check_errors", "_local_scalar_dense", "masked_select", "nonzero"])

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        result = function(*args, **(kwargs or {}))
        # What is on the meta device runs nowhere.
        if name not in self.VIEWS and not (isinstance(result, torch.Tensor) and result.is_meta):
            self.counts[name] += 1
        # A mask as an index is `nonzero` in disguise.
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.counts["nonzero"] += 1
        return result

    @property
    def launches(self):
        return sum(count for name, count in self.counts.items() if name not in self.WAITS)

    @property
    def waits(self):
        return sum(count for name, count in self.counts.items() if name in self.WAITS)
