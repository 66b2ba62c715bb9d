"""The checks of a recipe: limits that a compression has to keep, and a table of given against allowed.

With a baseline, a report is compared to an earlier one instead: worse is a failure only beyond the noise of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from actvar_convert.cost.flops import FlopsReport
from actvar_convert.errors import ChecksFailed, InputError
from actvar_convert.measure.quality_report import QualityReport
from actvar_convert.system.progress import digits

NOISE_FACTOR = 2.0
"""Standard errors that a figure may be worse than its baseline: about one false alarm in forty per row."""

MEASURED_BY = ("images", "sampling", "dtype", "extractor", "reference")
"""Fields of a quality report that two evaluations share if their figures can be compared."""


class Checks(Protocol):
    """The limits of a recipe; None: not checked."""

    @property
    def max_flops_ratio(self) -> float | None: ...

    @property
    def max_kl(self) -> float | None: ...

    @property
    def max_fid_increase(self) -> float | None: ...

    @property
    def max_distance(self) -> float | None: ...


class CheckRow(BaseModel):
    """One check: it holds when ``given`` is at most ``allowed``."""

    model_config = ConfigDict(frozen=True)

    name: str
    given: float
    allowed: float
    origin: str = Field(description="source of the allowed value")

    @property
    def passed(self) -> bool:
        return self.given <= self.allowed


class CheckTable(BaseModel):
    """The checks of one run."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def to_text(self) -> str:
        """The table for people: one line per check."""
        lines = [("check", "given", "allowed", "", "allowed by")]
        lines += [
            (row.name, digits(row.given), digits(row.allowed), "ok" if row.passed else "FAILED", row.origin)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        padded = [[cell.ljust(n) for cell, n in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in padded)

    def raise_if_failed(self) -> None:
        """
        Raises:
            ChecksFailed: a check does not hold; the message is the table.
        """
        if not self.passed:
            failed = sum(not row.passed for row in self.rows)
            raise ChecksFailed(f"{failed} of {len(self.rows)} checks failed\n{self.to_text()}")


def run_checks(
    checks: Checks, flops: FlopsReport, quality: QualityReport, baseline: QualityReport | None = None
) -> CheckTable:
    """Compares reports with the limits of a recipe and, if given, with an earlier evaluation.

    Against a baseline, the FID increase over the dense model and the KL may be worse by NOISE_FACTOR standard errors of
    the difference, sqrt(e^2 + e_baseline^2). The errors are those in the two reports: for FID the larger of the spread
    over seed sets and the jackknife within them (the only one with a single seed set), for KL the spread over pyramids.
    Equal seeds make the two runs less different than that: the bound is on the safe side of a false alarm.

    Args:
        checks: limits; a ratio of transformer FLOPs sparse to dense, nats per token, a fraction of the dense FID, a
            mean pixel distance.
        flops: FLOPs of the model; with a sparse part if its ratio is limited.
        quality: evaluation of the model.
        baseline: earlier evaluation, with equal images, sampling, extractor and reference.

    Raises:
        InputError: the baseline was measured otherwise, or a limit needs what a report does not hold.
    """
    rows = []

    def limit(name: str, allowed: float | None, value: Callable[[], float]) -> None:
        if allowed is not None:
            rows.append(CheckRow(name=name, given=value(), allowed=allowed, origin=f"checks.max_{name}"))

    limit("flops_ratio", checks.max_flops_ratio, lambda: _flops_ratio(flops))
    limit("kl", checks.max_kl, lambda: quality.kl.mean)
    limit("fid_increase", checks.max_fid_increase, lambda: _fid_increase(quality))
    limit("distance", checks.max_distance, lambda: _distance(quality))
    if baseline is not None:
        _comparable(quality, baseline)
        if quality.fid is not None and baseline.fid is not None:
            noise = NOISE_FACTOR * (quality.fid.noise**2 + baseline.fid.noise**2) ** 0.5
            rows.append(_against(baseline.fid.increase, noise, "fid_increase", quality.fid.increase))
        noise = NOISE_FACTOR * (quality.kl.standard_error**2 + baseline.kl.standard_error**2) ** 0.5
        rows.append(_against(baseline.kl.mean, noise, "kl", quality.kl.mean))
    return CheckTable(rows=tuple(rows))


def _against(before: float, noise: float, name: str, given: float) -> CheckRow:
    return CheckRow(name=name, given=given, allowed=before + noise, origin=f"baseline {before:.4f} + noise {noise:.4f}")


def _flops_ratio(flops: FlopsReport) -> float:
    if flops.sparse is None:
        raise InputError("checks.max_flops_ratio needs a sparse model; this FLOPs report is of a dense one")
    return flops.sparse.transformer.flops / flops.dense.transformer.flops


def _fid_increase(quality: QualityReport) -> float:
    if quality.fid is None:
        raise InputError(
            "checks.max_fid_increase needs a FID, and no images were measured; name real ones with evaluate.reference"
        )
    return quality.fid.increase


def _distance(quality: QualityReport) -> float:
    if quality.distances is None:
        raise InputError("checks.max_distance needs pictures of both models, and none were compared; evaluate anew")
    return quality.distances.pixel.mean


def require_comparable(baseline: QualityReport, measurement: Mapping[str, object]) -> None:
    """Checks that a baseline was measured as something else is, or will be.

    Args:
        baseline: the earlier evaluation.
        measurement: the fields of MEASURED_BY, as in a QualityReport.

    Raises:
        InputError: it was not, all differences at once.
    """
    _refuse([_difference(name, getattr(baseline, name), measurement[name]) for name in MEASURED_BY])


def _comparable(quality: QualityReport, baseline: QualityReport) -> None:
    require_comparable(baseline, {name: getattr(quality, name) for name in MEASURED_BY})
    _refuse([_difference("scales", len(baseline.kl.per_scale), len(quality.kl.per_scale))])


def _difference(name: str, before: object, now: object) -> str | None:
    return None if before == now else f"{name}: {before} in the baseline, {now} now"


def _refuse(differences: Sequence[str | None]) -> None:
    problems = [line for line in differences if line is not None]
    if problems:
        raise InputError(
            "checks.baseline was measured otherwise; evaluate as it was, or store a new baseline", problems
        )
