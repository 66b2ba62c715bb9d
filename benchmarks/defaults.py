"""What the settings of a recipe are worth: each changed on its own, KL to the teacher.

    python benchmarks/defaults.py --out runs/defaults

Three bases on the bundled model, at the cut of the recipe ``fashion``. Two show a conversion before any training: the
recipe's own plan (``static``), and one that routes half of the active experts (``routed``). The third, ``trained``, is
the first one after a short training, for the settings of the distillation. Held-out pyramids are the same in every row.
The table goes to stdout, ``defaults.json`` to --out after every row; a row that is there is not computed again, and a
training that was stopped goes on.

``--recipe`` takes another recipe and its model, ``--changes`` rows of your own:

    python benchmarks/defaults.py --out runs/mosaics --recipe mosaics --bases trained \\
        --changes "distill.stage2.optimizer=adamw + distill.stage2.learning_rate=0.0003"

About a minute and a half a row of ``fashion`` on one core, four minutes with training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rivals import METHODS
from rivals.method import saved
from rivals.training import Workshop

import actvar_convert as av
from actvar_convert.cost import macs as costs
from actvar_convert.errors import ActvarError
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.measure.latency import hardware_name
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.device import limit_threads
from actvar_convert.system.progress import Progress, SilentProgress

CODE = "2"
"""Version of what a row shows; raised by hand when a change of the code changes results."""

BASES: dict[str, tuple[str, ...]] = {
    "static": (),
    "routed": ("budget.prefix_share=0.5",),
    "trained": ("distill.stage1.steps=10", "distill.stage2.steps=60", "distill.stage2.warmup=10"),
}

CHANGES: dict[str, tuple[str, ...]] = {
    "routed": (
        "experts.clustering=gradient",
        "experts.count=8",
        "experts.count=32",
        "experts.compensation=sequential",
        "calibration.pyramids=64",
        "calibration.pyramids=512",
    ),
    "static": (
        "experts.count=32",
        "experts.compensation=sequential",
        "budget.pyramids=32",
        "budget.gate_keep=1.0",
        "budget.gate_keep=0.5",
        "budget.gate_keep=0.1",
        "budget.gate_scales=1",
        "budget.gate_scales=3",
        "gate.rank=4",
        "gate.rank=64",
    ),
    "trained": (
        "budget.gate_keep=1.0",
        "distill.stage1.steps=0",
        "distill.stage2.optimizer=adamw",
        "distill.stage2.learning_rate=0.0003",
        "distill.stage2.learning_rate=0.002",
        "distill.stage2.trainable=experts",
        "distill.stage2.trainable=lora",
        "distill.stage2.trainable=none",
        "distill.stage2.gate=frozen",
        "data.null_share=0.0",
        "experts.compensation=sequential",
    ),
}
"""One setting each, of those that act on a base. The learning rates are those beside the recipe's."""

HEADER = ("base", "changed", "cut %", "KL", "+-", "top-1", "against base %")
QUICK = (
    *("calibration.pyramids=16", "calibration.batch=16", "budget.pyramids=16", "evaluate.held_out=16"),
    *("data.pyramids=16", "distill.stage1.batch=4", "distill.stage2.batch=4"),
)


@dataclass(frozen=True)
class Row:
    """One conversion; KL in nats per token, fractions as fractions.

    Attributes:
        key: identifies the teacher, the settings and the code.
        change: the setting that differs from the base; empty for the base itself.
        seconds: all of it, less what earlier rows had made already.
    """

    key: str
    base: str
    change: str
    cut: float
    kl: float
    kl_error: float
    top1: float
    seconds: float

    def cells(self, base: Row | None) -> list[str]:
        against = f"{100 * (self.kl / base.kl - 1):+.1f}" if base is not None and self.change else "-"
        figures = (f"{100 * self.cut:.1f}", f"{self.kl:.4f}", f"{self.kl_error:.4f}", f"{self.top1:.3f}", against)
        return [self.base, self.change or "-", *figures]


def settings_of(change: str) -> list[str]:
    """The settings of a change; those that only make sense together are written with a plus between them."""
    return change.split(" + ") if change else []


