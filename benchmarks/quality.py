"""Quality per FLOP: our conversion and its rivals on the bundled teacher, one row per method, training and FLOPs cut.

    python benchmarks/quality.py --out runs/quality --cuts 0.2 0.3 0.4 0.5 --seeds 0 1 2

Every row states the share of the transformer's FLOPs that is saved (with guidance), the KL to the teacher under teacher
forcing (nats per token), and the FID of both models over the same labels and random numbers, with the relative
difference and its standard error. Rows, weights, unfinished trainings and features of images are kept under --out: a
row that is finished is not computed again, a stopped command goes on where it was, and the same folder may be filled in
parts (--methods, --levels, --cuts); --with FILE shows the rows of another quality.json beside them. The table goes to
stdout; quality.json and quality.png to --out, after every row.

The whole takes hours on two cores. --quick proves the command on a size whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from rivals import METHODS
from rivals.method import CODE, Level, Method, OutOfReach, saved
from rivals.small_model import SmallModel
from rivals.training import LEVELS, Workshop

import actvar_convert as av
from actvar_convert.errors import ActvarError, InputError
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.measure.evaluation import Evaluation, evaluate_models
from actvar_convert.measure.extractors import FeatureExtractor
from actvar_convert.measure.latency import hardware_name
from actvar_convert.models.model import Model
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.progress import Progress, TerminalProgress
from actvar_convert.verbs import extractor_for

QUICK = (
    *("calibration.pyramids=16", "calibration.batch=16", "data.pyramids=16", "data.batch=16"),
    *("distill.stage1.steps=1", "distill.stage2.steps=2", "distill.stage1.batch=4", "distill.stage2.batch=4"),
    *("evaluate.images=20", "evaluate.batch=20", "evaluate.held_out=10"),
)
QUICK_CUT = 0.2
SCHEMA = "actvar.frontier/1"
COLUMNS = (
    *("method", "training", "steps", "asked %", "cut %", "KL", "FID dense", "FID", "increase %", "± %", "labels"),
    "sets",
)
TRAINING: dict[Level, str] = {"none": "none", "stage1": "stage 1", "full": "full"}


class Wanted(NamedTuple):
    """One row before it is measured."""

    method: Method
    level: Level
    cut: float


@dataclass(frozen=True)
class Row:
    """One measured row; fractions are fractions, KL in nats per token.

    Attributes:
        key: identifies all that the row depends on.
        steps: optimiser steps of stage 1 and of stage 2.
        asked, cut: share of the transformer's FLOPs that was to be saved, and that is.
        increase: mean over seed sets of (FID - dense FID) / dense FID. standard_error: of it, from its spread over seed
            sets, None with one. jackknife_error: of it, from leaving out groups of images.
        label_agreement: share of the images that are classified as their label; None where labels are not known.
    """

    key: str
    method: str
    level: Level
    steps: tuple[int, int]
    asked: float
    cut: float
    macs: int
    kl: float
    kl_error: float
    fid_dense: float
    fid: float
    increase: float
    standard_error: float | None
    jackknife_error: float
    label_agreement: float | None
    images: int
    seeds: tuple[int, ...]
    dtype: str

    @property
    def error(self) -> float:
        """The larger of the two standard errors of ``increase``: few seed sets estimate their spread poorly."""
        return max(self.standard_error or 0.0, self.jackknife_error)

    @property
    def cells(self) -> list[str]:
        return [
            self.method,
            TRAINING[self.level],
            "+".join(map(str, self.steps)) if self.level != "none" else "-",
            f"{100 * self.asked:.1f}",
            f"{100 * self.cut:.1f}",
            f"{self.kl:.4f}",
            f"{self.fid_dense:.4f}",
            f"{self.fid:.4f}",
            f"{100 * self.increase:+.2f}",
            f"{100 * self.error:.2f}",
            "-" if self.label_agreement is None else f"{self.label_agreement:.3f}",
            str(len(self.seeds)),
        ]


def row_from(data: object) -> Row | None:
    """The row that was written as JSON; None where it is not one of this version."""
    if not isinstance(data, dict) or set(data) != {field.name for field in fields(Row)}:
        return None
    return Row(**{**data, "steps": tuple(data["steps"]), "seeds": tuple(data["seeds"])})


def earlier_rows(path: Path, teacher: str) -> list[Row]:
    """The rows of another quality.json.

    Args:
        teacher: fingerprint of the teacher that they must be of.

    Raises:
        InputError: the file is not there, is no quality.json of this version, or is of another teacher.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--with {path}: cannot be read as JSON ({error})") from error
    rows = data.get("rows") if isinstance(data, dict) and data.get("schema") == SCHEMA else None
    found = [row_from(row) for row in rows] if isinstance(rows, list) else [None]
    known = [row for row in found if row is not None and row.method in METHODS]
    if len(known) < len(found):
        raise InputError(f"--with {path}: is no quality.json that this version of quality.py writes")
    if data.get("teacher") != teacher:
        raise InputError(f"--with {path}: its rows are of another teacher, and cannot stand in one table with these")
    return known


