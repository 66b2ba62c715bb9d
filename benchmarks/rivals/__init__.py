"""What the conversion is compared with on the same teacher: one file per rival, all of one shape (``method.Method``).

Every rival is a simple implementation of a published idea, written for this comparison: it generates through
``Model.generate``, runs under teacher forcing, is trained by the project's own loop, and is priced by the rules of
``actvar_convert.cost.macs``. Each file states what it counts beyond them.
"""

from __future__ import annotations

from rivals.control import Control
from rivals.converted import CONVERSIONS
from rivals.early_exit import EarlyExit
from rivals.method import Method
from rivals.small_model import SmallModel
from rivals.token_merging import TokenMerging
from rivals.token_skipping import TokenSkipping

METHODS: dict[str, Method] = {
    method.name: method
    for method in (*CONVERSIONS, TokenSkipping(), TokenMerging(), EarlyExit(), SmallModel(), Control())
}
"""Ours first, then the rivals, then the control."""
