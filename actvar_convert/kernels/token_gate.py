"""What a token gate moves: rows of the tokens that a block computes out of a map, and all tokens back to their places.

Whole rows are copied by number, once out and once in; counts are given by shapes, so nothing waits for a device. Both
are differentiable.

Shapes: B maps, L tokens of a map, C width, K kept tokens, M = L - K skipped ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x_BLC: Tensor, position_BK: Tensor) -> Tensor:
    """Rows [B, K, C] of [B, L, C] at the given positions, int64."""
    B, L, C = x_BLC.shape
    return x_BLC.reshape(B * L, C).index_select(0, _row_numbers(position_BK, L)).view(B, position_BK.shape[1], C)


def take_reference(x_BLC: Tensor, position_BK: Tensor) -> Tensor:
    """The same one row at a time."""
    B, K = position_BK.shape
    rows = [x_BLC[b, int(position)] for b in range(B) for position in position_BK[b]]
    return torch.stack(rows).view(B, K, -1) if rows else x_BLC.new_empty(B, K, x_BLC.shape[2])


def merge(kept_BKC: Tensor, skipped_BMC: Tensor, kept_BK: Tensor, skipped_BM: Tensor) -> Tensor:
    """[B, K + M, C] with every token back at its position, in the dtype of the kept ones.

    Args:
        kept_BKC: what a block made of the tokens that it computed.
        skipped_BMC: what stands in for the others.
        kept_BK, skipped_BM: their positions, int64; every position of the map once.
    """
    B, K, C = kept_BKC.shape
    L = K + skipped_BMC.shape[1]
    out = kept_BKC.new_empty(B * L, C)
    out = out.index_copy_(0, _row_numbers(kept_BK, L), kept_BKC.reshape(-1, C))
    return out.index_copy_(0, _row_numbers(skipped_BM, L), skipped_BMC.to(out.dtype).reshape(-1, C)).view(B, L, C)


def merge_reference(kept_BKC: Tensor, skipped_BMC: Tensor, kept_BK: Tensor, skipped_BM: Tensor) -> Tensor:
    """The same one row at a time."""
    B, K, C = kept_BKC.shape
    rows: dict[tuple[int, int], Tensor] = {}
    for source, positions in ((kept_BKC, kept_BK), (skipped_BMC.to(kept_BKC.dtype), skipped_BM)):
        for b in range(B):
            rows |= {(b, int(position)): source[b, i] for i, position in enumerate(positions[b])}
    ordered = [rows[place] for place in sorted(rows)]
    return torch.stack(ordered).view(B, -1, C) if ordered else kept_BKC.new_empty(B, K + skipped_BMC.shape[1], C)


def _row_numbers(position_BK: Tensor, length: int) -> Tensor:
    """Numbers [B * K] of rows in a batch of maps laid end to end; whole rows are copied faster than single numbers."""
    first = torch.arange(0, len(position_BK) * length, length, device=position_BK.device)
    return (position_BK + first.unsqueeze(1)).flatten()
