"""The condition of Infinity: a prompt an image, as the rows that a text encoder makes of it.

Shapes: B prompts, N rows of all prompts together, Ct channels of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actvar_convert.errors import InputError, counted, explain_os_errors
from actvar_convert.system.atomic import replacing


class TextRows:
    """Text rows of prompts, end to end: the last hidden states of a text encoder without those of padding.

    Args:
        values: [N, Ct] rows, floating point, the prompts one after the other.
        lengths: [B] rows of every prompt, at least 1 each; together N.

    Attributes:
        silent: of every prompt whether it says nothing: its rows are those that the model has learnt for no prompt.
        negative: prompts that take the place of no prompt in guidance; None: there are none.

    Raises:
        InputError: values and lengths that do not belong together, or values that are not finite.
    """

    def __init__(self, values: Tensor, lengths: Sequence[int] | Tensor) -> None:
        counts = torch.as_tensor(lengths) if len(lengths) else torch.zeros(0, dtype=torch.int64)
        if values.ndim != 2 or not values.is_floating_point():
            raise InputError(
                f"text rows are [rows, channels] of floating-point numbers, got {list(values.shape)} of {values.dtype}"
            )
        if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
            raise InputError(f"lengths must be whole numbers, one for each prompt, got {lengths}")
        self.values, self.lengths = values, tuple(map(int, counts.tolist()))
        if any(length < 1 for length in self.lengths):
            raise InputError(f"a prompt has at least one text row; lengths are {list(self.lengths)}")
        if sum(self.lengths) != len(values):
            raise InputError(
                f"lengths add up to {sum(self.lengths)} text rows, and there are {len(values)}; give the prompts "
                "end to end, without padding"
            )
        if not values.is_meta and not bool(torch.isfinite(values).all()):
            raise InputError("text rows have NaN or infinite values")
        self.silent = (False,) * len(self.lengths)
        self.negative: TextRows | None = None

    @classmethod
    def load(cls, path: str | Path) -> TextRows:
        """Text rows of a safetensors file with ``values`` [N, Ct] and ``lengths`` [B].

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        with explain_os_errors("read", Path(path)), open(path, "rb"):
            pass
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                if not {"values", "lengths"} <= names:
                    raise InputError(
                        f"{path} holds no text rows: they are tensors values [rows, channels] and lengths [prompts], "
                        f"and it has {', '.join(sorted(names)[:6]) or 'none'}"
                    )
                values, lengths = file.get_tensor("values"), file.get_tensor("lengths")
        except SafetensorError as error:
            raise InputError(f"{path} is no safetensors file of text rows ({error})") from error
        try:
            return cls(values, lengths)
        except InputError as error:
            raise InputError(f"{path}: {error.message}") from error

    def save(self, path: str | Path) -> None:
        """Writes what ``load`` reads; an existing file is replaced.

        Raises:
            InputError: prompts that say nothing have no rows to write, or the file cannot be written.
        """
        if any(self.silent):
            raise InputError("prompts that say nothing have no text rows to save")
        target = Path(path)
        with explain_os_errors("write", target), replacing(target) as temporary:
            save_file({"values": self.values.cpu().contiguous(), "lengths": torch.tensor(self.lengths)}, temporary)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def shape(self) -> tuple[int, tuple[int, ...], tuple[bool, ...]]:
        """What a recording of CUDA graphs is made for."""
        return (self.values.shape[1], self.lengths, self.silent)

    @property
    def fingerprint(self) -> str:
        """Identifies the prompts by their content."""
        content = self.values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr((self.lengths, self.silent)).encode() + content).hexdigest()

    def _of(self, values: Tensor, lengths: Sequence[int], silent: Sequence[bool]) -> Self:
        """Such rows, without another look at them."""
        made = object.__new__(type(self))
        made.values, made.lengths, made.silent, made.negative = values, tuple(lengths), tuple(silent), None
        return made

    def prompts(self) -> tuple[Tensor, ...]:
        """The rows [length, Ct] of every prompt."""
        return torch.split(self.values, list(self.lengths))

    def against(self, negative: TextRows) -> Self:
        """The same prompts with others in place of no prompt in guidance: one for all, or one for each.

        Raises:
            InputError: neither one nor as many.
        """
        if len(negative) not in (1, len(self)):
            raise InputError(
                f"{counted(len(negative), 'negative prompt')} for {counted(len(self), 'prompt')}; give one, or one each"
            )
        made = self._of(self.values, self.lengths, self.silent)
        made.negative = negative.rows(torch.zeros(len(self), dtype=torch.int64)) if len(negative) == 1 else negative
        return made

    def rows(self, index: slice | Tensor) -> Self:
        """Some of the prompts."""
        chosen = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        parts = self.prompts()
        values = torch.cat([parts[i] for i in chosen]) if len(chosen) else self.values[:0]
        made = self._of(values, [self.lengths[i] for i in chosen], [self.silent[i] for i in chosen])
        made.negative = None if self.negative is None else self.negative.rows(index)
        return made

    def null(self) -> Self:
        """The negative prompts; without them as many that say nothing, each as long as the prompt."""
        if self.negative is not None:
            return self._of(self.negative.values, self.negative.lengths, self.negative.silent)
        return self._of(self.values, self.lengths, (True,) * len(self))

    def dropped(self, where_B: Tensor) -> Self:
        """A copy in which the prompts at True, boolean [B], say nothing."""
        silent = [own or bool(also) for own, also in zip(self.silent, where_B.tolist(), strict=True)]
        made = self._of(self.values, self.lengths, silent)
        made.negative = self.negative
        return made

    def partly_null(self, every: int) -> Self:
        """A copy in which one of ``every`` prompts says nothing."""
        return self.dropped(torch.arange(len(self)) % every == 0)

    def joined(self, other: Self) -> Self:
        """These prompts, then those of another."""
        values = torch.cat((self.values, other.values.to(self.values)))
        return self._of(values, self.lengths + other.lengths, self.silent + other.silent)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        made = self._of(self.values.to(device), self.lengths, self.silent)
        made.negative = None if self.negative is None else self.negative.to(device)
        return made

    def copy_(self, other: Self) -> None:
        """Takes the values of as many prompts of the same lengths, in place."""
        self.values.copy_(other.values)
        if self.negative is not None and other.negative is not None:
            self.negative.values.copy_(other.negative.values)
