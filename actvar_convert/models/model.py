"""VARModel: tokenizer and transformer as one object that generates images, dense or sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.generation import Generation
from actvar_convert.models.graphs import Recordings
from actvar_convert.models.sampling import Noise, Sampling, chunk_seed, guided
from actvar_convert.models.var import VARTransformer
from actvar_convert.models.vqvae import VQVAE

__all__ = ["GENERATION_BYTES", "NoiseSource", "Sampling", "VARModel", "chunk_seed", "images_at_once"]

NoiseSource = Literal["device", "cpu"]
"""Which generator draws: that of the device the model is on, as in the reference implementation, or the CPU's."""

GENERATION_BYTES = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}
"""Memory that the images under way at once may take, by kind of device; larger chunks are cut into pieces.

On a GPU at most a third of its memory. Beside it there are the weights, the images made so far (12 H W bytes each), the
random numbers of a chunk (4 L_s V bytes per image at the largest scale; for a chunk in pieces those of all scales,
4 L V), and with ``compile=True`` once more as much for a second recording.
"""


def generation_bytes(device: str | torch.device) -> int:
    """The part of ``GENERATION_BYTES`` that one device grants."""
    kind = torch.device(device).type
    granted = GENERATION_BYTES.get(kind, 2 * 2**30)
    if kind == "cuda" and torch.cuda.is_available():
        granted = min(granted, torch.cuda.get_device_properties(device).total_memory // 3)
    return granted


def images_at_once(
    config: TransformerConfig, tokenizer: TokenizerConfig, itemsize: int, device: str | torch.device, rows: int = 2
) -> int:
    """Images that ``GENERATION_BYTES`` holds at once on a device (cpu, cuda), at least one.

    An image of R ``rows`` (two with guidance, one where that is folded in) costs 2 R D L C numbers of ``itemsize``
    bytes for its keys and values. To these come, at the largest scale, the hidden states of a block, R L_s (2 H + 8 C)
    numbers, and the logits with what guidance, filters and drawing make of them, (12 R + 16) L_s V bytes. Afterwards
    the decoder takes six of its widest maps, in fp32.
    """
    largest = max(config.pyramid.lengths)
    cache = 2 * rows * config.depth * config.pyramid.total * config.width * itemsize
    states = rows * largest * (2 * config.hidden + 8 * config.width) * itemsize
    states += (12 * rows + 16) * largest * config.vocab
    maps = 6 * tokenizer.image_size**2 * tokenizer.ch * max(tokenizer.ch_mult[:2]) * 4
    return max(1, generation_bytes(device) // max(cache + states, maps))


def guided_logits(
    model: VARModel, labels_B: Tensor, inputs_BLz: Tensor, conditional_BLV: Tensor | None = None
) -> Tensor:
    """Predictions [B, L, V] under teacher forcing, guided as the model samples by default.

    Args:
        model: dense, or with paired guidance.
        labels_B, inputs_BLz: see ``VARTransformer.forward``.
        conditional_BLV: the predictions with the class, where they are known.
    """
    transformer = model.transformer
    conditional = transformer(labels_B, inputs_BLz) if conditional_BLV is None else conditional_BLV
    unconditional = transformer(torch.full_like(labels_B, transformer.null_class), inputs_BLz)
    return guided_as_sampled(model, torch.cat((conditional, unconditional)))


def guided_as_sampled(model: VARModel, logits_2BLV: Tensor, sampling: Sampling | None = None) -> Tensor:
    """Predictions [B, L, V] guided as in sampling, from those with and then those without the class.

    Args:
        model: whose scales they are of.
        logits_2BLV: B rows with the class, then the same without.
        sampling: that gives the strength; by default the model's own.
    """
    sampling = sampling or model.sampling
    pyramid = model.transformer.config.pyramid
    strengths = torch.tensor([sampling.strength(scale, pyramid.num_scales) for scale in range(pyramid.num_scales)])
    strength = strengths.repeat_interleave(torch.tensor(pyramid.lengths)).unsqueeze(-1)
    return guided(logits_2BLV, strength.to(logits_2BLV.device))


class VARModel(nn.Module):
    """A tokenizer and a transformer that fit each other.

    Attributes:
        sampling: the sampling that the model was measured with; what ``generate`` uses unless told otherwise.
        origin: where the weights come from (name, path, vae, revision), as far as known, and the heads, sides and
            residual_ratio that were given where the files do not tell; empty for a model that was made in memory.
        recordings: the CUDA graphs of ``generate(..., compile=True)``; ``recordings.clear()`` frees their memory.
    """

    transformer: VARTransformer
    tokenizer: VQVAE

    def __init__(self, transformer: VARTransformer, tokenizer: VQVAE, sampling: Sampling | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.origin: dict[str, str] = {}
        self.recordings = Recordings()

    @property
    def is_sparse(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_start.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.pos_start.dtype

    @torch.inference_mode()
    def generate(
        self,
        labels: Tensor | Sequence[int],
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        chunk: int = 64,
        at_once: int | None = None,
        compile: bool = False,
        noise: NoiseSource = "device",
        on_images: Callable[[int], None] = lambda count: None,
    ) -> Tensor:
        """Images of the given classes.

        Args:
            labels: class indices [B]; ``classes`` (or -1) for no class.
            cfg, top_k, top_p: see Sampling; the model's own values by default. cfg is fixed where guidance is folded.
            seed: every chunk draws from a generator of its own derived from it.
            chunk: images that draw together. Part of the contract: equal (labels, seed, chunk, dtype, machine, noise)
                give equal images.
            at_once: images of a chunk that are under way at the same time, for memory; by default as many as
                ``images_at_once`` says. Draws do not depend on it.
            compile: replay CUDA graphs, which the first call for a number of images records (seconds); the same images
                up to rounding. For models on a GPU.
            noise: ``device`` draws on the GPU that the model is on, as the reference implementation does: at once, but
                other kinds of GPU draw other numbers. ``cpu`` draws what a CPU draws, so that a seed means the same
                image everywhere up to rounding: 20 ns a number, of which an image takes L V. On a CPU both are one.
            on_images: called with the number of images that are ready anew: chunk by chunk, or piece by piece where
                memory cuts a chunk.

        Returns:
            images [B, 3, H, W] in [0, 1], fp32, on the model's device.

        Raises:
            InputError: a label outside the classes, a value that makes no sense, or ``compile`` where there are no
                CUDA graphs, or for a plan that they cannot hold.
        """
        given = self._labels(labels)
        images, done = self._no_images(len(given)), 0
        pieces = self._pieces(given, self._sampling(cfg, top_k, top_p), seed, chunk, at_once, compile, noise, True)
        for piece in pieces:
            images[done : done + len(piece)] = piece
            done += len(piece)
            on_images(len(piece))
        return images

    @torch.inference_mode()
    def generate_tokens(
        self,
        labels: Tensor | Sequence[int],
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        chunk: int = 64,
        at_once: int | None = None,
        compile: bool = False,
        noise: NoiseSource = "device",
    ) -> Tensor:
        """Token pyramids [B, L] int64 of the given classes, all scales in one row; arguments as in ``generate``."""
        given = self._labels(labels)
        pieces = self._pieces(given, self._sampling(cfg, top_k, top_p), seed, chunk, at_once, compile, noise, False)
        none = torch.zeros(0, self.transformer.config.pyramid.total, dtype=torch.int64, device=self.device)
        return torch.cat([none, *pieces])

    def images_at_once(self) -> int:
        """Images that generation and decoding keep under way at once: those that ``GENERATION_BYTES`` holds."""
        transformer, itemsize = self.transformer, self.dtype.itemsize
        rows = transformer.rows_per_image
        return images_at_once(transformer.config, self.tokenizer.config, itemsize, self.device, rows)

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[Tensor]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of pyramids [B, L], or of the tokens [B, L_s] of every scale.

        As many at a time as memory is meant for.
        """
        scales = self.split(tokens) if isinstance(tokens, Tensor) else tokens
        images, limit = self._no_images(len(scales[0])), self.images_at_once()
        for begin in range(0, len(images), limit):
            rows = slice(begin, begin + limit)
            images[rows] = self.tokenizer.images([index[rows] for index in scales])
        return images

    def _no_images(self, count: int) -> Tensor:
        """Room for images [count, 3, H, W], fp32."""
        side = self.tokenizer.config.image_size
        return torch.empty(count, 3, side, side, device=self.device)

    def split(self, tokens_BL: Tensor) -> list[Tensor]:
        """The tokens [B, L_s] of every scale of pyramids [B, L]."""
        return list(torch.split(tokens_BL, list(self.transformer.config.pyramid.lengths), dim=1))

    def teacher_forcing_input(self, tokens_BL: Tensor) -> Tensor:
        """Transformer inputs [B, L - L_0, z] of pyramids [B, L]."""
        return self.tokenizer.quantize.teacher_forcing_input(self.split(tokens_BL))

    def _sampling(self, cfg: float | None, top_k: int | None, top_p: float | None) -> Sampling:
        chosen = Sampling(
            self.sampling.cfg if cfg is None else cfg,
            self.sampling.top_k if top_k is None else top_k,
            self.sampling.top_p if top_p is None else top_p,
        )
        if self.transformer.rows_per_image == 1 and chosen.cfg != self.sampling.cfg:
            raise InputError(
                f"guidance of strength {self.sampling.cfg:g} is folded into this model's predictions, so cfg "
                f"{chosen.cfg:g} is out of reach; leave cfg out, or convert with budget.guidance paired"
            )
        if not math.isfinite(chosen.cfg):
            raise InputError(f"cfg must be a number, got {chosen.cfg}")
        if chosen.top_k < 0 or not 0 <= chosen.top_p <= 1:
            raise InputError(f"top_k must be at least 0 and top_p within 0 to 1, got {chosen.top_k} and {chosen.top_p}")
        return chosen

    def _labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        """Class indices [B] on the model's device; what is on the CPU is checked there, without waiting for a GPU."""
        null = self.transformer.null_class
        try:
            given = torch.as_tensor(labels, dtype=torch.int64).flatten()
        except (OverflowError, ValueError, RuntimeError) as error:
            raise InputError(f"labels must be whole numbers within 0 to {null - 1}, or -1 for no class") from error
        given = torch.where(given == -1, null, given)
        if len(given) and (int(given.min()) < 0 or int(given.max()) > null):
            raise InputError(f"labels must be within 0 to {null - 1}, or -1 for no class")
        return given.to(self.device)

    def _noise_device(self, source: NoiseSource) -> torch.device:
        if source not in ("device", "cpu"):
            raise InputError(f"noise {source!r} is unknown; give device or cpu")
        return self.device if source == "device" and self.device.type == "cuda" else torch.device("cpu")

    def _pieces(
        self,
        labels_B: Tensor,
        sampling: Sampling,
        seed: int,
        chunk: int,
        at_once: int | None,
        compile: bool,
        source: NoiseSource,
        decoded: bool,
    ) -> Iterator[Tensor]:
        """Pyramids [b, L], or decoded images [b, 3, H, W], of as many images at a time as memory is meant for; a piece
        may be overwritten by the next."""
        limit = self.images_at_once() if at_once is None else at_once
        if chunk < 1 or limit < 1:
            raise InputError(f"chunk and at_once must be at least 1, got {chunk} and {limit}")
        device = self._noise_device(source)
        for index, chunk_labels in enumerate(torch.split(labels_B, chunk) if len(labels_B) else ()):
            count = len(chunk_labels)
            noise = Noise(chunk_seed(seed, index), count, keep=count > limit, device=device)
            for begin in range(0, count, limit):
                rows = slice(begin, begin + limit)
                own = chunk_labels[rows]
                if compile:
                    recorded = self.recordings.of(self.transformer, self.tokenizer, len(own), sampling, self._plan_key)
                    tokens = recorded.tokens(own, noise, rows)
                    yield recorded.images() if decoded else torch.cat(tokens, dim=1)
                else:
                    tokens = self._sample(own, sampling, noise, rows)
                    yield self.decode(tokens) if decoded else torch.cat(tokens, dim=1)

    @property
    def _plan_key(self) -> Hashable:
        """What distinguishes the ways in which one set of weights can run."""
        return None

    def _sample(self, labels_B: Tensor, sampling: Sampling, noise: Noise, rows: slice) -> list[Tensor]:
        """Tokens [B, L_s] of every scale for some rows of a chunk."""
        pyramid, vocab = self.transformer.config.pyramid, self.transformer.config.vocab
        under_way = Generation(self.transformer, self.tokenizer.quantize, labels_B, sampling)
        return [
            under_way.step(scale, noise.exponential(scale, length, vocab)[rows])
            for scale, length in enumerate(pyramid.lengths)
        ]
