"""sweep on the tiny model in a file: the table, the forms, the recipe as an argument, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from actvar_convert_cli.sweeping import names_recipe

from .conftest import Actvar

SMALL = [
    "name=tiny",
    "experts.count=8",
    "gate.rank=4",
    "calibration={pyramids: 8, batch: 8}",
    "evaluate={held_out: 4, batch: 4}",
]


def small() -> list[str]:
    return [part for setting in SMALL for part in ("--set", setting)]


def test_one_table_one_folder_and_the_same_line_again(actvar: Actvar, dense_file: Path) -> None:
    line = ("sweep", dense_file, "--reductions", "0.1,0.3,0.95", "--max-kl", 1000, *small())
    result = actvar(*line)
    assert result.exit_code == 0, result.output
    assert "10.0 %" in result.stdout and "30.0 % *" in result.stdout and "out of reach" in result.stdout
    assert "Largest cut with a KL of at most 1000: *" in result.stdout
    assert "(--set budget.reduction=0.3)" in result.stdout and "4 held-out pyramids" in result.stdout
    assert result.stdout.endswith("runs/tiny-sweep\n") and "sampling from the teacher" in result.stderr
    folder = Path("runs/tiny-sweep")
    assert sorted(path.name for path in folder.iterdir()) == ["sweep.csv", "sweep.json", "sweep.png"]
    again = actvar(*line)
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert "sampling" not in again.stderr and "converting" not in again.stderr


def test_json_and_a_recipe_that_names_the_model(actvar: Actvar, dense_file: Path) -> None:
    text = [f"model: {dense_file}", *(setting.replace("=", ": ", 1) for setting in SMALL[:1])]
    Path("mine.yaml").write_text("\n".join(text) + "\n")
    given = (
        "--reductions",
        "0.2",
        "--out",
        "s",
        "--format",
        "json",
        "--quiet",
        *small(),
        "--set",
        "evaluate.held_out=3",
    )
    result = actvar("sweep", "mine.yaml", *given)
    assert result.exit_code == 0, result.output
    assert all("was taken" in line for line in result.stderr.splitlines()), "quiet, but for what was chosen"
    report = json.loads(result.stdout)
    assert report["schema"] == "actvar.sweep/1" and report["held_out"] == 3 and report["recipe"] == "tiny"
    assert report == json.loads(Path("s/sweep.json").read_text())
    (point,) = report["points"]
    assert point["target"] == 0.2 and point["kl"]["mean"] > 0 and point["kl"]["pyramids"] == 3
    other = actvar("sweep", dense_file, "--reductions", "0.2", "--out", "s", "--seed", 5, *small())
    assert other.exit_code == 2 and "choose another folder with --out" in other.stderr
    assert "sampling" not in other.stderr


def test_what_counts_as_a_recipe() -> None:
    assert names_recipe("fashion") and names_recipe("var_d16") and names_recipe("a/b.yml")
    assert not names_recipe("var-d16") and not names_recipe("runs/var_d16.pth") and not names_recipe("folder")


def test_a_recipe_beside_the_model_says_which_tokenizer_and_device(actvar: Actvar, dense_file: Path) -> None:
    tokenizer = dense_file.with_name("vae.safetensors").rename(dense_file.parents[1] / "tokenizer.safetensors")
    Path("mine.yaml").write_text(f"name: mine\nmodel: m\nvae: {tokenizer}\ndevice: cuda:99\n")
    line = ["sweep", dense_file, "--recipe", "mine.yaml", "--reductions", "0.1", "--quiet", *small()]
    refused = actvar(*line)
    assert refused.exit_code == 2 and "'cuda:99' asked for" in refused.stderr
    made = actvar(*line, "--device", "cpu")
    assert made.exit_code == 0, made.output


def test_a_recipe_tells_the_shape_of_a_file_that_does_not(actvar: Actvar, dense_file: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(dense_file).items() if "scale_mul" not in name}
    save_file({name: tensor for name, tensor in tensors.items() if name != "lvl_1L"}, dense_file)
    Path("mine.yaml").write_text(f"name: mine\nmodel: {dense_file}\nshape: {{heads: 4, sides: [1, 2, 3, 4]}}\n")
    beside = ("sweep", dense_file, "--recipe", "mine.yaml", "--out", "a")
    for line in (("sweep", "mine.yaml", "--out", "b"), beside):
        made = actvar(*line, "--reductions", "0.1", "--format", "json", "--quiet", *small())
        assert made.exit_code == 0, made.output
    other = actvar(*beside, "--shape", "heads=2", "--reductions", "0.1", "--quiet", *small())
    assert other.exit_code == 2 and "is a sweep of another model" in other.stderr, other.output
    named = actvar("sweep", dense_file, "--set", "model=mosaics", *small())
    assert named.exit_code == 2 and "--set model: the model is" in named.stderr, named.output
