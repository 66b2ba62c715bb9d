"""What files of weights hold: names and shapes at once, values when they are asked for, all of one moment.

Values are read by ordinary reads into memory of their own. A file that another program overwrites meanwhile can so
neither end the process nor change a model that is loaded: whatever was read of it is refused, see ``Changed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError, explain_os_errors

T = TypeVar("T")


class Changed(CheckpointError):
    """A file was written to, replaced or removed while it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} was changed while it was read: another program writes it. Wait until that is done, or give a copy."
        )


class Stamp(NamedTuple):
    """What tells one state of a file from the next."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def stamp_of(path: Path) -> Stamp:
    """The present state of a file.

    Raises:
        InputError: no such file, or no permission.
    """
    with explain_os_errors("read", path):
        about = path.stat()
    return Stamp(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


def _is_as(path: Path, stamp: Stamp) -> bool:
    try:
        return stamp_of(path) == stamp
    except InputError:
        return False


@contextmanager
def unchanged(path: Path) -> Iterator[Stamp]:
    """Inside, a file is read; afterwards it has to be what it was, else nothing that was found in it counts.

    Raises:
        InputError: no such file, or no permission.
        Changed: it was written to meanwhile, whatever seemed to be wrong with it then.
    """
    before = stamp_of(path)
    try:
        yield before
    except InputError as error:
        if _is_as(path, before):
            raise
        raise Changed(path) from error
    if not _is_as(path, before):
        raise Changed(path)


def steadily(read: Callable[[], T]) -> T:
    """What a function reads; once more if a file was changed meanwhile.

    Raises:
        Changed: the second time too.
    """
    try:
        return read()
    except Changed:
        return read()


class _Place(NamedTuple):
    """Where the values of a tensor begin."""

    path: Path
    offset: int


class Contents:
    """The tensors of one or several files.

    Attributes:
        tensors: by name, on the meta device: dtypes and shapes, no values.
        stamps: the files, as they were when their names were read.
        notes: what was chosen or left out, a sentence each.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.stamps: dict[Path, Stamp] = {}
        self.notes: list[str] = []
        self._places: dict[int, _Place] = {}  # by the identity of a meta tensor, which renaming leaves alone
        self._known: list[Tensor] = []

    def add(self, name: str, tensor: Tensor, path: Path, offset: int) -> None:
        """A tensor on the meta device whose values begin so many bytes into a file."""
        self.tensors[name] = tensor
        self._places[id(tensor)] = _Place(path, offset)
        self._known.append(tensor)  # an identity is its own only as long as the tensor lives

    def take(self, name: str, other: Contents) -> None:
        """A tensor of other contents."""
        tensor = other.tensors[name]
        place = other._places[id(tensor)]
        self.add(name, tensor, place.path, place.offset)

    def include(self, other: Contents) -> None:
        """Makes values of other contents readable here too."""
        self.stamps |= other.stamps
        self._places |= other._places
        self._known += other._known

    def each(self, wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Values of tensors, under whatever names: one after another in new memory; what has values already as it is.

        Raises:
            Changed: a file is not what it was when its names were read.
        """
        for name, tensor in wanted.items():
            yield name, self._value(tensor) if tensor.is_meta else tensor
        for path, stamp in self.stamps.items():
            if not _is_as(path, stamp):
                raise Changed(path)

    def read(self, wanted: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Values of tensors, of all by default."""
        return dict(self.each(self.tensors if wanted is None else wanted))

    def _value(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        path, begin = self._places[id(tensor)]
        span = extent(tensor)
        values = torch.empty(span, dtype=tensor.dtype)
        into = values.view(torch.uint8).numpy().data
        if not _is_as(path, self.stamps[path]):
            raise Changed(path)
        with unchanged(path), explain_os_errors("read", path), path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(into):
                count = file.readinto(into[done : done + _PIECE])
                if not count:
                    raise CheckpointError(f"{path} ends before its tensors do. Download, copy or write it again.")
                done += count
        return values.as_strided(tensor.shape, tensor.stride())


_PIECE = 1 << 28
"""Bytes of one read: systems limit it to about two GB."""


def extent(tensor: Tensor) -> int:
    """Numbers from the first to the last of a tensor in its memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
