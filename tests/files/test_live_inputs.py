"""Weight files that another program writes to: a model is what they held at one moment, or nothing is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.contents import Contents
from actvar_convert.files.dense import load_dense
from actvar_convert.files.inspection import inspect_file
from actvar_convert.files.sparse_folder import load_sparse, provenance_of, save_sparse
from actvar_convert.files.tensors import open_tensors, read_tensors, write_weights
from actvar_convert.models.model import Model

Parts = tuple[dict[str, Tensor], dict[str, Tensor]]
Same = Callable[[Model, Model], None]


def _others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(t) if t.is_floating_point() else t.clone() for name, t in tensors.items()}


def _again_in_place(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(_others(tensors), path)


def _only_begun(path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save({"epoch": torch.zeros(1)}, path)


def _emptied(path: Path, tensors: dict[str, Tensor]) -> None:
    path.write_bytes(b"")


def _copied_over(path: Path, tensors: dict[str, Tensor]) -> None:
    other = path.with_name(f"other{path.suffix}")
    save = torch.save if path.suffix == ".pth" else save_file
    save(_others(tensors), other)  # type: ignore[operator]
    shutil.copyfile(other, path)
    other.unlink()


def _replaced(path: Path, tensors: dict[str, Tensor]) -> None:
    _copied_over(path.with_name(f"next{path.suffix}"), tensors)
    os.replace(path.with_name(f"next{path.suffix}"), path)


def _removed(path: Path, tensors: dict[str, Tensor]) -> None:
    path.unlink()


Writer = Callable[[Path, dict[str, Tensor]], None]
OF_ANY: tuple[Writer, ...] = (_emptied, _copied_over, _replaced, _removed)
WRITERS = [(write, suffix) for suffix in (".pth", ".safetensors") for write in OF_ANY]
WRITERS += [(_again_in_place, ".pth"), (_only_begun, ".pth")]


def _stored(folder: Path, suffix: str, parts: Parts) -> Path:
    for name, tensors in zip(("var", "vae"), parts, strict=True):
        path = folder / f"{name}{suffix}"
        if suffix == ".pth":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
    return folder / f"var{suffix}"


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
def test_a_loaded_model_stays_what_it_was(
    tmp_path: Path, parts: Parts, dense: Model, same_model: Same, write: Writer, suffix: str
) -> None:
    source = _stored(tmp_path, suffix, parts)
    model = load_dense(source)
    for path, tensors in zip((source, tmp_path / f"vae{suffix}"), parts, strict=True):
        write(path, tensors)
    same_model(model, dense)


def _during(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None], times: int = 1) -> None:
    """Does something before a tensor is read that has this number; as often as a reading comes that far."""
    original = Contents._value
    state = {"read": 0, "done": 0}

    def value(self: Contents, tensor: Tensor) -> Tensor:
        state["read"] += 1
        if state["read"] >= count and state["done"] < times:
            state.update(read=0, done=state["done"] + 1)
            action()
        return original(self, tensor)

    monkeypatch.setattr(Contents, "_value", value)


@pytest.mark.parametrize(("write", "suffix"), WRITERS)
@pytest.mark.parametrize("count", [2, 20])
def test_a_file_that_changes_while_it_is_read_is_read_once_more(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, write: Writer, suffix: str, count: int
) -> None:
    source = _stored(tmp_path, suffix, parts)
    _during(monkeypatch, count, lambda: write(source, parts[0]))
    if write in (_again_in_place, _copied_over, _replaced):
        model = load_dense(source)
        written = torch.load(source) if suffix == ".pth" else load_file(source)
        ours = model.transformer.state_dict()
        assert all(torch.equal(ours[name], written[name]) for name in ours if not name.endswith("masking"))
    else:
        with pytest.raises(InputError, match=r"is not a VAR|an empty file|does not exist"):
            load_dense(source)


def test_a_file_that_never_rests_is_refused_with_what_to_do(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _stored(tmp_path, ".pth", parts)
    _during(monkeypatch, 5, lambda: _again_in_place(source, parts[0]), times=99)
    with pytest.raises(CheckpointError, match=r"var\.pth was changed while it was read.*Wait until .*, or give a copy"):
        load_dense(source)


def test_a_file_that_is_being_written_when_it_is_opened_is_not_called_damaged(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _stored(tmp_path, ".pth", parts)
    whole, original = source.read_bytes(), torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        source.write_bytes(whole[: len(whole) // 2])
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        open_tensors(source)


def _sharded(folder: Path, parts: Parts) -> list[Path]:
    write_weights(folder, "model", parts[0], 100_000)
    save_file(parts[1], folder / "vae.safetensors")
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("which", ["index", "first", "last"])
def test_shards_are_of_one_moment(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """The first file is read long before the last; whichever changes in between, nothing of it counts."""
    shards = _sharded(tmp_path, parts)
    file = {"index": tmp_path / "model.safetensors.index.json", "first": shards[0], "last": shards[-1]}[which]

    def touched() -> None:
        if which == "index":
            file.write_text(file.read_text() + " ")
        else:
            save_file({name: tensor + 0 for name, tensor in load_file(file).items()}, file)

    _during(monkeypatch, 20, touched, times=99)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        load_dense(tmp_path)


def test_a_shard_that_is_swapped_once_is_read_with_the_others_again(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = _sharded(tmp_path, parts)
    newer = {name: tensor + 1 for name, tensor in load_file(shards[0]).items() if tensor.is_floating_point()}
    newer = {**load_file(shards[0]), **newer}
    _during(monkeypatch, 20, lambda: save_file(newer, shards[0]))
    state = load_dense(tmp_path).transformer.state_dict()
    for name, tensor in newer.items():
        if not name.endswith(("masking", "lvl_1L")):
            assert torch.equal(state[name], tensor)


def test_a_sparse_folder_that_is_replaced_meanwhile_is_read_again(
    tmp_path: Path, sparse: Model, monkeypatch: pytest.MonkeyPatch, same_model: Same
) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    sparse.transformer.head.bias.data += 1
    replace = lambda: save_sparse(sparse, folder, provenance={}, recipe_text="a: 2\n")  # noqa: E731
    _during(monkeypatch, 10, replace)  # type: ignore[arg-type]
    same_model(load_sparse(folder), sparse)


def test_the_hash_on_record_is_that_of_the_weights_or_none(official_pair: tuple[Path, Path], parts: Parts) -> None:
    model = load_dense(*official_pair)
    recorded = provenance_of(model.origin, model.moments)
    assert recorded.source_sha256 and recorded.vae_sha256
    _again_in_place(official_pair[0], parts[0])
    later = provenance_of(model.origin, model.moments)
    assert later.source == str(official_pair[0]) and later.source_sha256 is None and later.vae_sha256 is None


def test_only_what_is_wanted_is_read(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a training checkpoint neither averages nor the state of the optimiser; of a header nothing at all."""
    moments = {name: {"exp_avg": tensor.clone()} for name, tensor in parts[0].items()}
    torch.save({"model": parts[0], "ema": parts[0], "vae": parts[1], "optimizer": moments}, tmp_path / "last.pth")
    sizes: list[int] = []
    original = Contents._value

    def value(self: Contents, tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return original(self, tensor)

    monkeypatch.setattr(Contents, "_value", value)
    inspect_file(tmp_path / "last.pth")
    assert sum(sizes) <= 8 * 30, "the levels of the tokens"
    sizes.clear()
    load_dense(tmp_path / "last.pth")
    assert sum(sizes) <= sum(tensor.nbytes for part in parts for tensor in part.values())


def test_views_of_a_larger_memory_are_read_as_what_they_are(tmp_path: Path) -> None:
    flat = torch.arange(40.0)
    tensors = {
        "middle": flat[8:20].view(3, 4),
        "turned": flat[20:32].view(3, 4).T,
        "step": flat[::3],
        "one": flat[39],
        "none": flat[:0].view(0, 7),
        "same": flat[8:20],
        "repeated": flat[5:6].expand(6),
        "whole": flat,
        "half": flat.bfloat16(),
        "bits": flat > 7,
        "parameter": torch.nn.Parameter(flat[1:4].clone()),
    }
    torch.save({"a": {"b": tensors}}, tmp_path / "x.pth")
    read = read_tensors(tmp_path / "x.pth")
    assert read.keys() == {f"a.b.{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(read[f"a.b.{name}"], tensor) and read[f"a.b.{name}"].dtype == tensor.dtype
    read["a.b.whole"].zero_()
    assert read["a.b.middle"].eq(flat[8:20].view(3, 4)).all()


def test_safetensors_of_all_kinds_of_numbers(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool]
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    tensors |= {"none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    read, expected = read_tensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].double(), tensor.double())


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[3, 3]),
        lambda header: header["a"].update(data_offsets=[0, 12]),
        lambda header: header["a"].update(data_offsets=[16, 0]),
        lambda header: header["a"].update(data_offsets=[4, 20]),
        lambda header: header["a"].update(shape=[-2, -2]),
        lambda header: header["a"].update(shape="22"),
        lambda header: header["a"].update(dtype=7),
        lambda header: header.update(b={"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}),
        lambda header: header.update(a=[1]),
        lambda header: header.clear(),
    ],
)
def test_a_header_that_contradicts_its_file_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    header: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    change(header)
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match=r"damaged or truncated safetensors|not weights"):
        read_tensors(tmp_path / "x.safetensors")
