"""The seams between the method and a family of next-scale generators.

The method (experts, gates, search, distillation, pricing, reports) knows a generator by what stands here and by nothing
else. A family says how its backbone, tokenizer, condition and tokens work; ``docs/extending.md`` builds one.

Shapes: B rows (images, doubled if guidance is paired), L tokens in hand, C width, S scales, z channels of an input.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from actvar_convert.errors import InputError, counted
from actvar_convert.kernels.token_gate import take
from actvar_convert.models.schedule import Config as Config
from actvar_convert.models.schedule import Schedule as Schedule
from actvar_convert.models.schedule import Span as Span


class Slot:
    """What generation keeps for one block from scale to scale.

    Attributes:
        keys, values: [B, H, T, d], preallocated and written in place.
        filled: tokens of T that are written.
        constants: what the block derives once, from its weights and the condition alone; None before the first scale.
        update: [B, L, C], what the block added at the previous scale, if a gate needs it.
    """

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.filled = 0
        self.constants: Any = None
        self.update: Tensor | None = None

    def append(self, k_BHLd: Tensor, v_BHLd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values [B, H, L, d]; returns all so far, [B, H, T, d] each."""
        begin, self.filled = self.filled, self.filled + k_BHLd.shape[2]
        self.keys[:, :, begin : self.filled] = k_BHLd
        self.values[:, :, begin : self.filled] = v_BHLd
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]


@dataclass(frozen=True)
class Call:
    """Which tokens a block gets, and what goes with them row for row.

    Attributes:
        span: tokens in hand, scale by scale.
        table: [1 or B, L, P] what belongs to the tokens' positions (rotary angles); None: nothing does.
        slot: what the block keeps while it generates; None under teacher forcing.
    """

    span: Span
    table: Tensor | None = None
    slot: Slot | None = None
    _masks: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, rows_BK: Tensor, counts: tuple[int, ...]) -> Call:
        """The call for the tokens at ``rows_BK`` of those in hand, ``counts`` of them at each scale."""
        table = self.table
        if table is not None:
            table = take(table.expand(len(rows_BK), -1, -1), rows_BK)
        return replace(self, span=Span(self.span.first, counts), table=table)

    def mask(self, device: torch.device) -> Tensor | None:
        """Boolean [L, L]: a token attends to its own scale and the coarser ones. None: all attend to all in reach.

        Made once for all blocks that get this call.
        """
        if self.slot is not None or len(self.span.counts) == 1:
            return None
        if device not in self._masks:
            counts = torch.tensor(self.span.counts, device=device)
            level = torch.arange(len(counts), device=device).repeat_interleave(
                counts, output_size=sum(self.span.counts)
            )
            self._masks[device] = level.unsqueeze(1) >= level.unsqueeze(0)
        return self._masks[device]


class Residual(NamedTuple):
    """A linear layer of a block whose output, times a gate, is added to the hidden state.

    Attributes:
        layer: the last linear layer of a sub-layer.
        gate: [B, C]; None: 1.
    """

    layer: nn.Linear
    gate: Tensor | None


