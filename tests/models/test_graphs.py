"""Generation as CUDA graphs: what they need, checked everywhere, and what they sample, checked if there is a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from actvar_convert.errors import InputError
from actvar_convert.kernels import expert_ffn
from actvar_convert.models.base import Sampling
from actvar_convert.models.generation import Generation
from actvar_convert.models.graphs import RECORDINGS_KEPT, RecordedGeneration
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.sampling import Noise
from actvar_convert.models.var.labels import Labels

LABELS = [0, 1, 2, 3, 4, -1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def without_values(module: nn.Module) -> None:
    """Swaps every tensor of a module for one of the same shape and format; under FakeTensorMode they have no values."""
    for each in module.modules():
        for table in (each._parameters, each._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    table[name] = nn.Parameter(empty, requires_grad=False) if table is each._parameters else empty


def steps(model: Model, device: str) -> None:
    """Every step of a generation of three images."""
    labels = Labels.of(torch.zeros(3, dtype=torch.int64, device=device), model.config.classes)
    under_way = Generation(model, labels, Sampling(1.5, top_k=9, top_p=0.9))
    config = model.config
    for scale, length in enumerate(config.schedule.lengths):
        drawn = under_way.step(scale, torch.empty(3, length, config.vocab, device=device))
        assert drawn.shape == (3, length) and drawn.device.type == device


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_no_step_reads_a_value_back(request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Model = request.getfixturevalue(kind)
    model.transformer.to(torch.bfloat16)
    monkeypatch.setattr(expert_ffn, "pick_backend", lambda *_: "masked")
    with torch.inference_mode(), FakeTensorMode():
        without_values(model)
        steps(model, "cpu")


def test_no_step_of_a_static_plan_reads_a_value_back(tiny_sparse: Model) -> None:
    blocks = tuple(block.model_copy(update={"routed": (0, 0, 0, 0)}) for block in tiny_sparse.plan.blocks)
    plan = tiny_sparse.plan.model_copy(update={"blocks": blocks})
    model = fresh_sparse(tiny_sparse.config, tiny_sparse.tokenizer, {"static": plan}, "static").eval()
    with torch.inference_mode(), FakeTensorMode():
        without_values(model)
        steps(model, "cpu")


def test_the_check_sees_a_value_that_is_read(tiny_sparse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ffn, "pick_backend", lambda *_: "loop")  # counts rows on the host
    read = pytest.raises((DynamicOutputShapeException, DataDependentOutputException))
    with torch.inference_mode(), FakeTensorMode(), read:
        without_values(tiny_sparse)
        steps(tiny_sparse, "cpu")


def test_no_graphs_on_a_cpu(tiny_model: Model) -> None:
    for verb in (tiny_model.generate, tiny_model.generate_tokens):
        with pytest.raises(InputError, match="CUDA graphs, and the model is on cpu") as caught:
            verb([0], compile=True)
        assert "leave it out" in str(caught.value)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="autocast") as caught:
        tiny_model.generate([0], compile=True)
    assert len(caught.value.problems) == 2


def test_a_plan_tells_recordings_apart(tiny_sparse: Model) -> None:
    keys = set()
    for name in ("default", "all"):
        tiny_sparse.use_plan(name)
        keys.add(tiny_sparse.plan_key)
    assert len(keys) == 2


def test_a_copy_of_a_model_has_recordings_of_its_own(tiny_model: Model) -> None:
    tiny_model.recordings._kept["something"] = object()
    assert not copy.deepcopy(tiny_model).recordings._kept
    tiny_model.recordings.clear()
    assert not tiny_model.recordings._kept


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_graphs_sample_what_the_plain_path_samples(
    request: pytest.FixtureRequest, kind: str, dtype: torch.dtype
) -> None:
    model: Model = request.getfixturevalue(kind).cuda()
    model.to(dtype)
    exact = dtype == torch.float32
    for seed, labels in ((1, LABELS), (2, LABELS[::-1]), (1, LABELS)):
        for sampling in (None, Sampling(3.0, 9, 0.9)):
            expected = model.generate_tokens(labels, seed=seed, chunk=4, sampling=sampling)
            tokens = model.generate_tokens(labels, seed=seed, chunk=4, compile=True, sampling=sampling)
            assert float((tokens == expected).double().mean()) >= (1.0 if exact else 0.9)
            images = model.generate(labels, seed=seed, chunk=4, compile=True, sampling=sampling)
            torch.testing.assert_close(images, model.decode(tokens), rtol=0, atol=1e-4 if exact else 0.05)
    assert len(model.recordings._kept) == RECORDINGS_KEPT


@needs_gpu
def test_pieces_of_a_chunk_sample_alike_on_a_gpu(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model.cuda()
    whole = model.generate_tokens(LABELS, seed=3)
    for at_once in (1, 4):
        with monkeypatch.context() as patch:
            patch.setattr(Model, "images_at_once", lambda model, own=at_once: own)
            for graphs in (False, True):
                assert torch.equal(model.generate_tokens(LABELS, seed=3, compile=graphs), whole)
    on_cpu = model.generate_tokens(LABELS, seed=3, noise="cpu")
    assert torch.equal(model.generate_tokens(LABELS, seed=3, noise="cpu", compile=True), on_cpu)
    assert not torch.equal(on_cpu, whole)


@needs_gpu
def test_weights_may_change_or_move(tiny_model: Model) -> None:
    model = tiny_model.cuda()
    model.generate_tokens(LABELS, compile=True)
    model.transformer.head.weight.mul_(-1)
    assert torch.equal(model.generate_tokens(LABELS, compile=True), model.generate_tokens(LABELS))
    model.transformer.to(torch.float64).to(torch.float32)
    assert torch.equal(model.generate_tokens(LABELS, compile=True), model.generate_tokens(LABELS))


@needs_gpu
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_sparse"])
def test_nothing_waits_for_the_gpu(request: pytest.FixtureRequest, kind: str) -> None:
    model: Model = request.getfixturevalue(kind).cuda()
    model.transformer.to(torch.bfloat16)
    steps(model, "cuda")
    labels = Labels.of(torch.zeros(3, dtype=torch.int64, device="cuda"), model.config.classes)
    recorded = RecordedGeneration(model, labels, Sampling())
    recorded.images()
    with no_waiting():
        steps(model, "cuda")
        recorded.tokens(labels, Noise(0, 3, device="cuda"), slice(0, 3))
        recorded.images()


@needs_gpu
def test_a_plan_that_waits_is_refused(tiny_sparse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_sparse.cuda()
    monkeypatch.setattr(expert_ffn, "pick_backend", lambda *_: "loop")
    with pytest.raises(InputError, match="waits for the device"):
        model.generate_tokens(LABELS, compile=True)
    assert torch.cuda.get_sync_debug_mode() == 0
