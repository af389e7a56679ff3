"""Deterministic kernels, for bit-identical results."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from darwinlm.errors import UserError

_WORKSPACES = (":4096:8", ":16:8")
"""cuBLAS workspace settings with a deterministic order of additions, on one or several streams."""


@contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Use only deterministic PyTorch algorithms in the block, if `wanted`.

    Float32 matrix products are not rounded to TF32, cuDNN does not choose kernels by benchmarking, and attention does
    not use cuDNN; PyTorch's flash and memory-efficient attention have deterministic modes.

    cuBLAS reads its setting when a process first uses a GPU, so Python programs should enter this block before that.

    Raises:
        UserError: if an operation has no deterministic algorithm on this device.
    """
    if not wanted:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _WORKSPACES[0]
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    timed, attention = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split()[0]
        raise UserError(
            f"deterministic=true: {operation} has no deterministic implementation on this device; remove the setting"
        ) from error
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = timed
        torch.backends.cuda.enable_cudnn_sdp(attention)