class Condition(Protocol):
    """What images are made from, one entry an image: class labels, prompts. Opaque to the method."""

    def __len__(self) -> int: ...

    def rows(self, index: slice | Tensor) -> Self:
        """Some of the entries."""
        ...

    def null(self) -> Self:
        """The same number of entries that say nothing: the unguided half of classifier-free guidance."""
        ...

    def dropped(self, where_B: Tensor) -> Self:
        """A copy in which the entries at True, boolean [B], say nothing."""
        ...

    def partly_null(self, every: int) -> Self:
        """A copy in which one of ``every`` entries says nothing, spread over all that the others say."""
        ...

    def joined(self, other: Self) -> Self:
        """These entries, then those of another."""
        ...

    def against(self, negative: Self) -> Self:
        """The same entries, with others as what ``null`` gives.

        Raises:
            InputError: the family has no such thing, or there are too few or too many.
        """
        ...

    @property
    def shape(self) -> Hashable:
        """What entries must have in common with those that CUDA graphs were recorded for."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...

    def copy_(self, other: Self) -> None:
        """Takes the values of as many other entries, in place (CUDA graphs read them there)."""
        ...


@dataclass(frozen=True)
class Entries:
    """The ``Condition`` of a family whose entries are alike: one tensor.

    Attributes:
        values: [B, ...], an entry an image.
        nothing: [...], the entry that says nothing.
    """

    values: Tensor
    nothing: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, index: slice | Tensor) -> Self:
        return replace(self, values=self.values[index])

    def null(self) -> Self:
        return replace(self, values=self.nothing.to(self.values.device).expand_as(self.values).clone())

    def dropped(self, where_B: Tensor) -> Self:
        where = where_B.to(self.values.device).view(-1, *(1,) * self.nothing.ndim)
        return replace(self, values=torch.where(where, self.null().values, self.values))

    def partly_null(self, every: int) -> Self:
        return self.dropped(torch.arange(len(self)) % every == 0)

    def joined(self, other: Self) -> Self:
        return replace(self, values=torch.cat((self.values, other.values)))

    def against(self, negative: Self) -> Self:
        raise InputError("negative prompts are for models that are conditioned on text; leave negative out")

    @property
    def shape(self) -> Hashable:
        return tuple(self.values.shape)

    def to(self, device: torch.device) -> Self:
        return replace(self, values=self.values.to(device))

    def copy_(self, other: Self) -> None:
        self.values.copy_(other.values)


class Block(Protocol):
    """One transformer block. Its ``ffn`` is what the method splits into experts: ``ffn(x, span)``, with linear layers
    ``fc1`` and ``fc2`` around a tanh-GELU, biases or none. A block computes whatever tokens it gets: a token's output
    depends on the others in hand through attention alone.
    """

    ffn: nn.Module

    def __call__(self, x_BLC: Tensor, context: Any, call: Call) -> Tensor:
        """Hidden states [B, L, C] of the tokens in hand."""
        ...

    def context(self, prepared: Any) -> Any:
        """What the block takes from a condition that its backbone prepared."""
        ...

    def attend(self, x_BLC: Tensor, context: Any, call: Call) -> Tensor:
        """What self-attention adds to the hidden state, [B, L, C]."""
        ...

    def residuals(self, context: Any) -> list[Residual]:
        """The linear layers whose outputs are added to the hidden state, in order; the FFN's ``fc2`` is the last."""
        ...


class Backbone(Protocol):
    """The transformer of a family: a module whose ``blocks`` run one after another over states [B, L, C]."""

    blocks: nn.ModuleList
    head: nn.Linear

    def prepare(self, condition: Any) -> Any:
        """What depends on the condition alone; blocks take their ``context`` from it."""
        ...

    def states(self, prepared: Any, inputs_BLz: Tensor, schedule: Schedule) -> Tensor:
        """States [B, L, C] before the first block under teacher forcing, of the scales that the inputs reach."""
        ...

    def next_states(self, prepared: Any, input_BLz: Tensor | None, scale: int, schedule: Schedule) -> Tensor:
        """States [B, L_s, C] of one scale while generating; the first scale has no input but the condition."""
        ...

    def table(self, schedule: Schedule, begin: int, end: int) -> Tensor | None:
        """``Call.table`` of some positions of a schedule."""
        ...

    def slots(self, rows: int, schedule: Schedule) -> list[Slot]:
        """Room for generation, one for each block."""
        ...

    def before_head(self, x_BLC: Tensor, prepared: Any) -> Tensor:
        """The head's input [B, L, C]."""
        ...

    def logits(self, x_BLC: Tensor, prepared: Any) -> Tensor:
        """Logits [B, L, V], fp32, of the last block's states."""
        ...


