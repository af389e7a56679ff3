"""Modes of the search that depend on the model: uniform sizes, and layers streamed through the device."""

from darwinlm.config.recipe import Recipe
from darwinlm.errors import UserError
from darwinlm.models.device_memory import free_memory, kept_bytes
from darwinlm.models.loading import DenseModel, fast_dtype
from darwinlm.runtime import dist
from darwinlm.runtime.progress import log


def wants_uniform(recipe: Recipe, dense: DenseModel) -> bool:
    """Return whether all layers get the same sizes.

    Raises:
        UserError: if an already pruned model has layers that no plan can make uniform.
    """
    if not recipe.wants_uniform(experts=any(site.routed for site in dense.sites)):
        return False
    shapes = {(site.kind, site.size, site.num_units, site.experts) for site in dense.sites}
    kinds = {(site.kind, site.size) for site in dense.sites}
    lacking = any(dense.config.skipped(layer) for layer in range(dense.config.num_hidden_layers))
    alike = len(shapes) == len(kinds) and not lacking
    if not alike and (recipe.search.uniform is True or recipe.export.one_size):
        raise UserError(
            f"model {recipe.model!r}: its layers already differ in size, so search.uniform=true cannot make "
            "them uniform; remove the setting, or start from the dense model"
        )
    if alike and recipe.search.uniform == "auto":
        log.info(
            "search: all layers get the same sizes, so that other engines than transformers can run the "
            "result; search.uniform=false allows different sizes"
        )
    return alike


def streams_layers(recipe: Recipe, dense: DenseModel, uniform: bool) -> bool:
    """Return whether to stream layers through the device, equal on all ranks, and log what is not streamed.

    Raises:
        UserError: if the recipe or model does not support it.
    """
    search = recipe.search
    size, accelerator = dense.compute_dtype.itemsize * dense.parameters, dense.device.type == "cuda"
    length = recipe.data.sequence_length
    kept = kept_bytes(dense.config, length, length, fast_dtype(dense.device))
    # Only the descent keeps activations for gradients, and a uniform search has none.
    passes = search.offloads(size, 0 if uniform else kept, free_memory(dense.device), accelerator=accelerator)
    passes = dist.gather(passes)[0]
    if not passes:
        return False
    if dense.balance > 0 and search.trains:
        if search.offload == "cpu":
            raise UserError(
                "search.offload=cpu: trials cannot add the load-balancing loss that the checkpoint enables; "
                "set output_router_logits to false in its config.json"
            )
        return False
    if any("latency" in size.limits for size in recipe.sizes):
        raise UserError(
            "a latency target needs the model's layers on the device for timing; set search.offload=device, or "
            "limit flops instead"
        )
    log.info(
        "search: layers are kept in CPU memory and streamed through %s one at a time (search.offload=%s)",
        *(dense.device, search.offload),
    )
    if recipe.data.source == "self" and accelerator:
        log.warning(
            "data.source=self generates text with the model, streaming all layers for each token, which is "
            "slow: set data.source to a text"
        )
    recovery = recipe.recovery
    if accelerator and recovery.tokens > 0 and recovery.sharding == "none" and recovery.lora_rank == 0:
        log.warning(
            "recovery does not stream layers: it needs 16 bytes per parameter on %s; see darwinlm plan, or set "
            "recovery.lora_rank, recovery.sharding=fsdp or recovery.tokens=0",
            dense.device,
        )
    return True
