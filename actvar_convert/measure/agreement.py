"""How closely a student predicts what its teacher predicts: KL and top-1 agreement under teacher forcing.

Shapes: B pyramids in hand, N pyramids in all, L tokens, S scales, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actvar_convert.measure.image_features import remembered
from actvar_convert.measure.quality_report import AgreementQuality, KLQuality
from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.system.progress import Progress, Task

HELD_OUT_SEED = 1_000_000_007
"""Seed of the held-out pyramids: far from what people give as the seed of calibration and training samples."""

LOGITS_AT_ONCE = 1 << 25
"""Values of one logits tensor that are held at once (256 MiB in fp64); a few tensors of this size are needed."""


@dataclass(frozen=True)
class LogitsAgreement:
    """Per pyramid and scale, averaged over the tokens of the scale.

    Attributes:
        kl_NS: KL(teacher || student) in nats per token, float64.
        top1_NS: share of the tokens whose likeliest code is the teacher's, float64.
        lengths: tokens of each scale.
        guided_kl_NS: KL between guided predictions, float64; None if it was not asked for.
    """

    kl_NS: Tensor
    top1_NS: Tensor
    lengths: tuple[int, ...]
    guided_kl_NS: Tensor | None = None

    def per_token(self, value_NS: Tensor) -> Tensor:
        """Mean over all tokens of each pyramid, [N]."""
        weight = torch.tensor(self.lengths, dtype=torch.float64)
        return value_NS @ (weight / weight.sum())


@torch.inference_mode()
def compare_logits(
    student: Model,
    teacher: Model,
    tokens: Tensor,
    condition: Any,
    task: Task,
    *,
    guided: Sampling | None = None,
) -> LogitsAgreement:
    """Student against teacher on pyramids [N, L, ...] with their conditions: both see the true coarser scales.

    A student whose guidance is folded is compared with the teacher's guided predictions.

    Args:
        task: told of every pyramid that is done.
        guided: sampling under whose guidance predictions are compared as well, which takes both models twice as long;
            not for a folded student.
    """
    lengths, alphabet = teacher.schedule.lengths, teacher.alphabet
    rows = max(1, min(64, LOGITS_AT_ONCE // (teacher.schedule.total * alphabet.width)))
    condition = teacher.family.condition(teacher.config, condition)
    kl, top1, of_guided = [], [], []
    for begin in range(0, len(tokens), rows):
        part = slice(begin, begin + rows)
        own = condition.rows(part).to(teacher.device)
        inputs = teacher.teacher_forcing_input(tokens[part].to(teacher.device))
        expected = teacher.guided_logits(own, inputs) if student.folded else teacher.transformer(own, inputs)
        found = _logits(student, own, inputs)
        kl.append(_scale_means(alphabet.divergence(expected.double(), found.double()), lengths))
        top1.append(_scale_means(alphabet.agreement(expected, found), lengths))
        if guided is not None:
            nothing = own.null()
            halves = ((expected, teacher.transformer(nothing, inputs)), (found, _logits(student, nothing, inputs)))
            pair = (teacher.guided(torch.cat(both), guided).double() for both in halves)
            of_guided.append(_scale_means(alphabet.divergence(*pair), lengths))
        task.advance(len(inputs))
    return LogitsAgreement(torch.cat(kl), torch.cat(top1), lengths, torch.cat(of_guided) if of_guided else None)


def held_out_pyramids(
    teacher: Model,
    count: int,
    batch: int,
    *,
    sampling: Sampling,
    progress: Progress,
    cache: Path | None,
    fingerprint: str,
) -> tuple[Tensor, Any]:
    """Pyramids [N, L, ...] that the teacher samples, apart from those of calibration and training, and conditions.

    Args:
        count, batch: N, and pyramids sampled at once.
        cache: folder in which they are kept and found again.
        fingerprint: ``model_fingerprint(teacher)``.
    """
    condition = teacher.balanced(count)
    with progress.task("held-out pyramids", count) as task:

        def sample() -> dict[str, Tensor]:
            tokens = teacher.generate_tokens(condition, sampling=sampling, seed=HELD_OUT_SEED, chunk=batch)
            task.advance(count)
            return {"tokens": tokens.cpu()}

        key = {"model": fingerprint, "sampling": sampling.settings, "chunk": batch, "held_out": count}
        key |= teacher.drawn_on
        return remembered(cache, key, sample, count, task)["tokens"], condition


def agreement_quality(found: LogitsAgreement) -> tuple[KLQuality, AgreementQuality]:
    """KL and top-1 agreement over all tokens, with standard errors over the pyramids."""
    top1 = found.per_token(found.top1_NS)
    return (
        kl_quality(found.kl_NS, found),
        AgreementQuality(
            top1=float(top1.mean()),
            per_scale=tuple(found.top1_NS.mean(0).tolist()),
            standard_error=float(top1.std() / len(top1) ** 0.5),
        ),
    )


def kl_quality(kl_NS: Tensor, found: LogitsAgreement) -> KLQuality:
    """One of the KL of an agreement over all tokens, with its standard error over the pyramids."""
    kl = found.per_token(kl_NS)
    return KLQuality(
        mean=float(kl.mean()),
        per_scale=tuple(kl_NS.mean(0).tolist()),
        standard_error=float(kl.std() / len(kl) ** 0.5),
        pyramids=len(kl),
    )


def _logits(student: Model, condition: Any, inputs_BLz: Tensor) -> Tensor:
    """A student's predictions on the device of its teacher, which condition and inputs are on."""
    logits: Tensor = student.transformer(condition.to(student.device), inputs_BLz.to(student.device))
    return logits.to(inputs_BLz.device)


def _scale_means(value_BL: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.stack([part.double().mean(1) for part in torch.split(value_BL, list(lengths), dim=1)], dim=1).cpu()
