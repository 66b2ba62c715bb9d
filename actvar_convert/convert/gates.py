"""Starting values of token gates and of the reconstruction of skipped tokens, by least squares on calibration tokens.

Shapes: P pyramids, L tokens, C width, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actvar_convert.convert.activations import BlockRecord
from actvar_convert.convert.experts import ridge
from actvar_convert.models.config import TokenPyramid
from actvar_convert.models.gate import Reconstruction, TokenGate, upsample_update
from actvar_convert.models.sparse import SparseBlock


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """||after - before|| / ||before|| of every token; [..., C] to [...]."""
    return (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-6)


@torch.no_grad()
def start_gate(block: SparseBlock, record: BlockRecord, pyramid: TokenPyramid) -> None:
    """Fits the gate to the dense block's relative update norms and the reconstruction to its updates."""
    if block.gate is None or block.reconstruction is None:
        return
    scales = [s for s in range(pyramid.num_scales) if _gated(block, s)]
    before = torch.cat([record.before[:, pyramid.slice(s)].flatten(0, 1) for s in scales])
    after = torch.cat([record.after[:, pyramid.slice(s)].flatten(0, 1) for s in scales])
    _start_score(block.gate, before, after)
    _start_reconstruction(block.reconstruction, record, pyramid, scales)


def _gated(block: SparseBlock, scale: int) -> bool:
    return any(plan.blocks[block.index].keep[scale] < 1 for plan in block.ffn.plans.values())


def _start_score(gate: TokenGate, before_TC: Tensor, after_TC: Tensor) -> None:
    weight, bias = ridge(before_TC, relative_update(before_TC, after_TC).unsqueeze(1))
    gate.linear.weight.data.copy_(weight)
    gate.linear.bias.data.copy_(bias)


def _start_reconstruction(
    reconstruction: Reconstruction, record: BlockRecord, pyramid: TokenPyramid, scales: list[int]
) -> None:
    update = record.after - record.before
    inputs, residuals = [], []
    for scale in scales:
        own = update[:, pyramid.slice(scale)]
        if reconstruction.kind in ("previous", "mixture") and scale:
            previous = update[:, pyramid.slice(scale - 1)]
            up = upsample_update(previous, pyramid.sides[scale - 1], pyramid.sides[scale])
            assert up is not None
            alpha = (own * up).sum((0, 1)) / up.square().sum((0, 1)).clamp_min(1e-9)
            reconstruction.alpha.data[scale] = alpha
            own = own - alpha * up
        inputs.append(record.before[:, pyramid.slice(scale)].flatten(0, 1))
        residuals.append(own.flatten(0, 1))
    if reconstruction.kind in ("low_rank", "mixture"):
        down, up_weight = reduced_rank(torch.cat(inputs), torch.cat(residuals), reconstruction.down.out_features)
        reconstruction.down.weight.data.copy_(down)
        reconstruction.up.weight.data.copy_(up_weight)


def reduced_rank(x_TC: Tensor, y_TC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, C] and B [C, r] of the best rank-r map y = B A x in the least-squares sense (reduced-rank regression)."""
    x, y = x_TC.double(), y_TC.double()
    gram = x.T @ x
    gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-9)
    full = torch.linalg.solve(gram, x.T @ y)
    _, vectors = torch.linalg.eigh(full.T @ gram @ full)
    basis = vectors[:, -rank:] if rank else vectors[:, :0]
    return (full @ basis).T.to(x_TC.dtype), basis.to(x_TC.dtype)