def merged(rows: Sequence[Row], earlier: Sequence[Row]) -> list[Row]:
    """All rows in the order of a table; of those of one method, training and cut the last of ``rows``, or else of
    ``earlier``."""
    newest = {(row.method, row.level, row.steps, row.asked): row for row in (*earlier, *rows)}
    names = list(METHODS)
    return sorted(newest.values(), key=lambda row: (names.index(row.method), LEVELS.index(row.level), row.asked))


class Frontier:
    """The comparison on one teacher, kept in one folder.

    Args:
        teacher: the dense model.
        recipe: settings of method, training and evaluation; what a method changes of them is the method's affair.
        folder: where rows and everything behind them are kept.
        extractor: measures the images.
        progress: told about every long step.
    """

    def __init__(
        self, teacher: Model, recipe: Recipe, folder: Path, extractor: FeatureExtractor, progress: Progress
    ) -> None:
        self.teacher, self.recipe, self.folder, self.extractor = teacher, recipe, folder, extractor
        self.progress = progress
        self.workshop = Workshop(teacher, folder, progress)

    def own_recipe(self, wanted: Wanted) -> Recipe:
        """The recipe that a row is made with."""
        return wanted.method.recipe(self.recipe, wanted.cut, self.teacher.config)

    def key(self, wanted: Wanted) -> str:
        """What identifies a row: code, teacher, method, cut, training and evaluation."""
        weights = self.workshop.keys(wanted.method, self.own_recipe(wanted), wanted.cut)[wanted.level]
        evaluation = self.recipe.evaluate.model_dump_json()
        sampling = json.dumps(self.teacher.sampling.settings)
        return fingerprint_of(CODE, weights, evaluation, sampling, self.extractor.fingerprint, str(self.teacher.device))

    def finished(self, wanted: Wanted) -> Row | None:
        """The row, if it was measured before."""
        path = self._path(self.key(wanted))
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return row_from(data)

    def row(self, wanted: Wanted) -> Row:
        """The row, measured unless it was before.

        Raises:
            OutOfReach: the method cannot save so much.
            Interrupted, KeyboardInterrupt: stopped; the same call goes on.
        """
        known = self.finished(wanted)
        if known is not None:
            return known
        method, level, cut = wanted
        recipe, settings = self.own_recipe(wanted), self.recipe.evaluate
        built = self.workshop.make(method, recipe, cut, level)
        found = evaluate_models(
            built.model,
            self.teacher,
            Evaluation(
                images=settings.images,
                seeds=settings.seeds,
                batch=settings.batch,
                held_out=settings.held_out,
                dtype=self.recipe.dtype,
            ),
            extractor=self.extractor,
            progress=self.progress,
            cache_dir=self.folder / "evaluation",
        )
        stages = recipe.distill
        steps = {"none": (0, 0), "stage1": (stages.stage1.steps, 0), "full": (stages.stage1.steps, stages.stage2.steps)}
        assert found.fid is not None, "an extractor was given"
        row = Row(
            key=self.key(wanted),
            method=method.name,
            level=level,
            steps=steps[level],
            asked=cut,
            cut=saved(self.teacher.config, built.macs),
            macs=built.macs,
            kl=found.kl.mean,
            kl_error=found.kl.standard_error,
            fid_dense=found.fid.dense,
            fid=found.fid.sparse,
            increase=found.fid.increase,
            standard_error=found.fid.standard_error,
            jackknife_error=found.fid.jackknife_error,
            label_agreement=found.label_agreement.sparse if found.label_agreement else None,
            images=found.images,
            seeds=found.seeds,
            dtype=found.dtype,
        )
        write_whole(self._path(row.key), json.dumps(asdict(row), indent=2) + "\n")
        return row

    def write(self, rows: Sequence[Row]) -> None:
        """quality.json and quality.png."""
        content = {
            "schema": SCHEMA,
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware_name(self.teacher.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "code": CODE,
            "teacher": self.workshop.teacher_print,
            "recipe": self.recipe.model_dump(mode="json"),
            "methods": {row.method: METHODS[row.method].idea for row in rows},
            "rows": [asdict(row) for row in rows],
        }
        write_whole(self.folder / "quality.json", json.dumps(content, indent=2) + "\n")
        write_whole(self.folder / "quality.png", drawn(rows))

    def _path(self, key: str) -> Path:
        return self.folder / "rows" / f"{key[:32]}.json"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.cells for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def drawn(rows: Sequence[Row]) -> bytes:
    """A PNG of two panels: FID increase with its standard error, and KL, against the FLOPs cut.

    A colour and a mark per method; rows without training are dotted, those of stage 1 alone dashed.
    """
    from matplotlib.figure import Figure  # takes a second to import, and a stopped command may never need it

    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row.method for row in rows))
    styles: dict[Level, str] = {"none": ":", "stage1": "--", "full": "-"}
    for number, name in enumerate(names):
        for level in LEVELS:
            own = sorted((row for row in rows if (row.method, row.level) == (name, level)), key=lambda row: row.cut)
            if not own:
                continue
            cuts = [100 * row.cut for row in own]
            colour, mark, style = f"C{number % 10}", "osD^vPX<>"[number % 9], styles[level]
            increase, error = [100 * row.increase for row in own], [100 * row.error for row in own]
            label = f"{name}, {TRAINING[level]}"
            left.errorbar(cuts, increase, error, capsize=3, color=colour, marker=mark, linestyle=style, label=label)
            right.plot(cuts, [row.kl for row in own], color=colour, marker=mark, linestyle=style)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set_ylabel("FID increase, %")
    left.set_yscale("symlog", linthresh=5)
    right.set(ylabel="KL to the teacher, nats per token", yscale="log")
    for panel in (left, right):
        panel.margins(0.08)
        panel.set_xlabel("transformer FLOPs saved, %")
        panel.grid(alpha=0.3)
    if names:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, title="method, training")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "actvar-convert"})
    return buffer.getvalue()


