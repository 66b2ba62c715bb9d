"""What the environment says of a launcher: a rank counts only beside a complete launch of several processes."""

from __future__ import annotations

import pytest

from actvar_convert.errors import InputError
from actvar_convert.system.launch import Launch, launched

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "somewhere", "MASTER_PORT": "29500"}


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "x"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch()),
        ({"RANK": "1"}, Launch(leftover="RANK=1")),
        ({"RANK": "abc", "WORLD_SIZE": "1"}, Launch(leftover="RANK=abc")),
        (WHOLE, Launch(1, 2)),
        (WHOLE | {"LOCAL_RANK": "0"}, Launch(1, 2, local=0)),
    ],
)
def test_who_a_process_is(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: Launch) -> None:
    environment(monkeypatch, **values)
    assert launched() == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "abc"}, r"WORLD_SIZE=abc in the environment.*1 or more.*or unset WORLD_SIZE\."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"WORLD_SIZE": "4"}, "one of 4, and RANK and MASTER_ADDR and MASTER_PORT are not set"),
        (WHOLE | {"RANK": ""}, "one of 2, and RANK is not set"),
        (WHOLE | {"RANK": "2"}, "RANK=2 .*0 to 1.*or unset RANK and WORLD_SIZE"),
        (WHOLE | {"RANK": "1.5"}, "RANK=1.5"),
        (WHOLE | {"MASTER_PORT": "none"}, "MASTER_PORT=none"),
        (WHOLE | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    ],
)
def test_what_no_launcher_leaves_is_refused(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], said: str) -> None:
    environment(monkeypatch, **values)
    with pytest.raises(InputError, match=said):
        launched()
