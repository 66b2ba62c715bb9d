"""actvar-convert: turns a trained dense VAR image generator into a sparse one that does less work per image.

import actvar_convert as av

dense = av.load("fashion")
sparse = av.convert(dense, recipe="fashion")
images = sparse.generate([0, 1, 2], seed=0)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from actvar_convert._version import __version__

if TYPE_CHECKING:
    from actvar_convert.measure.cuts import SweepReport
    from actvar_convert.measure.evaluation import Evaluation
    from actvar_convert.measure.latency import Timing
    from actvar_convert.models.infinity.text import TextRows
    from actvar_convert.preflight import ValidationResult, validate_recipe
    from actvar_convert.recipe.shape import Shape
    from actvar_convert.runs import RunResult, run
    from actvar_convert.sweeps import sweep
    from actvar_convert.verbs import (
        benchmark,
        convert,
        distill,
        evaluate,
        export,
        inspect,
        load,
        report_flops,
        sample,
    )

_VERBS = {
    **dict.fromkeys(
        ("load", "convert", "distill", "evaluate", "benchmark", "report_flops", "inspect", "sample", "export"),
        "actvar_convert.verbs",
    ),
    "Evaluation": "actvar_convert.measure.evaluation",
    "RunResult": "actvar_convert.runs",
    "run": "actvar_convert.runs",
    "Shape": "actvar_convert.recipe.shape",
    "SweepReport": "actvar_convert.measure.cuts",
    "sweep": "actvar_convert.sweeps",
    "TextRows": "actvar_convert.models.infinity.text",
    "Timing": "actvar_convert.measure.latency",
    "ValidationResult": "actvar_convert.preflight",
    "validate_recipe": "actvar_convert.preflight",
}

__all__ = [
    "Evaluation",
    "RunResult",
    "Shape",
    "SweepReport",
    "TextRows",
    "Timing",
    "ValidationResult",
    "__version__",
    "benchmark",
    "convert",
    "distill",
    "evaluate",
    "export",
    "inspect",
    "load",
    "report_flops",
    "run",
    "sample",
    "sweep",
    "validate_recipe",
]


def __getattr__(name: str) -> Any:
    """A verb, imported when it is first used: importing torch takes seconds, and the command's help does without."""
    if name not in _VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_VERBS[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