class Tokenizer(Protocol):
    """Images to token maps and back, scale by scale."""

    def tokens(self, image_B3HW: Tensor, schedule: Schedule) -> Tensor:
        """Tokens [B, L, ...] of images in [-1, 1]."""
        ...

    def accumulate(self, f_hat: Tensor | None, tokens: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """The feature map with what the tokens [B, L_s, ...] of one scale add to it; None: nothing yet."""
        ...

    def next_input(self, f_hat: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """The backbone's input [B, L_s, z] at a scale, from the map of the scales before."""
        ...

    def images(self, f_hat: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of a whole feature map."""
        ...

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        """Pixels (H, W) of an image."""
        ...

    @property
    def decoder_parts(self) -> list[nn.Module]:
        """What makes images of a feature map and decides about no token, so that its dtype is free."""
        ...


class Alphabet(Protocol):
    """What a token is, one of V codes or D bits, and what follows from it."""

    @property
    def outcomes(self) -> tuple[int, ...]:
        """Shape of the probabilities of one token: (V,) or (D, 2)."""
        ...

    @property
    def width(self) -> int:
        """Logits V of one token."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes of a stored token."""
        ...

    def draw(self, logits_BLV: Tensor, noise: Tensor, top_k: int, top_p: float) -> Tensor:
        """Tokens [B, L, ...] sampled with exponential numbers [B, L, *outcomes]."""
        ...

    def surprise(self, logits_BLV: Tensor, tokens: Tensor) -> Tensor:
        """-log p of tokens [B, L, ...], nats per token [B, L]."""
        ...

    def divergence(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        """KL(teacher || student), nats per token [B, L], in the dtype of the logits."""
        ...

    def agreement(self, teacher_BLV: Tensor, student_BLV: Tensor) -> Tensor:
        """Share of a token that both predict alike, [B, L] in 0 to 1."""
        ...

    def pack(self, tokens: Tensor) -> Tensor:
        """Tokens [B, L, ...] as bytes [B, L, stored_bytes], uint8."""
        ...

    def unpack(self, stored: Tensor) -> Tensor:
        """The tokens again, int64."""
        ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one generation.

    Attributes:
        strengths: t of every scale: (1 + t) conditional - t unconditional (Ho and Salimans, arXiv 2207.12598).
        rows: rows of the backbone per image: 2, conditional and unconditional, or 1, guidance folded in.
        temperatures: what logits are divided by at every scale; empty: 1.
        layer: index of the block whose output is guided in place of the logits; both rows go on with the result.
    """

    strengths: tuple[float, ...]
    rows: int = 2
    temperatures: tuple[float, ...] = ()
    layer: int | None = None

    def guided(self, logits_RBLV: Tensor, scale: int) -> Tensor:
        """Guided predictions [B, L, V] of one scale, from B conditional rows and then, of 2 rows, the same without."""
        logits = logits_RBLV if self.rows == 1 or self.layer is None else logits_RBLV.chunk(2)[0]
        if self.temperatures:
            logits = logits * (1 / self.temperatures[scale])
        return guided(logits, self.strengths[scale]) if self.rows == 2 and self.layer is None else logits

    def after_block(self, x_RBLC: Tensor, block: int, scale: int) -> Tensor:
        """States after a block: guided in both rows if that is the block and the scale is guided."""
        if block != self.layer or self.rows == 1 or not self.strengths[scale]:
            return x_RBLC
        return guided(x_RBLC, self.strengths[scale]).repeat(2, 1, 1)


def guided(logits_2BLV: Tensor, strength: float | Tensor) -> Tensor:
    """(1 + t) conditional - t unconditional [B, L, V], from both [2 B, L, V]; ``strength`` t is a number or [L, 1]."""
    conditional, unconditional = logits_2BLV.chunk(2)
    return (1 + strength) * conditional - strength * unconditional


ByScale = float | tuple[float, ...]
"""One number, or one for every scale."""


class Sampling(NamedTuple):
    """How tokens are sampled.

    Attributes:
        cfg: strength of classifier-free guidance, as the family reads it; of every scale, or one number.
        top_k: only the k most likely outcomes; 0: all.
        top_p: only the most likely outcomes that together reach this probability; 0: all.
        tau: temperature that logits are divided by; of every scale, or one number.
        guidance_layer: block after which hidden states are guided in place of logits, from the last one if negative;
            0 or None: logits are guided.
    """

    cfg: ByScale = 1.5
    top_k: int = 0
    top_p: float = 0.0
    tau: ByScale = 1.0
    guidance_layer: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The values by name, those of the last two only if they are not the usual ones; they make a ``Sampling``."""
        usual, values = self._field_defaults, self._asdict()
        return {name: v for name, v in values.items() if name not in ("tau", "guidance_layer") or v != usual[name]}

    def by_scale(self, name: str, scales: int) -> tuple[float, ...]:
        """``cfg`` or ``tau`` of every scale.

        Raises:
            InputError: values for another number of scales.
        """
        value: ByScale = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * scales
        if len(value) != scales:
            raise InputError(f"{name} has {counted(len(value), 'value')}; give one number, or {scales}, one a scale")
        return value

    def temperatures(self, scales: int) -> tuple[float, ...]:
        """``Guidance.temperatures``: empty if they are all 1."""
        values = self.by_scale("tau", scales)
        return () if all(value == 1 for value in values) else values

    def layer(self, depth: int) -> int | None:
        """``Guidance.layer`` of so many blocks.

        Raises:
            InputError: there is no such block before the last one.
        """
        if not self.guidance_layer:
            return None
        index = self.guidance_layer + (depth if self.guidance_layer < 0 else 0)
        if not 0 < index < depth:
            raise InputError(
                f"guidance_layer {self.guidance_layer} is no block of {depth}; give 1 to {depth - 1}, or -{depth - 1} "
                "to -1 counted from the last, or none to guide logits"
            )
        return index


class Family(Protocol):
    """How one kind of generator is built, conditioned and priced. ``models/families.py`` lists those of the package."""

    name: str
    config_type: type[Any]
    tokenizer_config_type: type[Any]
    reads_text: bool = False
    """Whether the condition is text, so that somebody has to say which prompts to measure and train on."""

    def backbone(self, config: Any) -> Any:
        """A fresh ``Backbone``, an ``nn.Module``."""
        ...

    def tokenizer(self, config: Any) -> Any:
        """A fresh ``Tokenizer``, an ``nn.Module``."""
        ...

    def alphabet(self, config: Any) -> Alphabet:
        """What its tokens are."""
        ...

    def guidance(self, config: Any, sampling: Sampling, *, folded: bool) -> Guidance:
        """Strength at every scale, and rows per image."""
        ...

    def condition(self, config: Any, given: Any) -> Any:
        """The ``Condition`` that a person gives, checked.

        Raises:
            InputError: it makes no sense for this model.
        """
        ...

    def at(self, config: Any, tokenizer: Any, schedule: Any) -> tuple[Any, Any]:
        """The configurations of backbone and tokenizer over other token maps: maps [(h, w), ...] or a name.

        Raises:
            InputError: its maps are fixed, or there is no such schedule.
        """
        ...

    def balanced(self, config: Any, count: int) -> Any:
        """A ``Condition`` of so many entries that covers what the model knows evenly."""
        ...

    def classes(self, config: Any) -> int | None:
        """Classes that condition the images; None: something else does."""
        ...

    def image_bytes(self, config: Any, tokenizer: Any, itemsize: int, rows: int) -> int:
        """Estimated memory of one image under way, of so many rows, at ``itemsize`` bytes a number."""
        ...

    def costs(self, config: Any) -> Costs:
        """Multiply-adds of the backbone's parts."""
        ...

    def decoder_macs(self, tokenizer: Any) -> int:
        """Multiply-adds from tokens to one image."""
        ...


class Costs(Protocol):
    """Multiply-adds of a backbone's parts for one row, by name of the component; the method prices its own parts."""

    def block(self, kept: int, context: int) -> dict[str, int]:
        """One block at one scale, but for its FFN: ``kept`` tokens that attend to ``context`` ones."""
        ...

    def ffn(self) -> int:
        """One token in the whole FFN of a block."""
        ...

    def scale(self, scale: int) -> dict[str, int]:
        """What a scale costs outside of the blocks, in every row."""
        ...

    def once(self, scale: int) -> dict[str, int]:
        """What a scale costs once an image, whatever the rows."""
        ...

    def block_once(self) -> dict[str, int]:
        """What a block costs once an image: its modulation, its keys and values of the condition."""
        ...

    def image(self) -> dict[str, int]:
        """What a row costs once an image outside of the blocks: modulation, condition."""
        ...


def inner(block: nn.Module) -> Any:
    """The family's own block, without the gate around it."""
    return getattr(block, "block", block)


class Passed(NamedTuple):
    """One batch that went through one block.

    Attributes:
        number: of the batch.
        before, after: states [B, L, C] around the block.
        context: what the block took from the condition.
        ffn_input, ffn_output: [B, L, C] at its FFN, of the tokens that it computed; None if nobody observes.
    """

    number: int
    before: Tensor
    after: Tensor
    context: Any
    ffn_input: Tensor | None
    ffn_output: Tensor | None


def walk(
    blocks: Iterable[nn.Module], states: list[Tensor], prepared: Sequence[Any], call: Call, *, observe: bool = False
) -> Iterator[tuple[nn.Module, Iterator[Passed]]]:
    """The loop over blocks under teacher forcing, block after block over batches of states.

    A block runs on a batch when its ``Passed`` is asked for; ask for all of them before the next block. Gradients flow
    if they are enabled then.

    Args:
        blocks: of the backbone.
        states: [B, L, C] of every batch before the first block; each is replaced by what a block makes of it.
        prepared: condition of every batch, as its backbone prepared it.
        call: the tokens, the same for all batches.
        observe: keep what goes in and out of the FFNs.
    """
    for block in blocks:
        yield block, _through(block, states, prepared, call, observe)


def _through(
    block: nn.Module, states: list[Tensor], prepared: Sequence[Any], call: Call, observe: bool
) -> Iterator[Passed]:
    own, seen = inner(block), []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0], output))

    handle = own.ffn.register_forward_hook(keep) if observe else None
    try:
        for number, condition in enumerate(prepared):
            before, context = states[number], own.context(condition)
            states[number] = block(before, context, call)
            around = seen.pop() if seen else (None, None)
            yield Passed(number, before, states[number], context, *around)
    finally:
        if handle is not None:
            handle.remove()


def last_states(blocks: Iterable[nn.Module], x_BLC: Tensor, prepared: Any, call: Call) -> Tensor:
    """States [B, L, C] of one batch after the last block."""
    states = [x_BLC]
    for _, passed in walk(blocks, states, [prepared], call):
        for _ in passed:
            pass
    return states[0]
