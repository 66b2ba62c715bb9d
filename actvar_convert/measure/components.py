"""Where the seconds of generation go: exclusive time per component, measured by wrapping public methods.

The wrappers are instance attributes for the time of one measurement; the classes stay as they are. On a GPU every
boundary between components waits for the device, so shares are right and the sum is slower than an undisturbed run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from actvar_convert.models.model import Model
from actvar_convert.system.device import DTYPES, synchronize

SAMPLING = "sampling"
"""What remains of generation: guidance, filters, sampling, and the start-up of the cache."""


class ComponentTimes(BaseModel):
    """Milliseconds of one batch, by component; they add up to the total."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: int
    dtype: str
    side: str = Field(description="dense or sparse")
    ms: dict[str, float]
    total_ms: float


class ComponentClock:
    """Exclusive time by component: entering one stops the clock of the one around it."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._now = device, now
        self._inside: list[str] = []
        self._since = 0.0

    @contextmanager
    def running(self, component: str) -> Iterator[None]:
        self._charge()
        self._inside.append(component)
        try:
            yield
        finally:
            self._charge()
            self._inside.pop()

    def _charge(self) -> None:
        synchronize(self._device)
        now = self._now()
        if self._inside:
            current = self._inside[-1]
            self.seconds[current] = self.seconds.get(current, 0.0) + now - self._since
        self._since = now

    def wrapped(self, function: Callable[..., Any], component: str) -> Callable[..., Any]:
        """The function, its time charged to a component."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running(component):
                return function(*args, **kwargs)

        return call


def _boundaries(model: Model) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, method, component) of everything that is timed; what surrounds them is charged to sampling."""
    transformer, quantizer = model.transformer, model.tokenizer.quantize
    yield transformer, "modulation", "adaln"
    yield transformer, "logits", "head"
    yield from ((transformer, method, "embedding") for method in ("first_tokens", "next_tokens"))
    yield from ((quantizer, method, "embedding") for method in ("contribution", "next_input"))
    yield model, "decode", "decoder"
    for block in transformer.blocks:
        assert isinstance(block, Block)
        yield block, "forward", "norms and residuals"
        if isinstance(block, SparseBlock) and block.gate is not None:
            yield block, "_gated", "gather and scatter"
            yield block, "_compute", "norms and residuals"
            yield block, "_take", "gather and scatter"
        for method in ("query_key_value", "attend"):
            yield block.attn, method, "attention"
        yield block.ffn, "forward", "ffn"
        for owner, name in ((block.ffn, "router"), (block, "gate"), (block, "reconstruction")):
            part = getattr(owner, name, None)
            if part is not None:
                yield part, "forward", name
                if name == "gate":
                    yield part, "choose", name


@contextmanager
def timed_components(model: Model) -> Iterator[ComponentClock]:
    """Times the components of whatever the model does inside the ``with``; afterwards the model is as before."""
    clock = ComponentClock(model.device)
    with ExitStack() as undo:
        for module, method, component in _boundaries(model):
            setattr(module, method, clock.wrapped(getattr(module, method), component))
            undo.callback(delattr, module, method)
        yield clock


def split_components(model: Model, batch: int, *, repeats: int = 3, seed: int = 0) -> ComponentTimes:
    """Time of ``generate`` by component.

    Args:
        model: dense or sparse; only its instance attributes change, and only meanwhile.
        batch: images generated at once, labels in turn.
        repeats: runs after one to warm up; the one with the median total is reported.
        seed: of the sampled tokens.
    """
    labels = [index % model.config.classes for index in range(batch)]
    runs = []
    for _ in range(repeats + 1):
        with timed_components(model) as clock, clock.running(SAMPLING):
            model.generate(labels, seed=seed, chunk=batch)
        runs.append(clock.seconds)
    chosen = sorted(runs[1:], key=lambda seconds: sum(seconds.values()))[(repeats - 1) // 2]
    return ComponentTimes(
        batch=batch,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        side="sparse" if model.is_sparse else "dense",
        ms={name: 1000 * seconds for name, seconds in sorted(chosen.items(), key=lambda item: -item[1])},
        total_ms=1000 * sum(chosen.values()),
    )
