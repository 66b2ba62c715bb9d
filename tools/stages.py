"""The two stages that train a bundled model, for any size of image: the VQVAE, then the VAR transformer.

Each stage asks for its batch by the number of the step and keeps one checkpoint: called again, it goes on where it
stopped and ends with the weights of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Log, cosine, plateau, save, set_rate, to_float

from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import SelfAttention, VARBlock, VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE

HELD_OUT_PART = 250
"""Held-out images that are measured at once."""


def quantise_with_loss(vae: VQVAE, f: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """Straight-through features and the codebook loss of the reference; counts the codes used in ``hits`` [V]."""
    quantizer, num_scales = vae.quantize, vae.config.schedule.num_scales
    rest, f_hat, loss = f.detach().clone(), torch.zeros_like(f), f.new_zeros(())
    for scale in range(num_scales):
        z = quantizer.downsample(rest, scale).permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        index = quantizer.nearest(z.detach())
        hits += torch.bincount(index, minlength=len(hits))
        h = quantizer.contribution(scale, index.view(len(f), -1))
        f_hat = f_hat + h
        rest = rest - h.detach()
        loss = loss + F.mse_loss(f_hat.detach(), f) * 0.25 + F.mse_loss(f_hat, f.detach())
    return (f_hat - f).detach() + f, loss / num_scales


def _restart_unused(vae: VQVAE, f: Tensor, hits: Tensor, seed: int) -> None:
    """Moves codes that are hardly used to encoder outputs, shortened at random."""
    torch.manual_seed(seed)
    rows = f.detach().permute(0, 2, 3, 1).reshape(-1, f.shape[1])
    scale = torch.rand(len(hits), 1, device=f.device)
    dead = hits < 0.03 * hits.mean()
    pick = torch.randint(len(rows), (len(hits),), device=f.device)
    vae.quantize.embedding.weight.data[dead] = (rows[pick] * scale)[dead]


def fit_vqvae(
    vae: VQVAE,
    path: Path,
    log: Log,
    *,
    images: Callable[[int], Tensor],
    held_out: Tensor,
    steps: int,
    every: int,
    device: torch.device,
) -> None:
    """Squared plus absolute reconstruction error and the codebook loss; unused codes restart at encoder outputs.

    Args:
        vae: where training starts from; trained in place.
        path: checkpoint.
        log: told about losses.
        images: uint8 [B, 1, H, W] of a step.
        held_out: uint8 [N, 1, H, W].
        steps: in all.
        every: steps from one held-out measurement and checkpoint to the next; the last step has both.
        device: where to train.
    """
    vae.to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    hits = torch.zeros(vae.config.vocab, device=device)
    begin = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        hits, begin = state.get("hits", hits), state["step"]
    for step in range(begin, steps):
        set_rate([optimizer], cosine(step, steps))
        x = to_float(images(step)).to(device).mul(2).sub(1)
        with torch.autocast(device.type, torch.bfloat16):
            f = vae.features(x).float()
        f_q, codebook_loss = quantise_with_loss(vae, f, hits)
        with torch.autocast(device.type, torch.bfloat16):
            reconstruction = vae.decoder(vae.post_quant_conv(f_q)).float()
        error = F.mse_loss(reconstruction, x)
        loss = error + 0.2 * F.l1_loss(reconstruction, x) + codebook_loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % (50 if step < 500 else 200) == 0:
            used = float((hits > 0).float().mean())
            if step < 0.6 * steps:
                _restart_unused(vae, f, hits, step)
            hits.zero_()
            values = {"mse": float(error.detach()), "codebook": float(codebook_loss.detach())}
            log(stage="vqvae", step=done, used=used, **values)
        if done % every == 0 or done == steps:
            log(stage="vqvae", step=done, held_out_mse=_reconstruction_error(vae, held_out, device))
            save(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=done, hits=hits)


@torch.inference_mode()
def _reconstruction_error(vae: VQVAE, images: Tensor, device: torch.device) -> float:
    """Mean squared error on images in [-1, 1]."""
    total = 0.0
    for part in torch.split(images, HELD_OUT_PART):
        x = to_float(part).mul(2).sub(1).to(device)
        total += float(F.mse_loss(vae.decode(vae.encode(x)), x)) * len(x)
    return total / len(images)


def grow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformer twice as deep that does nearly the same: every block twice, its gates halved.

    Training half the depth first and growing it is cheaper than full depth from the start (progressive stacking).
    """
    grown = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            grown[name] = tensor
            continue
        _, index, rest = name.split(".", 2)
        if rest.startswith("ada_lin."):
            tensor = tensor.clone()
            tensor[: len(tensor) // 3] *= 0.5  # the first two of six rows of modulation are the gates
        for copy in (0, 1):
            grown[f"blocks.{2 * int(index) + copy}.{rest}"] = tensor.clone()
    return grown


def make_optimizers(model: VARTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def var_loss(
    model: Callable[[Tensor, Tensor], Tensor], vae: VQVAE, tokens_BL: Tensor, labels: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy [L] of every position, in nats, teacher forcing; tokens may end after any scale but the first."""
    pyramid = vae.config.schedule
    scales = pyramid.scales_in(tokens_BL.shape[1])
    pieces = list(torch.split(tokens_BL, list(pyramid.lengths[:scales]), 1))
    with torch.no_grad():
        f_hat, found = None, []
        for scale, own in enumerate(pieces[: scales - 1]):
            f_hat = vae.accumulate(f_hat, own, scale, pyramid)
            found.append(vae.next_input(f_hat, scale + 1, pyramid))
        inputs = torch.cat(found, dim=1)
    logits = model(labels, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=smoothing)
    return loss.view(tokens_BL.shape).mean(0)


def attend_by_scale(
    attention: SelfAttention,
    lengths: tuple[int, ...],
    q_BHLd: Tensor,
    k_BHLd: Tensor,
    v_BHLd: Tensor,
    mask_LL: Tensor,
) -> Tensor:
    """``SelfAttention.attend`` of teacher forcing that leaves out what the mask leaves out: each large scale by itself,
    with the keys up to its own, in two products.

    For training on a CPU, where a masked SDPA computes every pair of 680 tokens: a step of the mosaics' transformer
    takes 5.5 s instead of 7.3 s, one thread. Under autocast the scores are rounded to bf16 before their softmax.

    Args:
        attention: whose output projection follows.
        lengths: tokens of every scale.
        q_BHLd, k_BHLd, v_BHLd: of tokens that may end after any scale.
        mask_LL: boolean, True: attends.
    """
    queries, out, begin = q_BHLd * attention.scale, [], 0
    ends = [end for end in accumulate(lengths) if end <= q_BHLd.shape[2]]
    few = max(1, sum(4 * end <= ends[-1] for end in ends))  # together, masked
    for end in ends[few - 1 :]:
        scores = queries[:, :, begin:end] @ k_BHLd[:, :, :end].transpose(-1, -2)
        if begin == 0:
            scores = scores.masked_fill(~mask_LL[:end, :end], -torch.inf)
        out.append(scores.softmax(-1).to(v_BHLd.dtype) @ v_BHLd[:, :, :end])
        begin = end
    found: Tensor = attention.proj(torch.cat(out, 2).transpose(1, 2).flatten(2))
    return found


class VarRun:
    """The transformer in training: model, averaged weights, optimisers, at half depth before step ``grow_at``."""

    def __init__(
        self, config: TransformerConfig, device: torch.device, path: Path, grow_at: int, compiled: bool
    ) -> None:
        self.config, self.device, self.path, self.grow_at, self.compiled = config, device, path, grow_at, compiled
        state = torch.load(path, weights_only=True, map_location=device) if path.exists() else None
        self.step = state["step"] if state else 0
        self.build(deep=self.step >= grow_at and (self.step > 0 or grow_at == 0))
        if state is not None and self.deep != state["deep"]:
            state["model"], state["average"] = grow(state["model"]), grow(state["average"])
            state["optimizers"] = None
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"] or (), strict=False):
                optimizer.load_state_dict(saved)

    def build(self, deep: bool) -> None:
        """A fresh model of full or half depth."""
        self.deep = deep
        depth = self.config.depth if deep else self.config.depth // 2
        self.model = VARTransformer(self.config.model_copy(update={"depth": depth}))
        self.model.initialise(torch.Generator().manual_seed(0))
        self.model.to(self.device)
        if self.device.type == "cpu":
            for block in self.model.blocks:
                attention = cast(VARBlock, block).attn
                attend = partial(attend_by_scale, attention, self.config.schedule.lengths)
                attention.attend = attend  # type: ignore[method-assign]
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = make_optimizers(self.model)
        if self.compiled:
            for block in self.model.blocks:
                block.compile()

    def grow(self) -> None:
        """Doubles the depth; the optimisers start anew."""
        state, average = self.model.state_dict(), self.average
        self.build(deep=True)
        self.model.load_state_dict(grow(state))
        self.average = grow(average)

    def follow(self) -> None:
        """Moves the averaged weights a little towards the current ones."""
        weight = min(0.998, (self.step + 1) / (self.step + 10))
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - weight)

    def save(self) -> None:
        save(
            self.path,
            model=self.model.state_dict(),
            average=self.average,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            step=self.step,
            deep=self.deep,
        )


@torch.inference_mode()
def held_out_loss(run: VarRun, vae: VQVAE, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss in nats per token of the current and of the averaged weights."""
    losses = []
    current = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for weights in (current, run.average):
        run.model.load_state_dict(weights, strict=False)
        with torch.autocast(run.device.type, torch.bfloat16):
            parts = [
                var_loss(run.model, vae, x.long().to(run.device), y.to(run.device)).mean()
                for x, y in zip(torch.split(tokens, HELD_OUT_PART), torch.split(labels, HELD_OUT_PART), strict=True)
            ]
        losses.append(float(torch.stack(parts).mean()))
    run.model.load_state_dict(current, strict=False)
    return losses[0], losses[1]


def fit_var(
    config: TransformerConfig,
    vae: VQVAE,
    path: Path,
    log: Log,
    *,
    pyramids: Callable[[int], tuple[Tensor, Tensor]],
    held_out: tuple[Tensor, Tensor],
    steps: int,
    grow_at: int,
    compiled: bool,
    device: torch.device,
    every: int = 200,
    coarse_until: int = 0,
    coarse_scales: int = 0,
) -> None:
    """Cross-entropy over all scales; one label in ten is the null class; an average of the weights is kept.

    The first steps may leave the finest scales out: most tokens are theirs, and what they are drawn from is learnt at
    the coarse ones.

    Args:
        config: shape of the transformer.
        vae: the trained tokenizer on ``device``.
        path: checkpoint.
        log: told about losses.
        pyramids: tokens [B, L] and labels [B] of a step.
        held_out: tokens [N, L] and labels [N].
        steps: in all.
        grow_at: step at which half the depth becomes all of it; 0: all of it from the start.
        compiled: compile the blocks.
        device: where to train.
        every: steps from one held-out measurement and checkpoint to the next; the last step has both.
        coarse_until, coarse_scales: steps that train the first scales alone, and how many those are, two at least.
            Held-out losses meanwhile are theirs.
    """
    run = VarRun(config, device, path, grow_at, compiled)
    generator, null = torch.Generator(), config.classes
    coarse = sum(config.schedule.lengths[:coarse_scales])
    for step in range(run.step, steps):
        if step >= grow_at and not run.deep:
            run.grow()
        generator.manual_seed(step)
        set_rate(run.optimizers, plateau(step, steps))
        tokens, labels = pyramids(step)
        tokens_kept = coarse if step < coarse_until else config.schedule.total
        x = tokens[:, :tokens_kept].long().to(device)
        y = torch.where(torch.rand(len(labels), generator=generator) < 0.1, null, labels).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = var_loss(run.model, vae, x, y).mean()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
        run.follow()
        run.step = step + 1
        if run.step % 20 == 0:
            log(stage="var", step=run.step, loss=float(loss.detach()), gradient=float(norm))
        if run.step % every == 0 or run.step == steps:
            now, averaged = held_out_loss(run, vae, held_out[0][:, :tokens_kept], held_out[1])
            log(stage="var", step=run.step, held_out_loss=now, averaged_held_out_loss=averaged)
            run.save()
