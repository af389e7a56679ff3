"""The one short training loop: trials use it; recovery uses the Hugging Face Trainer."""

import math

import torch
from torch import Tensor

from darwinlm.adapters.modeling_darwinlm import DarwinLMForCausalLM


def train_briefly(model: DarwinLMForCausalLM, blocks_BT: Tensor, *, learning_rate: float, batch_size: int) -> float:
    """Train `model` in place on next-token loss, once over `blocks_BT`, with AdamW and a constant learning rate.

    Weights and computation are float32: at a learning rate of 1e-5 a bfloat16 weight of 0.02 could not move.

    Args:
        model: trainable, float32.
        blocks_BT: token ids, blocks * tokens, on any device.
        learning_rate: AdamW's, without weight decay.
        batch_size: blocks in one optimiser step.

    Returns:
        The last step's loss in nats; infinite if the training diverged (the model is then useless).
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    loss = math.nan
    for batch_BT in blocks_BT.split(batch_size):
        batch_BT = batch_BT.to(model.device, torch.long)
        output = model(input_ids=batch_BT, labels=batch_BT, use_cache=False)
        output.loss.backward()
        loss = output.loss.item()
        if not math.isfinite(loss):
            return math.inf
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return loss