def wanted_rows(names: Sequence[str], levels: Sequence[Level], cuts: Sequence[float]) -> list[Wanted]:
    """All rows of the methods, those of a method together; a method that saves nothing has one cut."""
    rows = []
    for name in names:
        method = METHODS[name]
        own = list(cuts) if method.fixed_cut is None else [method.fixed_cut]
        shown = [level for level in LEVELS if level in levels and level in method.levels]
        rows += [Wanted(method, level, cut) for level in shown for cut in own]
    return rows


class Given(argparse.Namespace):
    """The command line."""

    methods: list[str]
    levels: list[Level]
    cuts: list[float] | None
    steps: list[int] | None
    small_steps: int | None
    images: int | None
    seeds: list[int] | None
    held_out: int | None
    dtype: str | None
    device: str | None
    settings: list[str]
    quick: bool
    show: bool
    earlier: list[Path]
    out: Path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder of everything (runs/quality)")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME",
                      help=f"rows of these alone: {', '.join(METHODS)}")  # fmt: skip
    made.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="rows of these trainings alone")
    made.add_argument("--cuts", nargs="+", type=float, metavar="SHARE",
                      help="shares of the transformer's FLOPs to save, 0 to 1 (0.2 0.3 0.4 0.5)")  # fmt: skip
    made.add_argument("--steps", nargs=2, type=int, metavar=("STAGE1", "STAGE2"),
                      help="optimiser steps of both stages (the recipe's)")  # fmt: skip
    made.add_argument("--small-steps", type=int, help="steps of small-model alone (as many as all others have)")
    made.add_argument("--images", type=int, help="images per seed set and model (10000)")
    made.add_argument("--seeds", nargs="+", type=int, help="seed sets (0 1)")
    made.add_argument("--held-out", type=int, help="pyramids that KL is measured on (512)")
    made.add_argument("--dtype", choices=["fp32", "bf16"],
                      help="dtype of training and of generation (the recipe's: bf16)")  # fmt: skip
    made.add_argument("--device", help="cpu, cuda, cuda:N (the GPU where there is one)")
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=VALUE",
                      help="any other setting of the recipe fashion")  # fmt: skip
    made.add_argument("--quick", action="store_true", help="a tiny size that proves the command; options still count")
    made.add_argument("--show", action="store_true", help="compute nothing, show the rows that are finished")
    made.add_argument("--with", dest="earlier", nargs="+", type=Path, default=[], metavar="FILE",
                      help="quality.json of other runs, whose rows are shown where this one has none")  # fmt: skip
    return made


