"""Where the seconds of generation go: exclusive time per component, measured by hooks around modules.

On a GPU every boundary between components waits for the device, so shares are right and the sum is slower than an
undisturbed run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from actvar_convert.models.base import inner
from actvar_convert.models.gate import GatedBlock
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

    def enter(self, component: str) -> None:
        """A component begins."""
        self._charge()
        self._inside.append(component)

    def leave(self) -> None:
        """The component that began last ends."""
        self._charge()
        self._inside.pop()

    @contextmanager
    def running(self, component: str) -> Iterator[None]:
        """A component while the block runs."""
        self.enter(component)
        try:
            yield
        finally:
            self.leave()

    def _charge(self) -> None:
        synchronize(self._device)
        now = self._now()
        if self._inside:
            current = self._inside[-1]
            self.seconds[current] = self.seconds.get(current, 0.0) + now - self._since
        self._since = now


def _parts(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """The modules that are timed, and their components; what surrounds them is charged to sampling."""
    backbone = model.transformer
    yield backbone.head, "head"
    for part in model.tokenizer.decoder_parts:
        yield part, "decoder"
    for module in backbone.modules():
        if isinstance(module, GatedBlock):
            yield module, "gather and scatter"
        elif hasattr(module, "component"):
            yield module, module.component
    for block in backbone.blocks:
        yield inner(block), "norms and residuals"
        yield inner(block).ffn, "ffn"


@contextmanager
def timed_components(model: Model) -> Iterator[ComponentClock]:
    """Times the components of whatever the model does inside the ``with``, by hooks around its modules."""
    clock, handles = ComponentClock(model.device), []
    for module, component in _parts(model):
        handles += [
            module.register_forward_pre_hook(lambda *_, own=component: clock.enter(own)),
            module.register_forward_hook(lambda *_: clock.leave()),
        ]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def split_components(model: Model, batch: int, *, repeats: int = 3, seed: int = 0) -> ComponentTimes:
    """Time of ``generate`` by component.

    Args:
        model: dense or sparse.
        batch: images generated at once, labels in turn.
        repeats: runs after one to warm up; the one with the median total is reported.
        seed: of the sampled tokens.
    """
    condition = model.family.balanced(model.config, batch)
    runs = []
    for _ in range(repeats + 1):
        with timed_components(model) as clock, clock.running(SAMPLING):
            model.generate(condition, seed=seed, chunk=batch)
        runs.append(clock.seconds)
    chosen = sorted(runs[1:], key=lambda seconds: sum(seconds.values()))[(repeats - 1) // 2]
    return ComponentTimes(
        batch=batch,
        dtype=next(name for name, dtype in DTYPES.items() if dtype == model.dtype),
        side="sparse" if model.is_sparse else "dense",
        ms={name: 1000 * seconds for name, seconds in sorted(chosen.items(), key=lambda item: -item[1])},
        total_ms=1000 * sum(chosen.values()),
    )
