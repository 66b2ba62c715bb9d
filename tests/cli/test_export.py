"""export on a model that convert made: the way out, and the line on what a dense model has no place for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import actvar_convert as av
from actvar_convert.errors import InputError
from actvar_convert.files.source import model_shape
from actvar_convert.models.model import Model
from actvar_convert.recipe import Recipe, dump_recipe, load_recipe

from .conftest import Actvar

SETTINGS = ("experts.count=8", "gate.rank=4", "calibration.pyramids=8", "budget={reduction: 0.25, gate_keep: 0.9}")


def test_convert_and_export_come_back_to_the_source(actvar: Actvar, dense_file: Path) -> None:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    made = actvar("convert", dense_file, "--out", "sparse", "--quiet", *settings)
    assert made.exit_code == 0, made.output
    assert all("was taken" in line for line in made.stderr.splitlines()), "quiet, but for what was chosen"
    result = actvar("export", "sparse", "--format", "reference", "--out", "back.pth", "--vae-out", "vae.safetensors")
    assert result.exit_code == 0 and result.stdout == "back.pth\nvae.safetensors\n", result.output
    warning, memory = result.stderr.splitlines()
    assert warning.startswith("left out, since a dense VAR has no place for it: ")
    assert "routers of 2 blocks" in warning
    assert memory.startswith("peak memory ")
    source, back = load_file(dense_file), torch.load("back.pth", weights_only=True)
    assert source.keys() == back.keys() and all(torch.equal(back[name], source[name]) for name in source)
    again = actvar("export", "sparse", "--out", "back.pth")
    assert again.exit_code == 2 and "exists already" in again.stderr and "peak memory" not in again.stderr


def test_from_python(tiny_model: Model, tmp_path: Path) -> None:
    exported = av.export(tiny_model, out=tmp_path / "var.safetensors")
    assert exported.files == (tmp_path / "var.safetensors",) and exported.left_out == ()
    with pytest.raises(InputError, match="give reference"):
        av.export(tiny_model, out=tmp_path / "x.pth", format="onnx")  # type: ignore[arg-type]


def test_a_conversion_that_cannot_fit_is_refused_before_any_work(
    actvar: Actvar, dense_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actvar_convert.conversion import conversion_memory as memory

    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 10**8)
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    result = actvar("convert", dense_file, "--out", "sparse", *settings)
    assert result.exit_code == 2 and "100 MB are free" in result.stderr and "calibration.pyramids" in result.stderr
    assert "sampling from the teacher" not in result.stderr and not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("verb", ["convert", "run"])
def test_a_file_in_half_precision_is_priced_as_what_it_becomes_before_its_weights_are_read(
    actvar: Actvar, dense_file: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from actvar_convert import preflight, verbs
    from actvar_convert.conversion import conversion_memory as memory

    save_file({name: t.half() for name, t in load_file(dense_file).items()}, dense_file)
    shape = model_shape(dense_file)
    recipe = load_recipe(Recipe(name="x", model=str(dense_file)), SETTINGS)
    assert shape.tokenizer is not None and shape.line.endswith("fp16")
    by_shape = memory.estimate_convert(shape.transformer, shape.tokenizer, recipe)
    assert by_shape == preflight.conversion_memory(av.load(dense_file, device="cpu"), recipe, keep=False)
    held = by_shape.total

    def read(*_: object, **__: object) -> None:
        raise InputError("the weights were read")

    monkeypatch.setattr(verbs, "load_any", read)
    Path("mine.yaml").write_text(dump_recipe(recipe))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    given = [dense_file, *settings] if verb == "convert" else ["mine.yaml"]
    for free, said in ((held - 1, "convert needs about"), (held, "the weights were read")):
        monkeypatch.setattr(memory, "free_memory_bytes", lambda device, free=free: free)
        result = actvar(verb, *given, "--out", "sparse")
        assert result.exit_code == 2 and said in result.stderr, result.output
    assert not Path("sparse").exists()
