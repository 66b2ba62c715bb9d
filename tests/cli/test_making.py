"""convert, distill, sample and benchmark on the tiny model, one after the other as a person would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from actvar_convert.recipe import Recipe, load_recipe
from actvar_convert.recipe.schema import settled
from actvar_convert_cli.making import recipe_for

from .conftest import Actvar

SMALL = [
    "experts.count=8",
    "gate.rank=4",
    "budget.reduction=0.1",
    "calibration.pyramids=8",
    "data.pyramids=8",
    "distill.stage1={steps: 2, batch: 4}",
    "distill.stage2={steps: 2, batch: 4}",
]


def small() -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)]


@pytest.fixture
def converted(actvar: Actvar, dense_file: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sparse"
    result = actvar("convert", dense_file, "--out", folder, "--seed", 5, *small())
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}\n" and "converting" in result.stderr
    return folder


def test_a_converted_model_is_complete_and_generates(actvar: Actvar, converted: Path, dense_file: Path) -> None:
    for name in ("config.json", "model.safetensors", "vae.safetensors", "recipe.yaml"):
        assert (converted / name).is_file()
    recipe = load_recipe(converted)
    assert (recipe.model, recipe.seed, recipe.experts.count) == (str(dense_file), 5, 8)
    flops = json.loads(actvar("report-flops", converted, "--format", "json").stdout)
    assert flops["reduction"]["transformer"] >= 0.1
    sampled = actvar("sample", converted, "--labels", "0,1,4", "--per-class", 2, "--out", "new/p.png", "--quiet")
    assert (sampled.exit_code, sampled.stdout, sampled.stderr) == (0, "new/p.png\n", "")
    with Image.open("new/p.png") as picture:
        assert picture.format == "PNG" and picture.width >= 3 * 8 and picture.height >= 2 * 8


@pytest.mark.parametrize("command", ["convert", "distill"])
def test_a_folder_of_something_else_is_refused_before_any_work(
    actvar: Actvar, command: str, converted: Path, dense_file: Path
) -> None:
    Path("mine").mkdir()
    Path("mine/keep.txt").write_text("mine")
    for place, said in (("mine", "is not the folder of a sparse model"), ("mine/keep.txt", "in the way")):
        given = [dense_file, *small()] if command == "convert" else [converted]
        result = actvar(command, *given, "--out", place)
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert "sampling" not in result.stderr
    assert [path.name for path in Path("mine").iterdir()] == ["keep.txt"] and not Path("mine.work").exists()


def test_what_a_conversion_settled_is_not_a_setting_of_a_distillation(actvar: Actvar, converted: Path) -> None:
    before = sorted(converted.iterdir()), (converted / "recipe.yaml").read_bytes()
    late = ["--set", "experts.count=4", "--set", "distill.stage2.steps=3", "--set", "plans.fast.experts=8"]
    result = actvar("distill", converted, *late)
    assert result.exit_code == 2 and "--set experts.count, plans.fast.experts: this is settled" in result.stderr
    assert (sorted(converted.iterdir()), (converted / "recipe.yaml").read_bytes()) == before


def test_a_distillation_keeps_what_its_model_was_converted_by(actvar: Actvar, converted: Path) -> None:
    text = (
        "name: other\nmodel: fashion\nvae: no.pth\nshape: {heads: 3}\nexperts: {count: 7}\nbudget: {reduction: 0.3}\n"
    )
    Path("other.yaml").write_text(text + "data: {pyramids: 8}\n")
    more = ("--set", "distill.stage1={steps: 1, batch: 4}", "--set", "distill.stage2={steps: 3, batch: 4}")
    result = actvar("distill", converted, "--recipe", "other.yaml", "--out", "trained", *more)
    assert result.exit_code == 0, result.output
    trained, given = load_recipe(Path("trained")), load_recipe(converted)
    assert (trained.name, trained.data.pyramids, trained.distill.stage2.steps) == ("other", 8, 3)
    for section in settled():
        assert getattr(trained, section) == getattr(given, section), section


def test_distill_finds_its_teacher_and_keeps_the_recipe(actvar: Actvar, converted: Path) -> None:
    result = actvar("distill", converted, "--out", "trained", "--set", "distill.stage2.steps=3")
    assert result.exit_code == 0, result.output
    assert result.stdout == "trained\n"
    lines = [json.loads(line) for line in Path("trained/metrics.jsonl").read_text().splitlines()]
    assert {line.get("stage") for line in lines} >= {"stage1", "stage2"}
    trained, given = load_recipe(Path("trained")), load_recipe(converted)
    assert trained.distill.stage2.steps == 3
    assert trained.experts == given.experts and trained.distill.stage1 == given.distill.stage1


def test_benchmark_compares_with_the_recorded_source(actvar: Actvar, converted: Path) -> None:
    result = actvar("benchmark", converted, "--batches", "1,2", "--format", "json", "--quiet")
    assert result.exit_code == 0, result.output
    assert all("was taken" in line for line in result.stderr.splitlines()), "quiet, but for what was chosen"
    report = json.loads(result.stdout)
    assert report["schema"] == "actvar.benchmark/1"
    assert {row["batch"] for row in report["rows"]} == {1, 2}
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 for row in report["rows"])
    assert report["components"] is None
    assert report["repeats"] == 5 and {row["decoder_dtype"] for row in report["rows"]} == {"fp32"}
    split = actvar("benchmark", converted, "--batches", "1", "--split", "--quiet", "--repeats", 1)
    assert split.exit_code == 0 and "milliseconds by component" in split.stdout and "router" in split.stdout


def test_problems_with_the_model_and_the_recipe_are_named_together(actvar: Actvar, dense_file: Path) -> None:
    settings = ["experts.count=24", "experts.cuont=1", "gate.rank=65"]
    result = actvar("convert", dense_file, *(part for setting in settings for part in ("--set", setting)))
    assert result.exit_code == 2
    for said in (
        "a divisor of the 128 hidden neurons",
        "did you mean experts.count?",
        "gate.rank: given 65, allowed: at most 64",
    ):
        assert said in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["convert", "distill"])
def test_a_model_of_the_wrong_kind(actvar: Actvar, command: str, converted: Path, dense_file: Path) -> None:
    given = [converted, "--out", "x", *small()] if command == "convert" else [dense_file, "--recipe", converted]
    result = actvar(command, *given)
    assert result.exit_code == 2 and ("sparse already" in result.stderr) == (command == "convert"), result.output
    assert not Path("x").exists()
    if command == "distill":
        for dense in (dense_file, dense_file.parent, "fashion", "var-d16"):
            refused = actvar("distill", dense)
            assert refused.exit_code == 2 and f"first: actvar convert {dense} --out DIR" in refused.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vae.safetensors", "recipe.yaml"])
def test_a_damaged_folder_is_named(actvar: Actvar, converted: Path, name: str) -> None:
    path = converted / name
    path.write_bytes(path.read_bytes()[:40])
    cut = actvar("distill", converted, "--out", "x")
    path.unlink()
    gone = actvar("distill", converted, "--out", "x")
    for result in (cut, gone):
        assert result.exit_code == 2 and name in result.stderr, result.output
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("fashion", "fashion"),
        ("var-d30", "var_d30"),
        ("some/where/var_d16.pth", "var_d16"),
        ("var-d36.safetensors", "var_d36"),
    ],
)
def test_a_model_brings_the_shipped_recipe_of_its_name(model: str, recipe: str) -> None:
    assert recipe_for(model) == recipe


def test_a_recipe_says_which_tokenizer_and_device(actvar: Actvar, dense_file: Path) -> None:
    tokenizer = dense_file.with_name("vae.safetensors").rename(dense_file.parents[1] / "tokenizer.safetensors")
    Path("mine.yaml").write_text(f"name: mine\nmodel: m\nvae: {tokenizer}\ndevice: cuda:99\n")
    given = ["convert", dense_file, "--recipe", "mine.yaml", "--out", "sparse", *small()]
    refused = actvar(*given)
    assert refused.exit_code == 2 and "'cuda:99' asked for" in refused.stderr
    made = actvar(*given, "--device", "cpu")
    assert made.exit_code == 0, made.output
    assert load_recipe(Path("sparse")).vae == str(tokenizer)
    timed = actvar("benchmark", "sparse", "--against", dense_file, "--vae", tokenizer, "--batches", "1", "--quiet")
    assert timed.exit_code == 0, timed.output
    lone = actvar("distill", "sparse", "--vae", tokenizer)
    assert lone.exit_code == 2 and "--teacher; give that too" in lone.stderr


def test_the_same_distillation_again_says_that_it_is_done(actvar: Actvar, converted: Path, dense_file: Path) -> None:
    name = ("--set", "name=sparse")
    first, again = (actvar("distill", converted) for _ in range(2))
    assert first.exit_code == again.exit_code == 0 and again.stdout == first.stdout, again.output
    assert "distilling" in first.stderr and "distilling" not in again.stderr
    assert f"{converted} holds the result of this distillation already" in again.stderr
    assert not converted.with_name("sparse.work").exists()
    (converted / "eval.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    longer = ("distill", converted, "--set", "distill.stage2.steps=3")
    other = actvar(*longer)
    assert other.exit_code == 2 and f"{converted} holds a distilled model" in other.stderr, other.output
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before
    assert not converted.with_name("sparse.work").exists()
    on = actvar(*longer, "--out", converted)
    assert on.exit_code == 0 and len((converted / "metrics.jsonl").read_text().splitlines()) == 5, on.output
    assert actvar(*longer).exit_code == 0, "the same distillation may go without --out"
    Path("runs").mkdir()
    converted.rename("runs/sparse")
    refused = actvar("convert", dense_file, *small(), *name)
    assert refused.exit_code == 2 and "runs/sparse holds a distilled model" in refused.stderr, refused.output
    Path("runs/sparse/recipe.yaml").write_text("edited: true")
    damaged = actvar("convert", dense_file, *small(), *name)
    assert damaged.exit_code == 2 and "name it with --out" in damaged.stderr
    replaced = actvar("convert", dense_file, "--out", "runs/sparse", *small(), *name)
    assert replaced.exit_code == 0, replaced.output
    assert actvar("convert", dense_file, *small(), *name).exit_code == 0, "a conversion replaces another"


def test_flags_for_what_a_file_does_not_tell(actvar: Actvar, dense_file: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(dense_file).items() if "scale_mul" not in name}
    save_file({name: tensor for name, tensor in tensors.items() if name != "lvl_1L"}, dense_file)
    flags = ["--shape", "heads=4,sides=1-2-3-4,residual_ratio=0.25"]
    silent = actvar("inspect", dense_file)
    assert silent.exit_code == 2 and "--shape sides=1-2-3" in silent.stderr
    found = json.loads(actvar("inspect", dense_file, "--format", "json", *flags).stdout)
    assert found["config"]["heads"] == 4 and found["tokenizer"]["residual_ratio"] == 0.25
    for command in (["report-flops", dense_file], ["sample", dense_file, "--labels", "0", "--noise", "cpu"]):
        assert actvar(*command).exit_code == 2 and actvar(*command, *flags).exit_code == 0
    made = actvar("convert", dense_file, "--out", "sparse", *flags, *small())
    assert made.exit_code == 0, made.output
    recorded = json.loads(Path("sparse/config.json").read_text())["provenance"]
    assert recorded["shape"] == {"heads": 4, "sides": [1, 2, 3, 4], "residual_ratio": 0.25}
    for more in ([], ["--against", dense_file, *flags]):
        timed = actvar("benchmark", "sparse", "--batches", "1", "--quiet", *more)
        assert timed.exit_code == 0, timed.output
    wrong = actvar("sample", "sparse", *flags)
    assert wrong.exit_code == 2 and "the shape of sparse is known" in wrong.stderr
    lone = actvar("distill", "sparse", "--shape", "heads=4")
    assert lone.exit_code == 2 and "--teacher; give that too" in lone.stderr
    there = actvar("distill", "sparse", "--teacher", dense_file, *flags, "--out", "trained")
    assert there.exit_code == 0, there.output


def test_a_recipe_tells_what_the_file_does_not_unless_a_flag_does(actvar: Actvar, dense_file: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(dense_file).items() if "scale_mul" not in name}
    save_file({name: tensor for name, tensor in tensors.items() if name != "lvl_1L"}, dense_file)
    Path("mine.yaml").write_text(
        f"name: mine\nmodel: {dense_file}\nshape: {{heads: 2, sides: [1, 2, 3, 4], residual_ratio: 0.25}}\n"
    )
    for flags, heads, ratio in (([], 2, 0.25), (["--shape", "heads=4,residual_ratio=0.75"], 4, 0.75)):
        made = actvar("convert", dense_file, "--recipe", "mine.yaml", "--out", "sparse", *flags, *small())
        assert made.exit_code == 0, made.output
        config = json.loads(Path("sparse/config.json").read_text())
        assert (config["transformer"]["heads"], config["tokenizer"]["residual_ratio"]) == (heads, ratio)
        said = load_recipe(Path("sparse")).shape
        assert (said.heads, said.sides, said.residual_ratio) == (heads, (1, 2, 3, 4), ratio)


def test_a_recipe_does_not_contradict_the_model_that_is_converted(actvar: Actvar, dense_file: Path) -> None:
    other = actvar("convert", "fashion", "--set", "model=mosaics", *small())
    assert other.exit_code == 2 and "--set model: the model is fashion" in other.stderr, other.output
    for model, said in ((dense_file, "heads was given as 3, the file has 2"), ("fashion", "Leave heads out")):
        heads = actvar("convert", model, "--set", "shape.heads=3", *small())
        assert heads.exit_code == 2 and said in heads.stderr, heads.output
    assert not Path("runs").exists()


def test_a_decoder_in_low_precision(actvar: Actvar, dense_file: Path) -> None:
    for name, flags in (("exact.png", []), ("low.png", ["--decoder-dtype", "bf16"])):
        made = actvar("sample", dense_file, "--out", name, "--device", "cpu", *flags)
        assert made.exit_code == 0, made.output
    exact, low = (numpy.asarray(Image.open(name), dtype=float) for name in ("exact.png", "low.png"))
    assert exact.shape == low.shape and 0 < abs(exact - low).mean() < 4
    flags = ["--batches", "1", "--repeats", 2, "--decoder-dtype", "bf16", "--format", "json", "--device", "cpu"]
    report = json.loads(actvar("benchmark", dense_file, *flags).stdout)
    assert report["repeats"] == 2 and {row["decoder_dtype"] for row in report["rows"]} == {"bf16"}
    refused = actvar("sample", dense_file, "--decoder-dtype", "bf8")
    assert refused.exit_code == 2 and "bf8" in refused.stderr


def test_graphs_are_for_gpus(actvar: Actvar, dense_file: Path) -> None:
    refused = actvar("sample", dense_file, "--compile", "--device", "cpu", "--out", "p.png")
    assert refused.exit_code == 2 and "CUDA graphs" in refused.stderr and not Path("p.png").exists()
    assert actvar("sample", dense_file, "--noise", "loud").exit_code == 2


def test_any_other_model_gets_the_defaults() -> None:
    chosen = recipe_for("runs/my model.pth")
    assert isinstance(chosen, Recipe) and (chosen.name, chosen.model) == ("my-model", "runs/my model.pth")


def test_a_part_of_a_sparse_folder_is_no_model_and_the_folder_needs_no_tokenizer(
    actvar: Actvar, converted: Path, dense_file: Path
) -> None:
    for command in (["inspect"], ["report-flops"], ["sample", "--out", "x.png"]):
        part = actvar(command[0], converted / "model.safetensors", *command[1:])
        assert part.exit_code == 2 and f"is a part of the sparse model in {converted}. Give that folder." in part.stderr
    assert actvar("inspect", converted / "vae.safetensors").exit_code == 0
    for model in (converted, "fashion"):
        needless = actvar("inspect", model, "--vae", dense_file.with_name("vae.safetensors"))
        assert needless.exit_code == 2 and "brings its own tokenizer. Leave vae out." in needless.stderr
