"""VARModel: tokenizer and transformer as one object that generates images, dense or sparse."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.models.attention import GenerationCache
from actvar_convert.models.var import Span, VARTransformer
from actvar_convert.models.vqvae import VQVAE


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        cfg: strength of classifier-free guidance; grows linearly from 0 at the first scale to this at the last.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together reach this probability; 0: all.
    """

    cfg: float = 1.5
    top_k: int = 0
    top_p: float = 0.0


def filter_logits(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside top-k and top-p at minus infinity (top-p after top-k, as the reference does)."""
    if top_k > 0:
        kth = logits_BLV.topk(min(top_k, logits_BLV.shape[-1]), dim=-1).values[..., -1:]
        logits_BLV = logits_BLV.masked_fill(logits_BLV < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BLV.sort(dim=-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[..., -1] = False
        logits_BLV = logits_BLV.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits_BLV


def chunk_seed(seed: int, chunk_index: int) -> int:
    """Seed of the random numbers of one chunk of images; the first chunk uses ``seed`` itself."""
    if chunk_index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{chunk_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Noise:
    """The random numbers of one chunk of images: from one generator on the CPU, scale by scale for the whole chunk.

    So the numbers of an image do not depend on which images are under way together.

    Args:
        seed: of the chunk.
        images: in the chunk.
        keep: whether the numbers are wanted again, for other rows of the chunk: 4 L V bytes per image.
    """

    def __init__(self, seed: int, images: int, *, keep: bool = False) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._images, self._keep = images, keep
        self._kept: list[Tensor] = []

    def exponential(self, scale: int, length: int, vocab: int) -> Tensor:
        """Standard exponential numbers [images, length, vocab] fp32 of one scale, on the CPU; scales in order."""
        if scale < len(self._kept):
            return self._kept[scale]
        drawn = torch.empty(self._images, length, vocab).exponential_(1, generator=self._generator)
        if self._keep:
            self._kept.append(drawn)
        return drawn


def draw(logits_BLV: Tensor, noise_BLV: Tensor) -> Tensor:
    """Tokens [B, L] drawn from the softmax of the logits by exponential noise.

    The largest quotient of probability and noise; ``torch.multinomial`` draws one sample in the same way and from the
    same numbers, but checks its input on the host first.
    """
    return F.softmax(logits_BLV, dim=-1).div_(noise_BLV.to(logits_BLV.device)).argmax(-1)


GENERATION_BYTES = {"cpu": 2 * 2**30, "cuda": 32 * 2**30}
"""Memory that the images under way at once may take, by kind of device; larger chunks are cut into pieces.

Beside it there are the weights and, for a chunk in pieces, its noise: 4 L V bytes per image of the chunk.
"""


class VARModel(nn.Module):
    """A tokenizer and a transformer that fit each other.

    Attributes:
        sampling: the sampling that the model was measured with; what ``generate`` uses unless told otherwise.
        origin: where the weights come from (name, path, vae, revision), as far as known; empty for a model that was
            made in memory.
    """

    transformer: VARTransformer
    tokenizer: VQVAE

    def __init__(self, transformer: VARTransformer, tokenizer: VQVAE, sampling: Sampling | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.origin: dict[str, str] = {}

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
    ) -> Tensor:
        """Images of the given classes.

        Args:
            labels: class indices [B]; ``classes`` (or -1) for no class.
            cfg, top_k, top_p: see Sampling; the model's own values by default.
            seed: every chunk draws from a generator of its own derived from it, on the CPU.
            chunk: images that draw together. Part of the contract: equal (labels, seed, chunk, dtype, machine) give
                equal images.
            at_once: images of a chunk that are under way at the same time, for memory; by default as many as
                ``images_at_once`` says. Draws do not depend on it.

        Returns:
            images [B, 3, H, W] in [0, 1], fp32, on the model's device.

        Raises:
            InputError: a label outside the classes, or a value that makes no sense.
        """
        side = self.tokenizer.config.image_size
        given = self._labels(labels)
        images = torch.empty(len(given), 3, side, side, device=self.device)
        done = 0
        for tokens in self._token_pieces(given, self._sampling(cfg, top_k, top_p), seed, chunk, at_once):
            images[done : done + len(tokens[0])] = self.decode(tokens)
            done += len(tokens[0])
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
    ) -> Tensor:
        """Token pyramids [B, L] int64 of the given classes, all scales in one row; arguments as in ``generate``."""
        given = self._labels(labels)
        pieces = self._token_pieces(given, self._sampling(cfg, top_k, top_p), seed, chunk, at_once)
        rows = [torch.cat(tokens, dim=1) for tokens in pieces]
        total = self.transformer.config.pyramid.total
        return torch.cat(rows) if rows else torch.zeros(0, total, dtype=torch.int64, device=self.device)

    def images_at_once(self) -> int:
        """Images that generation and decoding keep under way at once: those that ``GENERATION_BYTES`` holds.

        An image costs its keys and values with guidance, the logits of the largest scale with their noise, the hidden
        states of that scale, and afterwards the widest maps of the decoder.
        """
        config, tokenizer, size = self.transformer.config, self.tokenizer.config, self.dtype.itemsize
        largest = max(config.pyramid.lengths)
        cache = 4 * config.depth * config.pyramid.total * config.width * size
        states = 2 * largest * (2 * config.hidden + 8 * config.width) * size + 6 * largest * config.vocab * 4
        maps = 6 * tokenizer.image_size**2 * tokenizer.ch * max(tokenizer.ch_mult[:2]) * 4
        return max(1, GENERATION_BYTES.get(self.device.type, 2 * 2**30) // max(cache + states, maps))

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[Tensor]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of pyramids [B, L], or of the tokens [B, L_s] of every scale."""
        pieces = self.split(tokens) if isinstance(tokens, Tensor) else tokens
        return self.tokenizer.decode(pieces).float().add_(1).mul_(0.5)

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
        if chosen.top_k < 0 or not 0 <= chosen.top_p <= 1:
            raise InputError(f"top_k must be at least 0 and top_p within 0 to 1, got {chosen.top_k} and {chosen.top_p}")
        return chosen

    def _labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        given = torch.as_tensor(labels, dtype=torch.int64, device=self.device).flatten()
        null = self.transformer.null_class
        given = torch.where(given == -1, null, given)
        if len(given) and (int(given.min()) < 0 or int(given.max()) > null):
            raise InputError(f"labels must be within 0 to {null - 1}, or -1 for no class")
        return given

    def _token_pieces(
        self, labels_B: Tensor, sampling: Sampling, seed: int, chunk: int, at_once: int | None
    ) -> Iterator[list[Tensor]]:
        """Tokens [b, L_s] of every scale, for as many images b at a time as memory is meant for."""
        limit = self.images_at_once() if at_once is None else at_once
        if chunk < 1 or limit < 1:
            raise InputError(f"chunk and at_once must be at least 1, got {chunk} and {limit}")
        for index, chunk_labels in enumerate(torch.split(labels_B, chunk)):
            noise = Noise(chunk_seed(seed, index), len(chunk_labels), keep=len(chunk_labels) > limit)
            for begin in range(0, len(chunk_labels), limit):
                rows = slice(begin, begin + limit)
                yield self._sample(chunk_labels[rows], sampling, noise, rows)

    def _sample(self, labels_B: Tensor, sampling: Sampling, noise: Noise, rows: slice) -> list[Tensor]:
        """Tokens [B, L_s] of every scale for some rows of a chunk."""
        transformer, quantizer = self.transformer, self.tokenizer.quantize
        pyramid, B = transformer.config.pyramid, len(labels_B)
        condition = transformer.class_emb(torch.cat((labels_B, torch.full_like(labels_B, transformer.null_class))))
        modulation = transformer.modulation(condition)
        cache = GenerationCache(transformer.config, 2 * B, self.device, self.dtype)
        x = transformer.first_tokens(condition)
        f_hat: Tensor | None = None
        tokens = []
        for scale in range(pyramid.num_scales):
            span = Span(scale, (pyramid.lengths[scale],))
            for block, block_modulation in zip(transformer.blocks, modulation.blocks, strict=True):
                x = block(x, block_modulation, span, cache=cache)
            logits = transformer.logits(x, modulation.head)
            strength = sampling.cfg * scale / max(1, pyramid.num_scales - 1)
            logits = (1 + strength) * logits[:B] - strength * logits[B:]
            exponential = noise.exponential(scale, *logits.shape[1:])[rows]
            index = draw(filter_logits(logits, sampling.top_k, sampling.top_p), exponential)
            tokens.append(index)
            if scale + 1 < pyramid.num_scales:
                added = quantizer.contribution(scale, index)
                f_hat = added if f_hat is None else f_hat + added
                x = transformer.next_tokens(quantizer.next_input(f_hat, scale + 1).to(self.dtype), scale + 1)
                x = x.repeat(2, 1, 1)
        return tokens
