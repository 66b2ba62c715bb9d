"""Linear layers for inference, with the tanh-GELU of an FFN in the same operation if the machine has that.

On a CPU oneDNN adds the bias and applies the GELU while the product is still in cache; written as three operations a
GELU alone costs a third to three quarters of the product before it (docs/experiments.md, 2026-11-23). On a GPU cuBLASLt
does, in 16-bit dtypes; that saves writing and reading the hidden values once.

Shapes: R rows (any leading dimensions), C inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes in which the fused operation was measured to win on a CPU."""


def linear_gelu_reference(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """gelu(x W^T + b) as it is written, differentiable."""
    return F.gelu(F.linear(x_RC, weight_OC, bias_O), approximate="tanh")


def linear_gelu(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """gelu(x W^T + b), fused if that is possible and no gradient is wanted; [..., O]."""
    if fuses(x_RC, weight_OC):
        return _pointwise(x_RC, weight_OC, bias_O, "gelu", "tanh")
    if bias_O is not None and fuses_on_gpu(x_RC, weight_OC):
        return _epilogue(x_RC, weight_OC, bias_O)
    return linear_gelu_reference(x_RC, weight_OC, bias_O)


def linear(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b; [..., O]. On a CPU in fp32 through oneDNN too: its threads are those of every other operation.

    What ``F.linear`` takes there is as fast alone, but was seen two to four times slower between other operations.
    """
    if x_RC.dtype == torch.float32 and fuses(x_RC, weight_OC):
        return _pointwise(x_RC, weight_OC, bias_O, "none", "")
    return F.linear(x_RC, weight_OC, bias_O)


class Linear(nn.Linear):
    """``nn.Linear`` by way of ``linear``."""

    def forward(self, x_RC: Tensor) -> Tensor:
        return linear(x_RC, self.weight, self.bias)


def fuses(x_RC: Tensor, weight_OC: Tensor) -> bool:
    """Whether the fused operation takes these: on a CPU, one dtype, whole weights (or the transpose of whole
    ones), nobody watching. With a gap between rows it would be right too, and a thousand times slower."""
    return (
        x_RC.device.type == "cpu"
        and x_RC.dtype in FUSED_DTYPES
        and x_RC.dtype == weight_OC.dtype
        and x_RC.numel() > 0
        and (weight_OC.is_contiguous() or weight_OC.t().is_contiguous())
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not watched()
        and _available(x_RC.dtype)
    )


def fuses_on_gpu(x_RC: Tensor, weight_OC: Tensor) -> bool:
    """Whether cuBLASLt takes these: on a CUDA device, one 16-bit format, no gradient wanted, nobody watching."""
    return (
        x_RC.device.type == "cuda"
        and x_RC.dtype in (torch.bfloat16, torch.float16)
        and x_RC.dtype == weight_OC.dtype
        and x_RC.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not watched()
        and _epilogue_right(x_RC.device, x_RC.dtype)
    )


def watched() -> bool:
    """Whether operations are being compiled, traced or counted: then only the documented ones are used."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _pointwise(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor | None, activation: str, kind: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x_RC, weight_OC, bias_O, activation, [], kind)
    return out


def _epilogue(x_RC: Tensor, weight_OC: Tensor, bias_O: Tensor) -> Tensor:
    """Product, bias and GELU in one operation; the GELU is the tanh one on a CUDA device alone."""
    flat = torch._addmm_activation(bias_O, x_RC.reshape(-1, x_RC.shape[-1]), weight_OC.t(), use_gelu=True)
    return flat.view(*x_RC.shape[:-1], -1)


@functools.cache
def _epilogue_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operation on this device and computes what it should."""
    values = torch.linspace(-1, 1, 64 * 32, device=device).to(dtype)
    x, weight, bias = 4 * values.view(64, 32), values[: 16 * 32].view(16, 32), values[:16]
    try:
        got = _epilogue(x, weight, bias)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(got.float(), linear_gelu_reference(x, weight, bias).float(), rtol=0.02, atol=0.05)


@functools.cache
def _available(dtype: torch.dtype) -> bool:
    """Whether this build of torch on this processor has the operation and computes what it should."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    values = torch.linspace(-1, 1, 48).to(dtype)
    x, weight, bias = values.view(3, 16), values[:32].view(2, 16), values[:2]
    try:
        got = _pointwise(x, weight, bias, "gelu", "tanh")
    except (RuntimeError, TypeError):
        return False
    return torch.allclose(got.float(), linear_gelu_reference(x, weight, bias).float(), atol=0.05)
