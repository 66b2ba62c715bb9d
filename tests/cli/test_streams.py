"""stdout and stderr of the command: encodings that lack a character, closed streams, readers that leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from actvar_convert_cli.console import show, show_html, show_json

ACTVAR = (sys.executable, "-m", "actvar_convert_cli")
PRINTS = "from actvar_convert_cli.streams import prepare_streams; prepare_streams(); "


def program(code: str, encoding: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", PRINTS + code], env=env, capture_output=True, **settings)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1251", "utf-8"])
def test_what_an_encoding_lacks_is_replaced_by_what_looks_alike(encoding: str) -> None:
    text = "6\N{MULTIPLICATION SIGN}6 \N{EN DASH} \N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} \udcff"
    done = program(f"import sys; print({text!r}); print({text!r}, file=sys.stderr)", encoding)
    shown = done.stdout.decode(encoding)
    assert done.returncode == 0 and done.stdout == done.stderr and "\\xff" in shown
    if encoding == "ascii":
        assert shown.split() == ["6x6", "-", "e", "?", "\\xff"]
    if encoding == "utf-8":
        assert shown.split()[:4] == text.split()[:4]


def test_json_and_pages_keep_every_character_in_any_encoding() -> None:
    value = json.dumps({"path": "é\N{EN DASH}\N{SNOWMAN}"}, ensure_ascii=False)
    code = "from actvar_convert_cli.console import show_html, show_json; "
    for encoding in ("ascii", "cp437", "utf-8"):
        done = program(f"{code}show_json({value!r}); show_html('<p>\\N{{EN DASH}}</p>')", encoding)
        first, second = done.stdout.decode(encoding).splitlines()
        assert json.loads(first) == json.loads(value) and second == "<p>&#8211;</p>"


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are closed as a shell of Unix does")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_no_trouble(closed: tuple[int, ...], unbuffered: str) -> None:
    redirected = " ".join("<&-" if number == 0 else f"{number}>&-" for number in closed)
    for arguments, code in ((("recipes", "list"), 0), (("recipes", "show", "nowhere"), 2)):
        line = f'"$@" {redirected}'
        env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["sh", "-c", line, "sh", *ACTVAR, *arguments], capture_output=True, env=env, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_changes_no_exit_code(unbuffered: str) -> None:
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for arguments, code in ((("recipes", "list"), 0), (("--help",), 0), (("recipes", "show", "nowhere"), 2)):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*ACTVAR, *arguments], stdout=write, stderr=write, env=env)
        os.close(write)
        assert done.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_stdout_is_said_and_under_stderr_is_not() -> None:
    for arguments in (("recipes", "list"), ("--help",)):
        with open("/dev/full", "w") as full:
            done = subprocess.run([*ACTVAR, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 2 and done.stderr.startswith("actvar: cannot use: the disk is full.")
        assert len(done.stderr.splitlines()) == 1
    with open("/dev/full", "w") as full:
        assert subprocess.run([*ACTVAR, "recipes", "show", "nowhere"], stderr=full).returncode == 2


def test_what_is_shown_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    show(Text("table"))
    show_json('{"a": 1}')
    show_html("<p>")
    assert capsys.readouterr().out.split() == ["table", '{"a":', "1}", "<p>"]
