"""The shipped recipes, shrunk: the whole path on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from actvar_convert import verbs
from actvar_convert.files.run_state import RunState, save_run_state
from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.classifier import FashionClassifier

from .conftest import Actvar

SHRUNK = [
    "calibration={pyramids: 16, batch: 16}",
    "data.pyramids=16",
    "distill.stage1={steps: 1, batch: 4}",
    "distill.stage2={steps: 1, batch: 4}",
    "evaluate={images: 20, held_out: 4, batch: 20}",
    "benchmark={batches: [1]}",
]
LEFT = [
    *("config.json", "model.safetensors", "vae.safetensors", "recipe.yaml", "flops.json", "eval.json", "metrics.jsonl"),
    *("samples.png", "README.md"),
]


def shrunk(*more: str) -> list[str]:
    return [part for setting in (*SHRUNK, *more) for part in ("--set", setting)]


def test_fashion_leaves_a_complete_folder_and_ends_with_one_table(actvar: Actvar) -> None:
    result = actvar("run", "fashion", "--out", "made", *shrunk())
    assert result.exit_code == 0, result.output
    assert all((Path("made") / name).stat().st_size > 0 for name in LEFT)
    assert all(word in result.stdout for word in ("dense", "sparse", "FLOPs", "FID", "made"))
    flops = json.loads(Path("made/flops.json").read_text())
    assert flops["reduction"]["transformer"] >= 0.2
    assert json.loads(Path("made/eval.json").read_text())["images"] == 20
    again = actvar("run", "fashion", "--out", "made", *shrunk())
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert "distilling" not in again.stderr and "images of the" not in again.stderr
    Path("runs").mkdir()
    Path("runs/fashion").symlink_to(Path("made").absolute())
    assert actvar("run", "fashion", *shrunk()).exit_code == 0, "the same run may go without --out"
    before = {path.name: path.read_bytes() for path in Path("made").iterdir()}
    other = actvar("run", "fashion", *shrunk("seed=1"))
    assert other.exit_code == 2 and "runs/fashion holds a distilled model" in other.stderr and "--out" in other.stderr
    assert {path.name: path.read_bytes() for path in Path("made").iterdir()} == before
    assert [path.name for path in Path("runs").iterdir()] == ["fashion"]
    more = actvar("run", "fashion", "--out", "made", *shrunk("evaluate.held_out=6", "benchmark.batches=[2]"))
    assert "distilling" not in more.stderr and "benchmark" in more.stderr
    assert json.loads(Path("made/eval.json").read_text())["kl"]["pyramids"] == 6
    assert {row["batch"] for row in json.loads(Path("made/benchmark.json").read_text())["rows"]} == {2}


def test_a_recipe_tells_what_its_file_does_not(actvar: Actvar, dense_file: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(dense_file).items() if "scale_mul" not in name}
    save_file({name: tensor for name, tensor in tensors.items() if name != "lvl_1L"}, dense_file)
    settings = "experts: {count: 8}\ngate: {rank: 4}\nbudget: {reduction: 0.1}\n"
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\n{settings}")
    for command in (["recipes", "validate", "mine.yaml"], ["run", "mine.yaml", "--out", "made", *shrunk()]):
        silent = actvar(*command)
        assert silent.exit_code == 2 and "shape in a recipe" in silent.stderr, silent.output
    with Path("mine.yaml").open("a") as recipe:
        recipe.write("shape: {heads: 4, sides: [1, 2, 3, 4], residual_ratio: 0.25}\n")
    assert actvar("recipes", "validate", "mine.yaml").exit_code == 0
    result = actvar("run", "mine.yaml", "--out", "made", *shrunk())
    assert result.exit_code == 0, result.output
    recorded = json.loads(Path("made/config.json").read_text())["provenance"]
    assert recorded["shape"] == {"heads": 4, "sides": [1, 2, 3, 4], "residual_ratio": 0.25}
    again = actvar("run", "mine.yaml", "--out", "made", *shrunk())
    assert again.exit_code == 0 and again.stdout == result.stdout and "distilling" not in again.stderr


def test_a_model_that_no_bundled_classifier_knows_is_run_without_fid(actvar: Actvar, dense_file: Path) -> None:
    settings = "experts: {count: 8}\ngate: {rank: 4}\nbudget: {reduction: 0.1}\n"
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\n{settings}")
    limit = actvar("run", "mine.yaml", "--out", "made", *shrunk("checks.max_fid_increase=0.1"))
    assert limit.exit_code == 2 and "checks.max_fid_increase needs a FID" in limit.stderr
    assert "evaluate.reference" in limit.stderr and not list(Path().glob("made*"))
    result = actvar("run", "mine.yaml", "--out", "made", *shrunk("checks.max_kl=1000"))
    assert result.exit_code == 0, result.output
    assert "FID and its companions are left out (evaluate.reference)" in result.stderr and "FID" not in result.stdout
    assert all((Path("made") / name).stat().st_size > 0 for name in LEFT)
    report = json.loads(Path("made/eval.json").read_text())
    assert (report["fid"], report["extractor"], report["images"]) == (None, None, 0)
    assert report["kl"]["pyramids"] == 4 and report["kl"]["mean"] > 0
    for name in ("README.md", "report.html"):
        shown = (Path("made") / name).read_text()
        assert "no images were compared with real ones" in shown and "Farthest apart of seed 0: " in shown
    again = actvar("run", "mine.yaml", "--out", "made", *shrunk("checks.max_kl=1000"))
    assert again.exit_code == 0 and "agreement" not in again.stderr
    far = actvar("run", "mine.yaml", "--out", "made", *shrunk("checks.max_distance=0"))
    assert far.exit_code == 3 and "checks.max_distance" in far.stderr and "agreement" not in far.stderr
    Path("made/eval.json").write_text(json.dumps(report | {"distances": None}))
    older = actvar("run", "mine.yaml", "--out", "made", *shrunk("checks.max_distance=1"))
    assert older.exit_code == 0 and json.loads(Path("made/eval.json").read_text()) == report
    alone = actvar("evaluate", "made", "--images", 0, "--format", "json")
    assert alone.exit_code == 0 and json.loads(alone.stdout)["fid"] is None, alone.output
    few = ("evaluate", "made", "--images", 0, "--held-out", 6, "--batch", 3, "--cache", "kept", "--format", "json")
    kept = actvar(*few)
    assert json.loads(kept.stdout)["kl"]["pyramids"] == 6 and list(Path("kept").iterdir()), kept.output
    before = {path: path.stat().st_mtime_ns for path in Path("kept").iterdir()}
    assert actvar(*few).stdout == kept.stdout
    assert {path: path.stat().st_mtime_ns for path in Path("kept").iterdir()} == before, "taken from there"
    asked = actvar("evaluate", "made", "--images", 20, "--batch", 20, "--held-out", 4)
    assert asked.exit_code == 0 and "pixels (RMSE)" in asked.stdout and "--reference" in asked.stdout, asked.output


def test_a_report_of_other_images_or_another_machine_is_made_anew(
    actvar: Actvar, dense_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = FashionClassifier(classes=5).eval()
        real = {name: torch.randn(30, classifier.feature_dim) for name in ("a", "b")}
    judges = {name: ClassifierExtractor(classifier, real[name], name="one judge", image_size=8) for name in real}
    monkeypatch.setattr(verbs, "extractor_for", lambda model, reference=None: judges[reference])
    settings = "experts: {count: 8}\ngate: {rank: 4}\nbudget: {reduction: 0.1}\n"
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\n{settings}")
    for name in judges:
        Path(name).mkdir()
        for shade in (0, 255):
            Image.new("RGB", (8, 8), (shade,) * 3).save(f"{name}/{shade}.png")

    def run(reference: str, *more: str) -> tuple[int, str, dict[str, Any]]:
        given = shrunk(f"evaluate.reference={reference}", *more)
        result = actvar("run", "mine.yaml", "--out", "made", *given)
        return result.exit_code, result.stderr, json.loads(Path("made/eval.json").read_text())

    _, _, first = run("a")
    assert first["reference"] == judges["a"].reference().fingerprint
    code, said, again = run("a")
    assert code == 0 and again == first and "images of the" not in said and "benchmark" not in said
    Path("before.json").write_text(json.dumps(first))
    code, said, _ = run("b", "checks={baseline: before.json}")
    assert code == 2 and "reference: " in said
    code, said, other = run("b")
    assert code == 0 and "images of the" in said and other["fid"]["dense"] != first["fid"]["dense"]
    path = Path("made/benchmark.json")
    timed = json.loads(path.read_text())
    elsewhere = [row | {"device": "cuda:0"} for row in timed["rows"]]
    for edited in ({"hardware": "another"}, {"rows": elsewhere}):
        path.write_text(json.dumps(timed | edited))
        assert "benchmark" in run("b")[1]
        made = json.loads(path.read_text())
        assert made["hardware"] == timed["hardware"] and {row["device"] for row in made["rows"]} == {"cpu"}


def test_ci_fails_with_3_and_a_table_when_a_limit_is_broken(actvar: Actvar) -> None:
    limits = "checks={max_flops_ratio: 0.01, max_kl: 100.0}"
    result = actvar("run", "ci", "--out", "made", "--quiet", *shrunk(limits))
    assert result.exit_code == 3, result.output
    assert "1 of 2 checks failed" in result.stderr and "checks.max_flops_ratio" in result.stderr
    assert all((Path("made") / name).is_file() for name in LEFT)


def test_a_run_over_something_else_is_refused(actvar: Actvar) -> None:
    Path("made").mkdir()
    Path("made/keep.txt").write_text("mine")
    result = actvar("run", "fashion", "--out", "made", *shrunk())
    assert result.exit_code == 2 and "made" in result.stderr
    assert Path("made/keep.txt").read_text() == "mine"


def test_what_would_fail_at_the_end_is_said_before_any_work(actvar: Actvar) -> None:
    Path("made.work").mkdir()
    save_run_state("made.work/state.safetensors", RunState(fingerprint="of another run"))
    other = actvar("run", "fashion", "--out", "made", *shrunk())
    assert other.exit_code == 2 and "another recipe or teacher" in other.stderr
    images = actvar("run", "fashion", "--out", "fresh", *shrunk("data.images=nowhere"))
    assert images.exit_code == 2 and "data.images: nowhere: no such folder" in images.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["made.work"]
    assert [path.name for path in Path("made.work").iterdir()] == ["state.safetensors"]