def recipe_of(given: Given) -> Recipe:
    """The recipe ``fashion`` with the sizes of the comparison and what the command line says."""
    changes = ["evaluate.images=10000", "evaluate.seeds=[0, 1]", *(QUICK if given.quick else ())]
    if given.quick:
        changes.append("evaluate.seeds=[0]")
    if given.steps is not None:
        changes += [f"distill.stage{index + 1}.steps={steps}" for index, steps in enumerate(given.steps)]
    if given.dtype is not None:
        changes.append(f"dtype={given.dtype}")
    for name, value in (("images", given.images), ("seeds", given.seeds), ("held_out", given.held_out)):
        if value is not None:
            changes.append(f"evaluate.{name}={value}")
    return load_recipe("fashion", [*changes, *given.settings])


def run(given: Given) -> None:
    """Measures and shows what the command line asks for.

    Raises:
        ActvarError: what cannot be done, before any work; or the run was stopped.
    """
    cuts = given.cuts or ([QUICK_CUT] if given.quick else [0.2, 0.3, 0.4, 0.5])
    if wrong := [cut for cut in cuts if not 0 < cut < 1]:
        raise InputError(f"--cuts: {wrong} given, shares between 0 and 1 are possible")
    if given.small_steps is not None:
        METHODS[SmallModel.name] = SmallModel(given.small_steps)
    recipe = recipe_of(given)
    teacher = av.load(recipe.model, device=given.device or recipe.device)
    progress = TerminalProgress()
    frontier = Frontier(teacher, recipe, given.out, extractor_for(teacher, recipe.evaluate.reference), progress)
    earlier = [row for path in given.earlier for row in earlier_rows(path, frontier.workshop.teacher_print)]
    rows: list[Row] = []
    wanted = wanted_rows(given.methods, given.levels, cuts)
    for number, each in enumerate(wanted, start=1):
        if given.show:
            known = frontier.finished(each)
            rows += [] if known is None else [known]
            continue
        progress.say(f"row {number} of {len(wanted)}: {each.method.name}, {TRAINING[each.level]}, cut {each.cut:g}")
        try:
            rows.append(frontier.row(each))
        except OutOfReach as error:
            progress.say(f"left out: {error}")
            continue
        frontier.write(merged(rows, earlier))
    rows = merged(rows, earlier)
    if given.show and rows:
        frontier.write(rows)
    print(f"{hardware_name(teacher.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(rows))


def main() -> None:
    given = parser().parse_args(namespace=Given())
    try:
        run(given)
    except ActvarError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
