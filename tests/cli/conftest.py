"""Running the command in this process, and a dense model on disk for it to work on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from actvar_convert.models.model import Model
from actvar_convert_cli.main import app

Actvar = Callable[..., Result]


@pytest.fixture
def actvar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Actvar:
    """Runs ``actvar`` with the given arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="actvar")

    return run


@pytest.fixture
def dense_file(tiny_model: Model, tmp_path: Path) -> Path:
    """The tiny model as a file with the official names, its tokenizer beside it in ``vae.safetensors``."""
    folder = tmp_path / "dense"
    folder.mkdir()
    for name, part in {"var": tiny_model.transformer, "vae": tiny_model.tokenizer}.items():
        save_file(
            {key: tensor.contiguous() for key, tensor in part.state_dict().items()}, folder / f"{name}.safetensors"
        )
    return folder / "var.safetensors"
