"""VARModel: tokenizer and transformer as one object that generates images, dense or sparse."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


class VARModel(nn.Module):
    """A tokenizer and a transformer that fit each other.

    Attributes:
        sampling: the sampling that the model was measured with; what ``generate`` uses unless told otherwise.
        origin: where the weights come from (name, path, vae, revision), as far as known; empty for a model made in memory.
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
    ) -> Tensor:
        """Images of the given classes.

        Args:
            labels: class indices [B]; ``classes`` (or -1) for no class.
            cfg, top_k, top_p: see Sampling; the model's own values by default.
            seed: every chunk draws from a generator of its own derived from it, on the CPU.
            chunk: images generated at once. Part of the contract: equal (labels, seed, chunk, dtype, machine) give
                equal images.

        Returns:
            images [B, 3, H, W] in [0, 1], fp32, on the model's device.

        Raises:
            InputError: a label outside the classes, or a sampling value that makes no sense.
        """
        pieces = [
            self.decode(tokens)
            for tokens in self._token_chunks(labels, self._sampling(cfg, top_k, top_p), seed, chunk)
        ]
        side = self.tokenizer.config.image_size
        return torch.cat(pieces) if pieces else torch.zeros(0, 3, side, side, device=self.device)

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
    ) -> Tensor:
        """Token pyramids [B, L] int64 of the given classes, all scales in one row; arguments as in ``generate``."""
        pieces = [
            torch.cat(tokens, dim=1)
            for tokens in self._token_chunks(labels, self._sampling(cfg, top_k, top_p), seed, chunk)
        ]
        total = self.transformer.config.pyramid.total
        return torch.cat(pieces) if pieces else torch.zeros(0, total, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def decode(self, tokens: Tensor | Sequence[Tensor]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of pyramids [B, L], or of the tokens [B, L_s] of every scale."""
        if isinstance(tokens, Tensor):
            tokens = tokens.split(list(self.transformer.config.pyramid.lengths), dim=1)
        return self.tokenizer.decode(tokens).float().add(1).mul(0.5)

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

    def _token_chunks(
        self, labels: Tensor | Sequence[int], sampling: Sampling, seed: int, chunk: int
    ) -> list[list[Tensor]]:
        if chunk < 1:
            raise InputError(f"chunk must be at least 1, got {chunk}")
        given = self._labels(labels)
        return [
            self._sample_chunk(part, sampling, torch.Generator().manual_seed(chunk_seed(seed, index)))
            for index, part in enumerate(given.split(chunk))
            if len(part)
        ]

    def _sample_chunk(self, labels_B: Tensor, sampling: Sampling, generator: torch.Generator) -> list[Tensor]:
        """Tokens [B, L_s] of every scale for one batch."""
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
            index = self._draw(filter_logits(logits, sampling.top_k, sampling.top_p), generator)
            tokens.append(index)
            if scale + 1 < pyramid.num_scales:
                added = quantizer.contribution(scale, index)
                f_hat = added if f_hat is None else f_hat + added
                x = transformer.next_tokens(quantizer.next_input(f_hat, scale + 1).to(self.dtype), scale + 1)
                x = x.repeat(2, 1, 1)
        return tokens

    @staticmethod
    def _draw(logits_BLV: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B, L] drawn from the softmax of the logits, by one multinomial draw on the CPU's generator."""
        probability = F.softmax(logits_BLV.flatten(0, 1), dim=-1)
        index = torch.multinomial(probability.cpu(), 1, replacement=True, generator=generator)
        return index.view(logits_BLV.shape[:2]).to(logits_BLV.device)
