"""Gathering kept tokens and putting all of them back, against one row at a time."""

from collections.abc import Callable

import pytest
import torch

from actvar_convert.kernels.token_gate import merge, merge_reference, take, take_reference

SHAPES = [
    # maps, tokens, width, kept
    (1, 1, 3, 1),
    (1, 1, 3, 0),
    (2, 9, 5, 4),
    (3, 7, 1, 1),
    (2, 16, 8, 0),
    (2, 16, 8, 16),
    (5, 13, 7, 12),
    (0, 4, 3, 2),
]


def drawn(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [B, L, C] that are not contiguous, and positions kept and skipped, each ascending."""
    B, L, C, K = shape
    generator = torch.Generator().manual_seed(L + K)
    x = torch.randn(C, L, B, generator=generator, dtype=torch.float64).permute(2, 1, 0)
    order = torch.rand(B, L, generator=generator).argsort(dim=1)
    return x, order[:, :K].sort(dim=1).values, order[:, K:].sort(dim=1).values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_equal_to_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, kept, skipped = drawn(shape)
    x = x.to(dtype)
    assert not x.is_contiguous() or x.numel() <= max(x.shape)
    for position in (kept, skipped):
        assert torch.equal(take(x, position), take_reference(x, position))
    y, rest = 2 * take(x, kept), -take(x, skipped)
    whole = merge(y, rest, kept, skipped)
    assert torch.equal(whole, merge_reference(y, rest, kept, skipped)) and whole.shape == x.shape
    assert torch.equal(merge(take(x, kept), take(x, skipped), kept, skipped), x), "every token is back at its place"


def test_the_kept_tokens_give_the_dtype() -> None:
    x, kept, skipped = drawn((2, 9, 5, 4))
    y, rest = take(x, kept).to(torch.bfloat16), take(x, skipped)
    whole = merge(y, rest, kept, skipped)
    assert whole.dtype == torch.bfloat16 and torch.equal(whole, merge_reference(y, rest, kept, skipped))


def around_a_block(
    gather: Callable[..., torch.Tensor], scatter: Callable[..., torch.Tensor], *given: torch.Tensor
) -> torch.Tensor:
    """A block on kept tokens, with the update of the scale before and a map of its own for the others."""
    x, update, weight, alpha, kept, skipped = given
    y = gather(x, kept) @ weight
    rest = gather(x, skipped)
    rest = rest + alpha * gather(update, skipped) + rest @ weight.T
    return scatter(y, rest, kept, skipped)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
def test_gradients(shape: tuple[int, ...]) -> None:
    x, kept, skipped = drawn(shape)
    generator = torch.Generator().manual_seed(0)
    width = x.shape[-1]
    more = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (x.shape, (width, width), (width,))]
    probe = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for gather, scatter in ((take, merge), (take_reference, merge_reference)):
        inputs = [tensor.detach().requires_grad_() for tensor in (x, *more)]
        out = around_a_block(gather, scatter, *inputs, kept, skipped)
        (out * probe).sum().backward()
        zeros = [torch.zeros_like(each) if each.grad is None else each.grad for each in inputs]
        results.append([out.detach(), *zeros])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
