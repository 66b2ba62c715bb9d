"""report-flops and inspect on real models; the figures themselves are tested with the library."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from .conftest import Actvar


def test_flops_of_an_official_name_as_json(actvar: Actvar) -> None:
    both = json.loads(actvar("report-flops", "var-d16", "--format", "json").stdout)
    half = json.loads(actvar("report-flops", "var-d16", "--format", "json", "--no-guidance").stdout)
    assert both["schema"] == "actvar.flops/1" and both["convention"]["guidance"] is True
    assert half["convention"]["guidance"] is False
    ratio = both["dense"]["transformer"]["flops"] / half["dense"]["transformer"]["flops"]
    assert 1.99 < ratio <= 2


@pytest.mark.parametrize("form", ["table", "csv", "html"])
def test_the_other_forms_show_the_same_components(actvar: Actvar, form: str) -> None:
    result = actvar("report-flops", "var-d16", "--format", form)
    assert result.exit_code == 0 and result.stderr.startswith("peak memory ") and result.stderr.count("\n") == 1
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
        assert {"ffn", "head"} <= {row["component"] for row in rows if row["part"] == "component"}
    else:
        assert "attention projections" in result.stdout and "FFN" in result.stdout
    assert result.stdout.startswith("<!") == (form == "html")


def test_inspect_says_what_a_file_is(actvar: Actvar, dense_file: Path) -> None:
    found = json.loads(actvar("inspect", dense_file, "--format", "json").stdout)
    assert found["schema"] == "actvar.inspect/1" and found["kind"] == "var"
    assert found["config"]["depth"] == 2 and found["config"]["hidden"] == 128
    table = actvar("inspect", dense_file)
    assert table.exit_code == 0 and "128" in table.stdout
