"""What identifies a module: its tensors, and the values that belong to it."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def state_fingerprint(module: nn.Module, **context: object) -> str:
    """SHA-256 of every tensor of a module (name, shape, dtype, bytes) and of JSON values that belong to it."""
    digest = hashlib.sha256(json.dumps(context, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
