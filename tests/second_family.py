"""A second family, made for the tests alone: nothing of it is in the library.

RMSNorm, rotary positions, cross-attention to rows of a condition, FFNs without biases, bits, maps of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from actvar_convert.models.alphabet import Bits
from actvar_convert.models.base import Call, Entries, Guidance, Residual, Sampling, Schedule, Slot, Span, last_states

WORDS = 3  # rows of a condition


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
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    """x += self-attention(norm x); x += cross-attention(norm x, words); x += ffn(norm x)."""

    context = staticmethod(lambda prepared: prepared)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.ask, self.tell, self.cross = (nn.Linear(width, n * width) for n in (1, 2, 1))
        self.ffn = Feed(shape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def attend(self, x: Tensor, context: Tensor, call: Call) -> Tensor:
        q, k, v = (self._heads(part) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        q, k = (_turned(part, call.table.unsqueeze(1)) for part in (q, k))
        if call.slot is not None:
            k, v = call.slot.append(k, v)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask(x.device))
        return self.out(found.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Tensor, call: Call) -> Tensor:
        x = x + self.attend(x, context, call)
        k, v = (self._heads(part) for part in self.tell(context).chunk(2, -1))
        found = F.scaled_dot_product_attention(self._heads(self.ask(self.norms[1](x))), k, v)
        x = x + self.cross(found.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[2](x), call.span)

    def residuals(self, context: Tensor) -> list[Residual]:
        return [Residual(layer, None) for layer in (self.out, self.cross, self.ffn.fc2)]


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
        shape = (rows, self.config.heads, schedule.total, self.config.width // self.config.heads)
        return [Slot(shape, self.begin.device, self.begin.dtype) for _ in self.blocks]

    def states(self, prepared: Tensor, inputs: Tensor, schedule: Schedule) -> Tensor:
        return torch.cat((self.next_states(prepared, None, 0, schedule), self.embed(inputs)), 1)

    def next_states(self, prepared: Tensor, given: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        if given is None:
            return self.begin.expand(len(prepared), schedule.lengths[0], -1)
        return self.embed(given).repeat(len(prepared) // len(given), 1, 1)

    def before_head(self, x: Tensor, prepared: Tensor) -> Tensor:
        return self.norm(x)

    def logits(self, x: Tensor, prepared: Tensor) -> Tensor:
        return self.head(self.before_head(x, prepared)).float()

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
        self.decoder_parts = [self.paint]

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

    backbone, tokenizer, classes = staticmethod(Writer), staticmethod(Paper), staticmethod(lambda config: None)
    alphabet = staticmethod(lambda config: Bits(config.bits))

    def guidance(self, config: Shape, sampling: Sampling, *, folded: bool) -> Guidance:
        return Guidance((sampling.cfg - 1,) * config.num_scales, 1 if folded else 2)

    def condition(self, config: Shape, given: Entries | Sequence[int]) -> Entries:
        if isinstance(given, Entries):
            return given
        made = [torch.randn(WORDS, config.width, generator=torch.Generator().manual_seed(seed)) for seed in given]
        return Entries(torch.stack(made), torch.zeros(WORDS, config.width))

    def balanced(self, config: Shape, count: int) -> Entries:
        return self.condition(config, range(count))

    def image_bytes(self, config: Shape, tokenizer: Shape, itemsize: int, rows: int) -> int:
        return rows * config.schedule.total * config.width * config.depth * 8 * itemsize

    def costs(self, config: Shape) -> Any:
        width, lengths, bits = config.width, config.schedule.lengths, config.bits
        return SimpleNamespace(
            block=lambda kept, context: {
                "attention_projections": 4 * width * width * kept,
                "attention_products": 2 * kept * context * width,
                "cross_attention": 2 * width * width * kept + 2 * kept * WORDS * width,
            },
            ffn=lambda: 2 * width * config.hidden,
            scale=lambda scale: {"head": lengths[scale] * width * 2 * bits},
            once=lambda scale: {"word_embedding": lengths[scale] * bits * width},
            block_once=lambda: {"cross_attention": 2 * width**2 * WORDS},
            image=dict,
        )

    def decoder_macs(self, tokenizer: Shape) -> int:
        return 3 * tokenizer.bits * tokenizer.schedule.lengths[-1]
