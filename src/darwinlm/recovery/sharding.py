"""FSDP2: weights, gradients and optimizer states of each layer are sharded over all ranks.

The model is sharded here, before the Trainer sees it, because Accelerate only shards on accelerators: the same code
runs on GPUs and, for tests, on CPUs. The attributes set below tell the Trainer that the model is already sharded.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from darwinlm.config.recipe import RecoveryRecipe
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.models.streaming import move_ends
from darwinlm.recovery.objective import Objective
from darwinlm.runtime import dist


def is_sharded(recipe: RecoveryRecipe) -> bool:
    """Whether the model and its teacher are sharded, which needs several processes."""
    return recipe.sharding != "none" and dist.world_size() > 1


def shard(
    objective: Objective, teacher: PrunedModel | None, device: torch.device, dtype: torch.dtype, *, offload: bool
) -> None:
    """Shard the model of `objective`, and the layers of `teacher`, in place.

    Args:
        objective: float32; its layers are gathered one at a time, in `dtype`; its embeddings and head stay gathered
            from the forward to the end of the backward pass.
        teacher: the objective's teacher; only its layers are sharded, and the rest of it is moved to `device`.
        device: device of this rank; layers are moved there one by one.
        dtype: compute dtype; gradients are accumulated in float32.
        offload: whether to keep this rank's shards of weights, gradients and optimizer states in CPU memory, where the
            optimizer steps too.
    """
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in objective.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=place)
    ends = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(objective, mesh=mesh, mp_policy=ends, offload_policy=place)
    if teacher is not None:
        for layer in teacher.model.layers:
            # Each layer is its own root, and a root would keep its weights gathered.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # FSDP only moves what it shards, and the Trainer does not see the teacher.
        move_ends(teacher, device)
    marks: nn.Module = objective
    marks.is_distributed_loading_by_transformers = True  # type: ignore[assignment]
    marks._is_fsdp_managed_module = True  # type: ignore[assignment]
    marks.config = SimpleNamespace(  # type: ignore[assignment]
        distributed_config=SimpleNamespace(dp_replicate_size=1, tp_size=1)
    )
