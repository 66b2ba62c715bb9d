"""Generation as CUDA graphs: one per scale and one for the decoder, recorded once and replayed from then on.

A batch is some thousand small kernels; started one by one from Python they cost more than they compute. A graph starts
all kernels of a scale in one call. Its shapes, addresses and Python branches are those of the recording, so a recording
serves one number of images, one sampling, one plan, one dtype and one set of weights in memory.

Between two replays only the random numbers of the next scale are made; nothing waits for the device.

No GPU has timed them yet. They stay only if ``benchmarks/gpu.py`` shows that they beat ``torch.compile`` of the blocks.

On a CPU there is nothing to record, and ``torch.compile`` made a block slower (docs/experiments.md, 2026-11-23).

Shapes: B images, L_s tokens of scale s, V codebook size.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.models.base import Sampling
from actvar_convert.models.generation import Generation
from actvar_convert.models.sampling import Noise

RECORDINGS_KEPT = 2
"""Recordings that a model keeps, the last used ones: the pieces of a large batch and their smaller remainder.

Each holds the memory that its images need under way (``images_at_once``) and the random numbers of its largest scale.
"""


class RecordedGeneration:
    """Graphs for one number of images.

    Args:
        model: on one CUDA device.
        condition: of B images, such as those to come; a copy of it is what graphs read.
        sampling: how tokens are sampled.

    Raises:
        InputError: a step of this plan or dtype waits for the device, so it cannot be recorded.
    """

    def __init__(self, model: Any, condition: Any, sampling: Sampling) -> None:
        self._model, self._sampling, self._device = model, sampling, model.device
        schedule, outcomes = model.schedule, model.alphabet.outcomes
        images, size = len(condition), math.prod(outcomes)
        self._condition = condition.to(self._device).rows(torch.arange(images, device=self._device))
        drawn = torch.ones(images * max(schedule.lengths) * size, device=self._device)
        self._noise = [drawn[: images * length * size].view(images, length, *outcomes) for length in schedule.lengths]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._tokens: list[Tensor] = []
        self._decoder: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            self._warm_up(self._tokens_as_written)
            self._record_scales()

    def tokens(self, condition: Any, noise: Noise, rows: slice) -> Tensor:
        """Pyramids [B, L, ...] of some rows of a chunk; ``images`` shows them until the next call."""
        outcomes = self._model.alphabet.outcomes
        with torch.cuda.device(self._device):
            self._condition.copy_(condition)
            for scale, graph in enumerate(self._graphs):
                own = self._noise[scale]
                own.copy_(noise.exponential(scale, own.shape[1], outcomes)[rows])
                graph.replay()
        return torch.cat(self._tokens, dim=1)

    def images(self) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of the tokens just sampled; the next call overwrites them."""
        with torch.cuda.device(self._device):
            if self._decoder is None:
                self._warm_up(self._decoded)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    images = self._decoded()
                self._decoder = graph, images
            graph, images = self._decoder
            graph.replay()
        return images

    def _decoded(self) -> Tensor:
        images: Tensor = self._model.decoded(torch.cat(self._tokens, dim=1))
        return images

    def _start(self) -> Generation:
        return Generation(self._model, self._condition, self._sampling)

    def _tokens_as_written(self) -> list[Tensor]:
        under_way = self._start()
        return [under_way.step(scale, noise) for scale, noise in enumerate(self._noise)]

    def _record_scales(self) -> None:
        """One graph per scale. What one leaves for the next keeps its place in the pool that they share: they are
        replayed in the order of the recording, and memory that is given back meanwhile serves later graphs alone.
        """
        under_way: Generation | None = None
        for scale, noise in enumerate(self._noise):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                under_way = under_way or self._start()
                self._tokens.append(under_way.step(scale, noise))
            self._graphs.append(graph)

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Runs what will be recorded: once so that libraries set themselves up, once to see that nothing waits."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
            with _no_waiting():
                work()
        current.wait_stream(self._stream)
        torch.cuda.synchronize()


class Recordings:
    """The recordings of a model; a copy of the model starts without any."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, RecordedGeneration] = OrderedDict()

    def of(self, model: Any, condition: Any, sampling: Sampling) -> RecordedGeneration:
        """The recording for these settings and so many images, made now if there is none.

        Raises:
            InputError: they cannot be recorded here.
        """
        problems = recording_problems(model.device)
        if problems:
            raise InputError("compile=True cannot be used here; leave it out", problems)
        dtypes = tuple({tensor.dtype: None for tensor in model.parameters()})
        key = (condition.shape, model.schedule, sampling, model.plan_key, dtypes, tuple(_places(model)))
        known = self._kept.pop(key, None)
        if known is None:
            while len(self._kept) >= RECORDINGS_KEPT:
                self._kept.popitem(last=False)
            known = RecordedGeneration(model, condition, sampling)
        self._kept[key] = known
        return known

    def clear(self) -> None:
        """Gives the memory of all recordings back."""
        self._kept.clear()

    def __reduce__(self) -> tuple[type[Recordings], tuple[()]]:
        return Recordings, ()


def recording_problems(device: torch.device) -> list[str]:
    """Why generation cannot be recorded as CUDA graphs, as far as that is known before trying."""
    problems = []
    if device.type != "cuda":
        problems.append(f"it records CUDA graphs, and the model is on {device}")
    if torch.is_autocast_enabled(device.type):
        problems.append("autocast is on, whose copies of weights do not last; cast the model itself")
    return problems


def _places(module: torch.nn.Module) -> Iterator[int]:
    """Addresses of the weights, which is where graphs read them; asked for at every call, so it has to be quick."""
    for table in (module._parameters, module._buffers):
        for tensor in table.values():
            if tensor is not None:
                yield tensor.data_ptr()
    for part in module._modules.values():
        if part is not None:
            yield from _places(part)


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise InputError(
            "compile=True cannot be used with this plan and dtype: a step waits for the device, which computes experts "
            "one by one; leave it out"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
