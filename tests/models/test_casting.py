"""Another dtype: what changes, what is shared, and what it takes."""

import copy
from typing import Any

import pytest
import torch

from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model


def test_the_transformer_changes_its_dtype_and_nothing_else(tiny_sparse: Model) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_sparse.state_dict().items()}
    assert cast(tiny_sparse, torch.float32) is tiny_sparse
    narrow = cast(tiny_sparse, torch.bfloat16)
    assert isinstance(narrow, Model) and narrow.dtype == torch.bfloat16
    assert narrow.plan == tiny_sparse.plan and narrow.plans == tiny_sparse.plans
    for name, tensor in narrow.state_dict().items():
        wanted = before[name]
        if name.startswith("transformer.") and wanted.is_floating_point():
            wanted = wanted.to(torch.bfloat16)
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
    assert cast(narrow, torch.bfloat16) is narrow
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_sparse.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_a_decoder_of_its_own_dtype_changes_no_token(
    request: pytest.FixtureRequest, kind: str, dtype: torch.dtype
) -> None:
    model: Model = request.getfixturevalue(kind)
    low = cast(model, torch.float32, decoder=dtype)
    assert (low.tokenizer.decoder_dtype, model.tokenizer.decoder_dtype) == (dtype, torch.float32)
    for name, tensor in low.state_dict().items():
        wanted = dtype if name.startswith(("tokenizer.decoder.", "tokenizer.post_quant_conv.")) else torch.float32
        assert tensor.dtype == (wanted if tensor.is_floating_point() else torch.int64), name
    assert low.transformer.pos_start.data_ptr() == model.transformer.pos_start.data_ptr(), "shared, not copied"
    labels = [0, 1, 2, 3, 4, -1]
    assert torch.equal(low.generate_tokens(labels, seed=4), model.generate_tokens(labels, seed=4))
    images, exact = low.generate(labels, seed=4), model.generate(labels, seed=4)
    assert images.dtype == torch.float32 and not torch.equal(images, exact)
    torch.testing.assert_close(images, exact, rtol=0, atol=0.03)
    assert cast(low, torch.float32, decoder=dtype) is low


def test_it_samples_what_a_converted_model_samples(tiny_model: Model) -> None:
    wanted = copy.deepcopy(tiny_model)
    wanted.transformer.to(torch.bfloat16)
    drawn = cast(tiny_model, torch.bfloat16).generate_tokens([0, 1, 2], seed=4, sampling=wanted.sampling_with(cfg=2.0))
    assert torch.equal(drawn, wanted.generate_tokens([0, 1, 2], seed=4, sampling=wanted.sampling_with(cfg=2.0)))


def test_there_is_no_second_copy_in_the_old_dtype(tiny_model: Model, memory_watch: Any) -> None:
    with memory_watch as watch:
        cast(tiny_model, torch.bfloat16)
    there = sum(tensor.nbytes for tensor in tiny_model.state_dict().values())  # looked at, so counted
    tensors = list(tiny_model.transformer.state_dict().values())
    weights, largest = sum(tensor.nbytes for tensor in tensors), max(tensor.nbytes for tensor in tensors)
    assert 0.45 * weights < watch.peak - there <= weights // 2 + largest
