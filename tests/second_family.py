"""A second family, made for the tests alone: nothing of it is in the library.

RMSNorm, rotary positions, cross-attention to several rows of a condition, FFNs without biases, tokens of bits, maps of
any shape: oblong ones, or a one-dimensional pyramid of levels (n, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from actvar_convert.models.alphabet import Bits
from actvar_convert.models.base import Call, Entries, Guidance, Residual, Sampling, Schedule, Slot, Span, last_states
from actvar_convert.models.model import Model

WORDS = 3
"""Rows of a condition."""


class Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    depth: int = 2
    width: int = 32
    hidden: int = 64
    heads: int = 2
    bits: int = 4
    maps: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 3), (3, 5))

    @cached_property
    def schedule(self) -> Schedule:
        return Schedule(self.maps)

    @property
    def num_scales(self) -> int:
        return len(self.maps)


class Feed(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.fc2 = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    """x += self-attention(norm x); x += cross-attention(norm x, words); x += ffn(norm x)."""

    ffn: nn.Module

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.ask, self.tell = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross = nn.Linear(width, width)
        self.ffn = Feed(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def context(self, prepared: Tensor) -> Tensor:
        return prepared

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Tensor:
        q, k, v = (self._heads(part) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        assert call.table is not None
        angle = call.table.unsqueeze(1)
        q, k = _turned(q, angle), _turned(k, angle)
        if call.slot is not None:
            k, v = call.slot.append(k, v)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask(x.device))
        out: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, context: Tensor, call: Call) -> Tensor:
        x = x + self.attend(x, context, call)
        k, v = (self._heads(part) for part in self.tell(context).chunk(2, -1))
        found = F.scaled_dot_product_attention(self._heads(self.ask(self.norms[1](x))), k, v)
        x = x + self.cross(found.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[2](x), call.span)

    def residuals(self, context: Tensor) -> list[Residual]:
        ffn: Any = self.ffn
        return [Residual(self.out, None), Residual(self.cross, None), Residual(ffn.fc2, None)]


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


class Writer(nn.Module):
    """The backbone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = shape
        self.embed, self.begin = nn.Linear(shape.bits, shape.width), nn.Parameter(torch.randn(1, 1, shape.width))
        self.blocks = nn.ModuleList(Layer(shape) for _ in range(shape.depth))
        self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, 2 * shape.bits)

    def prepare(self, condition: Entries) -> Tensor:
        return condition.values

    def table(self, schedule: Schedule, begin: int, end: int) -> Tensor:
        pairs = self.config.width // self.config.heads // 2
        places = [(y / h, x / w) for h, w in schedule.maps for y in range(h) for x in range(w)]
        rates = torch.arange(1, pairs + 1) * math.pi
        return torch.tensor(places[begin:end]).sum(-1, keepdim=True).mul(rates).unsqueeze(0)

    def slots(self, rows: int, schedule: Schedule) -> list[Slot]:
        size = self.config.width // self.config.heads
        shape = (rows, self.config.heads, schedule.total, size)
        return [Slot(shape, self.begin.device, self.begin.dtype) for _ in self.blocks]

    def states(self, prepared: Tensor, inputs: Tensor, schedule: Schedule) -> Tensor:
        first = self.begin.expand(len(prepared), schedule.lengths[0], -1)
        return torch.cat((first, self.embed(inputs)), 1)

    def next_states(self, prepared: Tensor, given: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        if given is None:
            return self.begin.expand(len(prepared), schedule.lengths[0], -1)
        out: Tensor = self.embed(given)
        return out.repeat(len(prepared) // len(given), 1, 1)

    def before_head(self, x: Tensor, prepared: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def logits(self, x: Tensor, prepared: Tensor) -> Tensor:
        out: Tensor = self.head(self.before_head(x, prepared))
        return out.float()

    def forward(self, words: Entries, inputs: Tensor) -> Tensor:
        prepared, schedule = self.prepare(words), self.config.schedule
        x = self.states(prepared, inputs, schedule)
        call = Call(schedule.span(schedule.scales_in(x.shape[1])), self.table(schedule, 0, x.shape[1]))
        return self.logits(last_states(self.blocks, x, prepared, call), prepared)


class Paper(nn.Module):
    """The tokenizer: signs of a feature map, residual by residual; three of its channels are the image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config, self.paint = shape, nn.Conv2d(shape.bits, 3, 1)

    @property
    def decoder_parts(self) -> list[nn.Module]:
        return [self.paint]

    def accumulate(self, f_hat: Tensor | None, tokens: Tensor, scale: int, schedule: Schedule) -> Tensor:
        signs = (2.0 * tokens - 1).transpose(1, 2).reshape(len(tokens), -1, *schedule.maps[scale])
        added = F.interpolate(signs, size=schedule.maps[-1], mode="bilinear") / 2**scale
        return added if f_hat is None else f_hat + added

    def next_input(self, f_hat: Tensor, scale: int, schedule: Schedule) -> Tensor:
        return F.interpolate(f_hat, size=schedule.maps[scale], mode="area").flatten(2).transpose(1, 2)

    def images(self, f_hat: Tensor) -> Tensor:
        return torch.sigmoid(self.paint(f_hat)).float()

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        return schedule.maps[-1]


class Writing:
    """The family."""

    name, config_type, tokenizer_config_type = "writing", Shape, Shape

    def backbone(self, config: Shape) -> Writer:
        return Writer(config)

    def tokenizer(self, config: Shape) -> Paper:
        return Paper(config)

    def alphabet(self, config: Shape) -> Bits:
        return Bits(config.bits)

    def guidance(self, config: Shape, sampling: Sampling, *, folded: bool) -> Guidance:
        return Guidance((sampling.cfg - 1,) * config.num_scales, 1 if folded else 2)

    def condition(self, config: Shape, given: Entries | Sequence[int]) -> Entries:
        return given if isinstance(given, Entries) else self._words(config, list(given))

    def balanced(self, config: Shape, count: int) -> Entries:
        return self._words(config, list(range(count)))

    def _words(self, config: Shape, seeds: list[int]) -> Entries:
        made = [torch.randn(WORDS, config.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return Entries(torch.stack(made), torch.zeros(WORDS, config.width))

    def classes(self, config: Shape) -> None:
        return None

    def image_bytes(self, config: Shape, tokenizer: Shape, itemsize: int, rows: int) -> int:
        return rows * config.schedule.total * config.width * config.depth * 8 * itemsize

    def costs(self, config: Shape) -> Costs:
        return Costs(config)

    def decoder_macs(self, tokenizer: Shape) -> int:
        return 3 * tokenizer.bits * tokenizer.schedule.lengths[-1]


@dataclass(frozen=True)
class Costs:
    config: Shape

    def block(self, kept: int, context: int) -> dict[str, int]:
        width = self.config.width
        cross = 2 * width * width * kept + 2 * kept * WORDS * width
        return {
            "attention_projections": 4 * width * width * kept,
            "attention_products": 2 * kept * context * width,
            "cross_attention": cross,
        }

    def ffn(self) -> int:
        return 2 * self.config.width * self.config.hidden

    def scale(self, scale: int) -> dict[str, int]:
        return {"head": self.config.schedule.lengths[scale] * self.config.width * 2 * self.config.bits}

    def once(self, scale: int) -> dict[str, int]:
        return {"word_embedding": self.config.schedule.lengths[scale] * self.config.bits * self.config.width}

    def block_once(self) -> dict[str, int]:
        return {"cross_attention": 2 * self.config.width**2 * WORDS}

    def image(self) -> dict[str, int]:
        return {}


def writing_model(shape: Shape | None = None) -> Model:
    """A small dense model of this family with random weights."""
    shape, family = shape or Shape(), Writing()
    torch.manual_seed(0)
    model = Model(family.backbone(shape), family.tokenizer(shape), Sampling(cfg=2.0))
    for parameter in model.transformer.parameters():
        parameter.data.mul_(2)  # so that what is left out can be told
    return model.eval().requires_grad_(False)
