"""Model: tokenizer and backbone as one object that generates images, dense or sparse, of any family.

Shapes: B images, L tokens, z channels of an input, V logits of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from numbers import Real
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.models.base import Alphabet, ByScale, Call, Guidance, Sampling, Schedule, guided
from actvar_convert.models.families import family_of
from actvar_convert.models.generation import Generation
from actvar_convert.models.graphs import Recordings
from actvar_convert.models.sampling import Noise, chunk_seed, whole_number
from actvar_convert.models.split import split
from actvar_convert.plan import Plans, SparsityPlan

__all__ = ["GENERATION_BYTES", "Model", "NoiseSource", "Sampling", "chunk_seed", "generation_bytes"]

NoiseSource = Literal["device", "cpu"]
"""Whose random numbers: those of the device the model is on, as in the reference implementation, or the CPU's."""

GENERATION_BYTES = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}
"""Memory that the images under way at once may take, by kind of device; larger chunks are cut into pieces.

On a GPU at most a third of its memory. Beside it there are the weights, the images made so far (12 H W bytes each), the
random numbers of a chunk (4 bytes an outcome of every token at the largest scale; for a chunk in pieces of all scales),
and with ``compile=True`` once more as much for a second recording.
"""


def generation_bytes(device: str | torch.device) -> int:
    """The part of ``GENERATION_BYTES`` that one device grants."""
    kind = torch.device(device).type
    granted = GENERATION_BYTES.get(kind, 2 * 2**30)
    if kind == "cuda" and torch.cuda.is_available():
        granted = min(granted, torch.cuda.get_device_properties(device).total_memory // 3)
    return granted


def images_at_once(config: Any, tokenizer: Any, itemsize: int, device: str | torch.device, rows: int = 2) -> int:
    """Images of ``rows`` rows that ``GENERATION_BYTES`` holds at once on a device (cpu, cuda), at least one."""
    return max(1, generation_bytes(device) // family_of(config).image_bytes(config, tokenizer, itemsize, rows))


class Wishes(TypedDict, total=False):
    """What a call of ``Model.generate`` may say beside the rest.

    Attributes:
        cfg, tau: see ``Sampling``; a number, or one for every scale.
        top_k, top_p, guidance_layer: see ``Sampling``.
        schedule: token maps [(h, w), ...] or the name of a schedule, of families that have several.
        negative: a condition to guide away from: text rows, of one prompt or of as many as the condition has.
    """

    cfg: float | Sequence[float]
    tau: float | Sequence[float]
    top_k: int
    top_p: float
    guidance_layer: int | None
    schedule: str | Schedule | Sequence[tuple[int, int]]
    negative: Any


class _Draws(NamedTuple):
    """Where the random numbers of a call come from; see ``Model.generate``."""

    seed: int
    chunk: int
    device: torch.device

    @classmethod
    def checked(cls, seed: object, chunk: object, device: torch.device) -> _Draws:
        """Raises InputError for a seed or a chunk that is no such whole number."""
        return cls(whole_number("seed", seed, 0, 2**63), whole_number("chunk", chunk, 1), device)


class Model(nn.Module):
    """A tokenizer and a backbone that fit each other.

    Attributes:
        family: what kind of generator it is.
        plans: what a sparse model can run; None: the model is dense.
        sampling: the sampling that the model was measured with; what ``generate`` uses unless told otherwise.
        origin: where the weights come from (name, path, vae, revision), as far as known, and the shape that was given
            if the files do not tell; empty for a model that was made in memory.
        moments: the files that were read, as they were then.
        notes: what was inferred or chosen while the model was loaded, a sentence each.
        prompts: what the method measures and trains on, see ``with_prompts``; None: what the family knows.
        recordings: the CUDA graphs of ``generate(..., compile=True)``; ``recordings.clear()`` frees their memory.
    """

    transformer: Any
    tokenizer: Any

    def __init__(
        self,
        transformer: nn.Module,
        tokenizer: nn.Module,
        sampling: Sampling | None = None,
        plans: Plans | None = None,
    ) -> None:
        super().__init__()
        self.family, self.plans = family_of(transformer.config), plans
        self.transformer, self.tokenizer = transformer, tokenizer
        self.sampling = sampling or Sampling()
        self.origin: dict[str, str] = {}
        self.moments: dict[str, tuple[int, ...]] = {}
        self.notes: list[str] = []
        self.recordings = Recordings()
        self.prompts: Any = None

    @property
    def config(self) -> Any:
        """Shape of the backbone."""
        return self.transformer.config

    @property
    def schedule(self) -> Schedule:
        """The token maps of an image."""
        schedule: Schedule = self.config.schedule
        return schedule

    @property
    def alphabet(self) -> Alphabet:
        """What a token is."""
        return self.family.alphabet(self.config)

    @property
    def is_sparse(self) -> bool:
        return self.plans is not None

    @property
    def plan(self) -> SparsityPlan:
        """The plan that a sparse model runs."""
        assert self.plans is not None
        return self.plans.current

    @property
    def folded(self) -> bool:
        """Whether guidance is part of the predictions, so that an image takes one row."""
        return self.plans is not None and self.plan.guidance == "folded"

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.transformer.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype

    def use_plan(self, name: str) -> None:
        """Switches to another of the model's plans; nothing is copied or retrained.

        Raises:
            InputError: there is no such plan.
        """
        named = {} if self.plans is None else self.plans.named
        if self.plans is None or name not in named:
            raise InputError(f"no plan {name!r} in this model; it has {', '.join(sorted(named)) or 'none'}")
        self.plans.name = name

    def guidance(self, sampling: Sampling | None = None) -> Guidance:
        """Guidance as the model samples, by default as it was measured."""
        return self.family.guidance(self.config, sampling or self.sampling, folded=self.folded)

    def start(self, condition: Any, inputs_BLz: Tensor) -> tuple[Tensor, Any, Call]:
        """States before the first block under teacher forcing, the prepared condition, and the call of the blocks."""
        backbone, schedule = self.transformer, self.schedule
        prepared = backbone.prepare(condition)
        x = backbone.states(prepared, inputs_BLz, schedule)
        span = schedule.span(schedule.scales_in(x.shape[1]))
        return x, prepared, Call(span, backbone.table(schedule, 0, x.shape[1]))

    def teacher_forcing_input(self, tokens: Tensor) -> Tensor:
        """Inputs [B, L - L_0, z] of pyramids [B, L, ...]; of their first scales, up to the scale after those."""
        schedule, f_hat = self.schedule, None
        found: list[Tensor] = []
        scales = self.split(tokens)
        for scale, own in enumerate(scales[: schedule.num_scales - 1]):
            f_hat = self.tokenizer.accumulate(f_hat, own, scale, schedule)
            found.append(self.tokenizer.next_input(f_hat, scale + 1, schedule))
        if not found:
            nothing = self.tokenizer.accumulate(None, scales[0], 0, schedule)
            found = [self.tokenizer.next_input(nothing, 0, schedule)[:, :0]]
        return torch.cat(found, dim=1)

    def guided_logits(self, condition: Any, inputs_BLz: Tensor, conditional_BLV: Tensor | None = None) -> Tensor:
        """Predictions [B, L, V] under teacher forcing, guided as the model samples by default.

        Args:
            condition, inputs_BLz: of B images; the model is dense, or its guidance is paired.
            conditional_BLV: the predictions with the condition, if they are known.
        """
        conditional = self.transformer(condition, inputs_BLz) if conditional_BLV is None else conditional_BLV
        return self.guided(torch.cat((conditional, self.transformer(condition.null(), inputs_BLz))))

    def guided(self, logits_2BLV: Tensor, sampling: Sampling | None = None) -> Tensor:
        """Predictions [B, L, V] guided as in sampling, from B rows with the condition and then the same without."""
        schedule, guidance = self.schedule, self.family.guidance(self.config, sampling or self.sampling, folded=False)
        scales = schedule.scales_in(logits_2BLV.shape[1])
        strengths = torch.tensor(guidance.strengths[:scales])
        strength = strengths.repeat_interleave(torch.tensor(schedule.lengths[:scales])).unsqueeze(-1)
        return guided(logits_2BLV, strength.to(logits_2BLV.device))

    def with_prompts(self, given: Any) -> Self:
        """The same model, weights and all, for which ``balanced`` goes round the given prompts.

        Raises:
            InputError: they make no sense for this model.
        """
        view: Self = _alias(self)
        view.prompts = self.family.condition(self.config, given)
        return view

    def balanced(self, count: int) -> Any:
        """So many entries of a condition to measure and train on: its prompts in turn, or what its family knows."""
        if self.prompts is None or not len(self.prompts):
            return self.family.balanced(self.config, count)
        return self.prompts.rows(torch.arange(count) % len(self.prompts))

    @property
    def drawn_on(self) -> dict[str, str]:
        """What identifies the prompts, for keys of what is kept; nothing without prompts."""
        return {} if self.prompts is None else {"prompts": self.prompts.fingerprint}

    def at(self, schedule: str | Schedule | Sequence[tuple[int, int]]) -> Self:
        """The same model, weights and all, over other token maps.

        Args:
            schedule: maps [(h, w), ...], or a name that the family knows.

        Raises:
            InputError: the family's maps are fixed, it has no such schedule, or a plan was made for other maps.
        """
        config, tokenizer = self.family.at(self.config, self.tokenizer.config, schedule)
        if config == self.config:
            return self
        if self.is_sparse:
            raise InputError(
                "a sparse model runs the token maps that its plan was made for; leave schedule out, or load the dense "
                "model with that schedule and convert it"
            )
        view: Self = _alias(self)
        backbone, decoder = _alias(self.transformer), _alias(self.tokenizer)
        backbone.config, decoder.config = config, tokenizer
        view.transformer, view.tokenizer = backbone, decoder
        return view

    def generate(
        self,
        condition: Any,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        chunk: int = 64,
        compile: bool = False,
        noise: NoiseSource = "device",
        on_images: Callable[[int], None] = lambda count: None,
        **wishes: Unpack[Wishes],
    ) -> Tensor:
        """Images of the given classes, or of whatever the family is conditioned on.

        Args:
            condition: VAR: class indices [B] of any integer type; ``classes`` (or -1) for no class. Infinity:
                ``TextRows`` of B prompts.
            sampling: the model's own by default; ``sampling_with(cfg=3.0)`` changes one value of it. cfg is fixed if
                guidance is folded.
            seed: every chunk samples with a generator of its own derived from it.
            chunk: images that are sampled together. Part of the contract: equal (condition, seed, chunk, dtype,
                machine, noise) give equal images.
            compile: replay CUDA graphs, which the first call for a number of images records (seconds); the same images
                up to rounding. For models on a GPU.
            noise: ``device`` samples on the GPU that the model is on, as the reference implementation does: at once,
                but other kinds of GPU make other numbers. ``cpu`` samples what a CPU samples, so that a seed means the
                same image everywhere up to rounding: 20 ns a number, one for every outcome of a token. On a CPU both
                are one.
            on_images: called with the number of images that are ready anew: chunk by chunk, or piece by piece if
                memory cuts a chunk.
            wishes: single values of the sampling, the token maps, a negative condition, see ``Wishes``.

        Returns:
            images [B, 3, H, W] in [0, 1], fp32, on the model's device, without a gradient.

        Raises:
            InputError: a condition or a value that makes no sense, or ``compile`` if there are no CUDA graphs, or for a
                plan that they cannot hold.
        """
        model, given, chosen = self._wanted(condition, sampling, wishes)
        images, done = model._no_images(len(given)), 0
        draws = _Draws.checked(seed, chunk, self._noise_device(noise))
        with torch.inference_mode():  # what it fills was made before, and so can be used like any other tensor
            for piece in model._pieces(given, chosen, draws, compile, decoded=True):
                images[done : done + len(piece)] = piece
                done += len(piece)
                on_images(len(piece))
        return images

    def _wanted(self, condition: Any, sampling: Sampling | None, wishes: Wishes) -> tuple[Self, Any, Sampling]:
        """The model over the maps of a call, its condition on the device, and its sampling, all checked."""
        unknown = sorted(set(wishes) - Wishes.__annotations__.keys())
        if unknown:
            raise TypeError(f"generate() has no argument {unknown[0]!r}")
        known = Sampling._fields
        chosen = (self.sampling if sampling is None else sampling)._replace(
            **{name: _hashable(value) for name, value in wishes.items() if name in known}
        )
        schedule, negative = wishes.get("schedule"), wishes.get("negative")
        model = self if schedule is None else self.at(schedule)
        given = self.family.condition(self.config, condition)
        if negative is not None:
            given = given.against(self.family.condition(self.config, negative))
        return model, given.to(self.device), model._allowed(chosen)

    def generate_tokens(
        self,
        condition: Any,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        chunk: int = 64,
        compile: bool = False,
        noise: NoiseSource = "device",
        **wishes: Unpack[Wishes],
    ) -> Tensor:
        """Token pyramids [B, L, ...] int64, all scales in one row; arguments as in ``generate``."""
        model, given, chosen = self._wanted(condition, sampling, wishes)
        draws = _Draws.checked(seed, chunk, self._noise_device(noise))
        with torch.inference_mode():
            pieces = list(model._pieces(given, chosen, draws, compile, decoded=False))
        none = torch.zeros(0, model.schedule.total, *self.alphabet.outcomes[:-1], dtype=torch.int64, device=self.device)
        return torch.cat([none, *pieces])

    def images_at_once(self) -> int:
        """Images that generation and decoding keep under way at once: those that ``GENERATION_BYTES`` holds."""
        rows = self.guidance().rows
        return images_at_once(self.config, self.tokenizer.config, self.dtype.itemsize, self.device, rows)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of pyramids [B, L, ...]; as many at a time as memory is meant for."""
        images, limit = self._no_images(len(tokens)), self.images_at_once()
        with torch.inference_mode():
            for begin in range(0, len(tokens), limit):
                images[begin : begin + limit] = self.decoded(tokens[begin : begin + limit])
        return images

    def decoded(self, tokens: Tensor) -> Tensor:
        """The same, all at once."""
        f_hat: Tensor | None = None
        for scale, own in enumerate(self.split(tokens)):
            f_hat = self.tokenizer.accumulate(f_hat, own, scale, self.schedule)
        images: Tensor = self.tokenizer.images(f_hat)
        return images

    def _no_images(self, count: int) -> Tensor:
        """Room for images [count, 3, H, W], fp32."""
        return torch.empty(count, 3, *self.tokenizer.image_size(self.schedule), device=self.device)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """The tokens [B, L_s, ...] of every scale of pyramids [B, L, ...], or of their first scales."""
        schedule = self.schedule
        return list(torch.split(tokens, list(schedule.lengths[: schedule.scales_in(tokens.shape[1])]), dim=1))

    def sampling_with(
        self,
        cfg: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        tau: float | Sequence[float] | None = None,
    ) -> Sampling:
        """The model's sampling, with the given values in place of its own."""
        given = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "tau": tau}
        return self.sampling._replace(**{name: _hashable(v) for name, v in given.items() if v is not None})

    def _allowed(self, sampling: Sampling | None) -> Sampling:
        """The sampling of a call; raises InputError for one that makes no sense."""
        chosen = self.sampling if sampling is None else sampling
        if self.folded and chosen.cfg != self.sampling.cfg:
            raise InputError(
                f"guidance of strength {_said(self.sampling.cfg)} is folded into this model's predictions, so cfg "
                f"{_said(chosen.cfg)} is out of reach; leave cfg out, or convert with budget.guidance paired"
            )
        scales = self.config.num_scales
        cfg, tau = _numbers("cfg", chosen.cfg), _numbers("tau", chosen.tau)
        top_p = _numbers("top_p", chosen.top_p)
        if isinstance(top_p, tuple) or not 0 <= top_p <= 1:
            raise InputError(f"top_p must be within 0 to 1 (0: all tokens), got {_said(top_p)}")
        chosen = chosen._replace(cfg=cfg, tau=tau, top_p=top_p)
        if not all(each > 0 for each in chosen.by_scale("tau", scales)):
            raise InputError(f"tau must be above 0, got {_said(tau)}")
        if chosen.guidance_layer is not None:
            chosen = chosen._replace(guidance_layer=whole_number("guidance_layer", chosen.guidance_layer))
        chosen.by_scale("cfg", scales)
        chosen.layer(self.config.depth)
        return chosen._replace(top_k=whole_number("top_k", chosen.top_k, 0))

    def _noise_device(self, source: NoiseSource) -> torch.device:
        if source not in ("device", "cpu"):
            raise InputError(f"noise {source!r} is unknown; give device or cpu")
        return self.device if source == "device" and self.device.type == "cuda" else torch.device("cpu")

    def _pieces(
        self, condition: Any, sampling: Sampling, draws: _Draws, compile: bool, *, decoded: bool
    ) -> Iterator[Tensor]:
        """Pyramids [b, L, ...], or decoded images [b, 3, H, W], of as many images at a time as memory is meant for; a
        piece may be overwritten by the next."""
        limit, chunk = self.images_at_once(), draws.chunk
        for index, begin in enumerate(range(0, len(condition), chunk)):
            own = condition.rows(slice(begin, begin + chunk))
            noise = Noise(chunk_seed(draws.seed, index), len(own), keep=len(own) > limit, device=draws.device)
            for first in range(0, len(own), limit):
                rows = slice(first, first + limit)
                part = own.rows(rows)
                if compile:
                    recorded = self.recordings.of(self, part, sampling)
                    tokens = recorded.tokens(part, noise, rows)
                    yield recorded.images() if decoded else tokens
                else:
                    tokens = self._sample(part, sampling, noise, rows)
                    yield self.decode(tokens) if decoded else tokens

    @property
    def plan_key(self) -> Hashable:
        """What distinguishes the ways in which one set of weights can run."""
        return None if self.plans is None else self.plan

    def _sample(self, condition: Any, sampling: Sampling, noise: Noise, rows: slice) -> Tensor:
        """Tokens [b, L, ...] of some rows of a chunk."""
        outcomes, under_way = self.alphabet.outcomes, Generation(self, condition, sampling)
        found = [
            under_way.step(scale, noise.exponential(scale, length, outcomes)[rows])
            for scale, length in enumerate(self.schedule.lengths)
        ]
        return torch.cat(found, dim=1)


def _alias(module: Any) -> Any:
    """Another module with the same parameters and submodules, whose own attributes may be set."""
    alias = copy(module)
    alias._modules = dict(module._modules)
    return alias


def _hashable(value: Any) -> Any:
    """One number as it is; several as a tuple."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _numbers(name: str, value: Any) -> ByScale:
    """A number, or one for every scale, as Python's; raises InputError for anything else."""
    several = value if isinstance(value, tuple) else (value,)
    for each in several:
        if isinstance(each, bool) or not isinstance(each, Real) or not math.isfinite(each):
            raise InputError(f"{name} must be a number, got {each!r}")
    return tuple(map(float, several)) if isinstance(value, tuple) else float(value)


def _said(value: ByScale) -> str:
    return ", ".join(map(_said, value)) if isinstance(value, tuple) else f"{value:g}"


def fresh_sparse(
    config: Any, tokenizer: nn.Module, plans: Mapping[str, SparsityPlan], default: str, sampling: Sampling | None = None
) -> Model:
    """A sparse model of a shape, its backbone with starting values.

    Raises:
        RecipeError: a plan does not fit the shape, or the plans do not fit each other.
    """
    backbone, own = family_of(config).backbone(config), Plans(plans, default)
    split(backbone, own)
    return Model(backbone, tokenizer, sampling, own)


def differences(model: Any, teacher: Any, fields: Sequence[str] | None = None) -> list[str]:
    """In what a model's config differs from its teacher's, a line for each field."""
    names = [name for name in type(model).model_fields if fields is None or name in fields]
    pairs = [(name, getattr(model, name), getattr(teacher, name, None)) for name in names]
    return [f"{name}: the model has {ours}, its teacher {theirs}" for name, ours, theirs in pairs if ours != theirs]
