"""Names of dtypes, without torch: recipes are read without it."""

from __future__ import annotations

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def short_dtype(given: object) -> object:
    """The short name of a dtype that is given as torch has it or calls it (bfloat16: bf16); all else as it is."""
    return _SHORT.get(str(given).removeprefix("torch."), given)