class Defaults:
    """The rows of one teacher, kept in one folder."""

    def __init__(self, teacher: Model, recipe: Recipe, folder: Path, progress: Progress | None = None) -> None:
        self.teacher, self.recipe, self.folder = teacher, recipe, folder
        self.progress = progress or SilentProgress()
        self.path = folder / "defaults.json"
        self._print = state_fingerprint(teacher)
        self._workshop = Workshop(teacher, folder, self.progress)
        stored = json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []
        self._rows = {row["key"]: Row(**row) for row in stored}

    def row(self, base: str, change: str) -> Row:
        """The row, measured unless it was before."""
        config = self.teacher.config
        chosen = load_recipe(self.recipe, [*BASES[base], *settings_of(change)], config=config)
        key = fingerprint_of(CODE, self._print, chosen.model_dump_json())
        if key not in self._rows:
            self._rows[key] = self._measured(key, base, change, chosen)
            self._write()
        return self._rows[key]

    def _measured(self, key: str, base: str, change: str, recipe: Recipe) -> Row:
        begin = time.perf_counter()
        model = self._trained(recipe) if base == "trained" else self._converted(recipe)
        found = av.evaluate(
            model,
            teacher=self.teacher,
            settings=av.Evaluation(images=0, held_out=recipe.evaluate.held_out),
            cache=self.folder / "evaluation",
            progress=self.progress,
        )
        config = self.teacher.config
        return Row(
            key=key,
            base=base,
            change=change,
            cut=saved(config, costs.transformer_macs(config, model.plan)),
            kl=found.kl.mean,
            kl_error=found.kl.standard_error,
            top1=found.agreement.top1,
            seconds=time.perf_counter() - begin,
        )

    def _converted(self, recipe: Recipe) -> Model:
        work = self.folder / "work"
        work.mkdir(parents=True, exist_ok=True)
        return av.convert(self.teacher, recipe=recipe, work=work, progress=self.progress)

    def _trained(self, recipe: Recipe) -> Model:
        """After both stages; conversions that rows share are made once."""
        method, cut = METHODS["ours"], recipe.budget.reduction
        chosen = method.recipe(recipe, cut, self.teacher.config)
        return self._workshop.make(method, chosen, cut, "full").student

    def _write(self) -> None:
        content = {
            "schema": "actvar.defaults/1",
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware_name(self.teacher.device),
            "torch": torch.__version__,
            "teacher": self._print,
            "recipe": self.recipe.model_dump(mode="json"),
            "rows": [asdict(row) for row in self._rows.values()],
        }
        write_whole(self.path, json.dumps(content, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    bases = {row.base: row for row in rows if not row.change}
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells(bases.get(row.base)) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


class Given(argparse.Namespace):
    """The command line."""

    out: Path
    recipe: str
    bases: list[str]
    changes: list[str] | None
    settings: list[str]
    quick: bool


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/defaults"), help="folder of everything (runs/defaults)")
    made.add_argument("--recipe", default="fashion", help="name or file of the recipe that is changed (fashion)")
    made.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES), help="these bases alone")
    made.add_argument("--changes", nargs="*", metavar="A.B=VALUE",
                        help="rows of every base, in place of the ones that it has here; "
                        "'A=1 + B=2' changes two settings")  # fmt: skip
    made.add_argument("--set", dest="settings", action="append", default=[], metavar="A.B=VALUE",
                        help="any setting of the recipe, in every row")  # fmt: skip
    made.add_argument("--quick", action="store_true", help="a tiny size that proves the command")
    return made


def run(given: Given) -> None:
    """Measures and shows what the command line asks for.

    Raises:
        ActvarError: a recipe or a setting that is none, before any row is measured.
    """
    limit_threads()
    recipe = load_recipe(given.recipe, [*(QUICK if given.quick else ()), *given.settings])
    changes = {base: ["", *(CHANGES[base] if given.changes is None else given.changes)] for base in given.bases}
    for base, own in changes.items():
        for change in own:
            load_recipe(recipe, [*BASES[base], *settings_of(change)])
    defaults = Defaults(av.load(recipe.model, device="cpu"), recipe, given.out)
    print(f"{hardware_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    rows = []
    for base, own in changes.items():
        for change in own:
            rows.append(defaults.row(base, change))
            print(f"{base} {change or 'itself'}: KL {rows[-1].kl:.4f}, {rows[-1].seconds:.0f} s", flush=True)
    print("\n" + table(rows))


def main() -> None:
    try:
        run(parser().parse_args(namespace=Given()))
    except ActvarError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
