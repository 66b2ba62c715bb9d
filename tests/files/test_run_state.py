"""State of a training run: what is saved comes back, and only for the same run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.run_state import RunState, fingerprint_of, load_run_state, save_run_state
from actvar_convert.files.tensors import write_tensors


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Linear, torch.optim.AdamW, torch.Generator]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(1)

    straight = fresh()
    _train(*straight, steps=6)

    model, optimizer, generator = fresh()
    _train(model, optimizer, generator, steps=3)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    tensors["generator"] = generator.get_state()
    fingerprint = fingerprint_of("recipe", b"teacher")
    save_run_state(tmp_path / "state.safetensors", RunState(tensors, {"step": 3, "stage": "stage1"}, fingerprint))

    model, optimizer, generator = fresh()
    state = load_run_state(tmp_path / "state.safetensors", fingerprint)
    assert state.scalars == {"step": 3, "stage": "stage1"} and state.tensors.keys() == tensors.keys()
    assert all(torch.equal(state.tensors[name], value) for name, value in tensors.items())
    model.load_state_dict({name: state.tensors[f"model/{name}"] for name in ("weight", "bias")})
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: state.tensors[f"optimizer/{name}/{key}"] for key in keys}
    generator.set_state(state.tensors["generator"])
    _train(model, optimizer, generator, steps=3)
    assert torch.equal(model.weight, straight[0].weight)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


def test_odd_tensors_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "a": base,
        "same memory": base,
        "a part": base[1:],
        "turned": base.T,
        "none": base[:0],
        "0-d": base.sum(),
    }
    scalars = {"float": 0.1, "nan": float("nan"), "list": [1, "x", None], "nested": {"deep": [True]}}
    save_run_state(tmp_path / "s", RunState(tensors, scalars, "f"))
    read = load_run_state(tmp_path / "s", "f")
    assert all(torch.equal(read.tensors[name], value) for name, value in tensors.items())
    assert read.scalars["nan"] != read.scalars["nan"]
    assert {k: v for k, v in read.scalars.items() if k != "nan"} == {k: v for k, v in scalars.items() if k != "nan"}
    before = (tmp_path / "s").read_bytes()
    read.tensors["a"].zero_()  # type: ignore[attr-defined]
    assert (tmp_path / "s").read_bytes() == before


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    save_run_state(tmp_path / "s", RunState(fingerprint=fingerprint_of("a", "b")))
    with pytest.raises(CheckpointError, match=r"another recipe or teacher.*To start over, delete"):
        load_run_state(tmp_path / "s", fingerprint_of("a", "c"))
    assert fingerprint_of("ab", "c") != fingerprint_of("a", "bc")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_damage_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "s"
    save_run_state(path, RunState({"a": torch.randn(100, 100)}, {"step": 1}, "f"))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="To start over, delete"):
        load_run_state(path, "f")


def test_random_bytes_and_foreign_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "s").write_bytes(random.Random(0).randbytes(500))
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for name in ("s", "foreign"):
        with pytest.raises(CheckpointError, match="To start over, delete"):
            load_run_state(tmp_path / name, "f")
    with pytest.raises(InputError, match="no such file"):
        load_run_state(tmp_path / "absent", "f")


@pytest.mark.parametrize("scalars", ["[" * 100_000, "[1, 2]", "3", "null", '"a"'])
def test_scalars_that_are_no_mapping_are_damage(tmp_path: Path, scalars: str) -> None:
    path = tmp_path / "state"
    metadata = {"content": "actvar-run-state/1", "fingerprint": "f", "scalars": scalars}
    write_tensors(path, {"a": torch.zeros(1)}, metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_run_state(path, "f")
