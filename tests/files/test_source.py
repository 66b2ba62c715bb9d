"""Models by whatever name a person gives."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from actvar_convert.errors import InputError
from actvar_convert.files import bundled as zoo
from actvar_convert.files.layout import official_config, official_names, published_sampling
from actvar_convert.files.source import TOKENIZER_FILE, fetch_official, load_any
from actvar_convert.files.sparse_folder import provenance_of, save_sparse
from actvar_convert.models.base import Sampling
from actvar_convert.models.model import Model
from actvar_convert.origins import Run, recorded_teacher
from actvar_convert.recipe import Recipe
from actvar_convert.recipe.shape import Shape
from actvar_convert_cli.main import app


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_dense_files(official_pair: tuple[Path, Path], dense: Model) -> None:
    for source in (str(official_pair[0]), official_pair[0]):
        model = load_any(source, vae=official_pair[1])
        assert not model.is_sparse and torch.equal(model.transformer.head.weight, dense.transformer.head.weight)
    assert load_any(official_pair[0], dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="has no plan 'x'"):
        load_any(official_pair[0], plan="x")


def test_sparse_folder(tmp_path: Path, sparse: Model) -> None:
    folder = save_sparse(sparse, tmp_path / "out", provenance={}, recipe_text="a: 1\n")
    model = load_any(str(folder), plan="all")
    assert model.is_sparse and model.plans.name == "all"
    with pytest.raises(InputError, match="Leave vae out"):
        load_any(folder, vae=folder / "vae.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_any(folder)


def test_published_name_from_the_cache(
    offline_cache: Path, official_pair: tuple[Path, Path], dense: Model, sparse: Model, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_cache / "models--FoundationVision--var"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copy(official_pair[0], snapshot / "var_d16.pth")
    with pytest.raises(InputError, match=TOKENIZER_FILE):
        load_any("var-d16")
    assert fetch_official("var-d16", tokenizer=False).tokenizer is None
    assert load_any("var-d16", vae=official_pair[1]).origin["revision"] == commit
    shutil.copy(official_pair[1], snapshot / TOKENIZER_FILE)
    published = provenance_of(load_any("var-d16").origin)
    copy = save_sparse(sparse, tmp_path / "x", provenance=published, recipe_text="a: 1\n")
    (snapshot / TOKENIZER_FILE).write_bytes(b"another tokenizer")
    given = provenance_of(load_any("var-d16", vae=official_pair[1]).origin)
    folder = save_sparse(sparse, tmp_path / "out", provenance=given, recipe_text="a: 1\n")
    assert recorded_teacher(load_any(folder)).origin["vae"] == str(official_pair[1])
    shutil.copy(official_pair[1], snapshot / TOKENIZER_FILE)
    official_pair[1].unlink()
    for made in (folder, copy):
        assert recorded_teacher(load_any(made)).origin["vae"] == str(snapshot / TOKENIZER_FILE)
    model = load_any("var-d16")
    assert model.origin["name"] == "var-d16" and model.origin["revision"] == commit
    assert torch.equal(model.transformer.head.weight, dense.transformer.head.weight)


@pytest.mark.filterwarnings("error")
def test_published_name_without_network(offline_cache: Path) -> None:
    with pytest.raises(InputError, match=r"var-d20 needs var_d20\.pth .*not in the cache.*give their paths"):
        load_any("var-d20")


COMMITS = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")


def test_a_recorded_teacher_is_of_the_recorded_revision(
    offline_cache: Path, official_pair: tuple[Path, Path], dense: Model, sparse: Model, tmp_path: Path
) -> None:
    repository = offline_cache / "models--FoundationVision--var"
    (repository / "refs").mkdir(parents=True)
    for commit in COMMITS:
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.copy(official_pair[0], snapshot / "var_d16.pth")
        shutil.copy(official_pair[1], snapshot / TOKENIZER_FILE)
        if commit == COMMITS[0]:
            teacher = load_any("var-d16")
            recorded = Run.of(teacher, Recipe(name="x", model="var-d16")).origin
            tensors = torch.load(official_pair[0])
            torch.save({**tensors, "head.bias": tensors["head.bias"] + 1}, official_pair[0])
            torch.save(torch.load(official_pair[1]), official_pair[1])
    assert load_any("var-d16").origin["revision"] == COMMITS[1]
    assert recorded.revision == COMMITS[0]
    folder = save_sparse(sparse, tmp_path / "out", provenance=recorded, recipe_text="a: 1\n")
    teacher = recorded_teacher(load_any(folder))
    assert torch.equal(teacher.transformer.head.bias, dense.transformer.head.bias)
    assert {Path(teacher.origin[part]).parent.name for part in ("path", "vae")} == {COMMITS[0]}
    gone = recorded.model_copy(update={"revision": "f" * 40})
    folder = save_sparse(sparse, folder, provenance=gone, recipe_text="a: 1\n")
    with pytest.raises(
        InputError, match=r"not at hand; name the dense model \(--teacher\).* at revision ffffffffffff,"
    ):
        recorded_teacher(load_any(folder))


CACHE = "/cache/models--FoundationVision--var/blobs/0.incomplete"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route to host"), r"cannot be fetched \(ConnectionError: no route to host\)\. Connect"),
        (
            HfHubHTTPError.__mro__[1]("the peer closed the connection"),
            r"fetched \(\w+: the peer closed the conn.*Connect",
        ),
        (
            RuntimeError("Data processing error: CAS service error\nmore"),
            r"\(RuntimeError: Data .* CAS service error\)\.",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be fetched"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot write .*hub: the disk is full. Free some space.*HF_HOME",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", CACHE), f"cannot write {CACHE}: the disk is full. Free some"),
        (PermissionError(errno.EACCES, "Permission denied", CACHE), f"cannot write {CACHE}: no permission. Change"),
        (OSError(errno.EROFS, "Read-only file system", CACHE), f"cannot write {CACHE}: the file system is read-only"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "cannot write .*hub: the disk is full"),
    ],
    ids=lambda value: repr(value) if isinstance(value, Exception) else "",
)
def test_whatever_the_hub_raises_is_one_message(
    offline_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(InputError, match=rf"^var-d16 needs var_d16\.pth of huggingface.*{said}") as caught:
        load_any("var-d16")
    assert "\n" not in str(caught.value)
    ended = CliRunner().invoke(app, ["convert", "var-d16", "--out", str(offline_cache)], prog_name="actvar")
    assert (ended.exit_code, ended.stdout, ended.stderr) == (2, "", f"actvar: {caught.value}\n")
    assert not offline_cache.exists()


def test_misspelt_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, official_pair: tuple[Path, Path]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    for given, proposed in (
        ("var-d61", "var-d16"),
        ("VAR-D30", "var-d30"),
        ("my-modle", "my-model"),
        ("var_tiny.pht", "var_tiny.pth"),
        (str(tmp_path / "vae_tinny.pth"), "vae_tiny.pth"),
    ):
        with pytest.raises(InputError, match=f"(?s)Did you mean .*{proposed}"):
            load_any(given)
    with pytest.raises(InputError, match="There is no folder"):
        load_any("nowhere/at/all.pth")
    with pytest.raises(InputError, match="neither the name of a model nor a file"):
        load_any("zzzz")


@pytest.mark.parametrize("name", zoo.bundled_names())
def test_bundled_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert load_any(name).origin["name"] == name
    half = load_any(name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and next(half.tokenizer.parameters()).dtype == torch.float32
    with pytest.raises(InputError, match="is empty"):
        load_any(f"./{name}")
    with pytest.raises(InputError, match="Leave vae out"):
        load_any(name, vae=tmp_path)


def test_models_of_a_published_shape_have_the_published_sampling(dense: Model) -> None:
    for name in official_names():
        config, _ = official_config(name)
        assert published_sampling(config) == Sampling(1.5, 900, 0.96)
        assert published_sampling(config.model_copy(update={"depth": config.depth - 1})) is None
    assert published_sampling(dense.config) is None


def test_what_was_given_for_a_file_is_kept_with_it(
    tmp_path: Path, official_pair: tuple[Path, Path], sparse: Model
) -> None:
    transformer = {name: t for name, t in torch.load(official_pair[0]).items() if not name.endswith("lvl_1L")}
    torch.save(transformer, official_pair[0])
    with pytest.raises(InputError, match="--shape sides=1-2-3"):
        load_any(*official_pair)
    given = {"heads": 2, "sides": [1, 2, 3, 4], "residual_ratio": 0.25}
    model = load_any(*official_pair, shape=given)
    assert model.origin["shape"] == "heads=2,sides=1-2-3-4,residual_ratio=0.25"
    assert model.tokenizer.config.residual_ratio == 0.25
    recorded = provenance_of(model.origin)
    assert recorded.shape == Shape(heads=2, sides=(1, 2, 3, 4), residual_ratio=0.25)
    sparse.tokenizer = model.tokenizer
    folder = save_sparse(sparse, tmp_path / "out", provenance=recorded, recipe_text="a: 1\n")
    teacher = recorded_teacher(load_any(folder))
    assert teacher.tokenizer.config == model.tokenizer.config and teacher.origin == model.origin
    forgotten = recorded.model_copy(update={"shape": Shape(heads=2, sides=(1, 2, 3, 4))})
    with pytest.raises(InputError, match="its shape differs"):
        recorded_teacher(load_any(save_sparse(sparse, folder, provenance=forgotten, recipe_text="a: 1\n")))
    for source in (folder, "fashion", "var-d16"):
        with pytest.raises(InputError, match=r"the shape of .* is known. Leave heads and sides out"):
            load_any(source, shape={"heads": 2, "sides": (1, 2, 3, 4)})


def test_a_link_that_leads_to_nothing_is_not_proposed_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("gone").symlink_to("nowhere")
    for name, target in (("loop", "loop"), ("gone", "nowhere")):
        for given in (name, f"./{name}", Path(name)):
            with pytest.raises(InputError, match=rf"{name} is a link that leads to nothing \({target}\)"):
                load_any(given)
