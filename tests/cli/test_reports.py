"""report-flops and inspect on real models; the figures themselves are tested with the library."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    path = dense_file.with_name("var.safetensors")
    tensors = {**load_file(path), "head.bias": torch.full((32,), torch.nan)}
    save_file(tensors, path)
    counted = json.loads(actvar("inspect", path, "--values", "--format", "json").stdout)
    assert (found["nonfinite"], counted["nonfinite"]) == (None, 32)


def test_inspect_knows_names(actvar: Actvar) -> None:
    found = json.loads(actvar("inspect", "var-d36", "--format", "json").stdout)
    assert found["line"].startswith("VAR-d36: 36 blocks, width 2304, ") and found["config"]["shared_adaln"]
    assert found["notes"] == ["this is the published shape of that name; no file was read"]
    for flag, said in ((["--values"], "no file of it is read here"), (["--shape", "heads=2"], "Leave heads out")):
        refused = actvar("inspect", "var-d36", *flag)
        assert refused.exit_code == 2 and said in refused.stderr
    bundled = json.loads(actvar("inspect", "fashion", "--values", "--format", "json").stdout)
    assert bundled["kind"] == "var" and bundled["dtype"] == "fp16" and bundled["nonfinite"] == 0
    misspelt = actvar("inspect", "var-d63")
    assert misspelt.exit_code == 2 and "does not exist" in misspelt.stderr


def test_inspect_ends_with_2_for_what_is_no_model(actvar: Actvar, dense_file: Path) -> None:
    files = {"empty.pth": b"", "cut.pth": b"PK\x03\x04" + bytes(60), "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(99)}
    for name, content in files.items():
        Path(name).write_bytes(content)
        table, form = actvar("inspect", name), actvar("inspect", name, "--format", "json")
        assert table.exit_code == form.exit_code == 2 and "Not weights" in table.stdout, table.output
        assert json.loads(form.stdout)["kind"] == "other" and "Traceback" not in table.output
    tensors = load_file(dense_file)
    save_file({key: tensor for key, tensor in tensors.items() if key != "head.bias"}, dense_file)
    problems = actvar("inspect", dense_file)
    assert problems.exit_code == 0 and "head.bias" in problems.stdout, "problems of a VAR are what it is there to list"
    assert actvar("inspect", dense_file.with_name("vae.safetensors")).exit_code == 0


def test_flops_of_a_file_need_no_tokenizer(actvar: Actvar, dense_file: Path) -> None:
    tokenizer = dense_file.with_name("vae.safetensors").rename(dense_file.parents[1] / "tokenizer.safetensors")
    alone = json.loads(actvar("report-flops", dense_file, "--format", "json").stdout)
    both = json.loads(actvar("report-flops", dense_file, "--vae", tokenizer, "--format", "json").stdout)
    assert alone["dense"]["transformer"] == both["dense"]["transformer"]
    assert "end_to_end" not in alone["dense"] and both["dense"]["end_to_end"]["macs"] > 0
    save_file({"x": torch.zeros(1)}, dense_file)
    other = actvar("report-flops", dense_file)
    assert other.exit_code == 2 and "is no VAR" in other.stderr
