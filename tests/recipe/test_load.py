"""Reading recipes: sources, overrides, and all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from actvar_convert.errors import InputError, RecipeError
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe import Recipe, dump_recipe, load_recipe, shipped_recipes

TINY = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=(1, 2, 3, 4), vocab=32, z_channels=8, classes=5)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(source: str | Path | Recipe, overrides: tuple[str, ...] = (), **more: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, **more)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_valid_and_survive_writing(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and "\n" not in recipe.description
    for explain in (False, True):
        text = dump_recipe(recipe, explain=explain)
        assert load_recipe(written(tmp_path, text)) == recipe


def test_sources(tmp_path: Path) -> None:
    text = "name: a\nmodel: m\n"
    path = written(tmp_path, text)
    (tmp_path / "recipe.yaml").write_text(text)
    expected = Recipe(name="a", model="m")
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(tmp_path) == load_recipe(expected) == expected


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\nmodel: m\ndistill: {stage2: {learning_rate: 1e-4}}\n")
    assert load_recipe(path).distill.stage2.learning_rate == 1e-4
    assert load_recipe(path, ["distill.stage2.learning_rate=2e-5"]).distill.stage2.learning_rate == 2e-5


def test_overrides_split_at_the_first_equals_sign() -> None:
    recipe = load_recipe(
        "fashion",
        [
            "model=a=b",
            "distill.stage2.steps=7",
            "checks.max_kl=0.1",
            "evaluate.seeds=[1, 3]",
            "evaluate.seeds.1=2",
        ],
    )
    assert recipe.model == "a=b"
    assert recipe.distill.stage2.steps == 7
    assert recipe.checks is not None and recipe.checks.max_kl == 0.1
    assert recipe.evaluate.seeds == (1, 2)
    assert recipe.distill.stage1 == load_recipe("fashion").distill.stage1


def test_overrides_reach_into_plans() -> None:
    plan = SparsityPlan.dense(TINY, experts=16)
    recipe = Recipe(name="a", model="m", plans={"fast": plan})
    changed = load_recipe(recipe, ["plans.fast.reconstruction_rank=2", "plans.fast.blocks.1.keep=[1, 1, 1, 0.5]"])
    assert changed.plans is not None
    assert changed.plans["fast"].reconstruction_rank == 2
    assert changed.plans["fast"].blocks[1].keep == (1, 1, 1, 0.5)
    assert changed.plans["fast"].blocks[0] == plan.blocks[0]
    assert problems(recipe, ("plans.fast.blocks.9.keep=[1]",)) == [
        "plans.fast.blocks.9.keep: there is no such entry in the recipe"
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("distill.stage2.stpes=3", "distill.stage2.stpes: unknown setting; did you mean distill.stage2.steps?"),
        (
            "steps=3",
            "steps: unknown setting; did you mean distill.stage1.steps or distill.stage2.steps?",
        ),
        ("distill.stage2", "--set distill.stage2: give it as path=value, such as distill.stage2.steps=500"),
        ("experts.count.x=1", "experts.count.x: unknown setting; did you mean experts.count?"),
        ("evaluate.seeds.5=1", "evaluate.seeds.5: there is no such entry in the recipe"),
        ("seed=[", "seed: the value '[' is not valid YAML: line 1, column 2"),
        (
            "description=!!binary aGk=",
            "description: the value '!!binary aGk=' is not valid YAML: line 1, column 1: ",
        ),
        (
            'description="\\ud800"',
            "description: the value '\"\\\\ud800\"' is not valid YAML: 'utf-8' codec can't encode",
        ),
        ("evaluate.images=19", "evaluate.images: given 19, allowed: a whole number of at least 20"),
        ("seed=-1", "seed: given -1, allowed: a whole number of at least 0"),
        ("seed=1.5", "seed: given 1.5, allowed: a whole number of at least 0"),
        ("seed=true", "seed: given true, allowed: a whole number of at least 0"),
        ("budget.reduction=.nan", "budget.reduction: given NaN, allowed: a number of more than 0 and less than 1"),
        ("experts=3", "experts: given 3, allowed: a section with the keys count"),
        ("model=", "model: given null, allowed: text, not empty"),
        ("name=../x", 'name: given "../x", allowed: text of letters'),
    ],
)
def test_wrong_overrides(override: str, said: str) -> None:
    found = problems("fashion", (override,))
    assert len(found) == 1 and found[0].startswith(said)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        name: bad
        modle: fashion
        experts: {count: 24, clustering: kmean}
        distill: {stage1: 5, stage2: {steps: -1, learning_rate: fast}}
        evaluate: {seeds: [1, a], images: 19}
        checks: {}
        """,
    )
    found = problems(path, ("experts.cuont=3", "data.images=''"), config=TINY)
    starts = [
        "experts.cuont: unknown setting; did you mean experts.count?",
        "modle: unknown key; did you mean model?",
        "model: missing, needed: text, not empty",
        'experts.clustering: given "kmean", allowed: one of kmeans, gradient; did you mean kmeans?',
        "distill.stage1: given 5, allowed: a section",
        "distill.stage2.steps: given -1, allowed: a whole number of at least 0",
        'distill.stage2.learning_rate: given "fast", allowed: a number of more than 0',
        'evaluate.seeds[1]: given "a", allowed: a list of whole numbers',
        'data.images: given "", allowed: text, not empty, or null',
        "evaluate.images: given 19, allowed: a whole number of at least 20",
        "checks: no limit given",
        "experts.count: given 24, allowed: a divisor of the 128 hidden neurons of an FFN, such as 16",
    ]
    assert len(found) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in found), f"{start} is not in {found}"


def test_a_wrong_value_in_a_plan_leaves_the_rest_to_be_checked(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        name: bad
        model: m
        default_plan: fats
        plans:
          fast: {experts: 16, blocks: [{prefix: [1], routed: [x], keep: [1]}]}
          slow: {experts: 8, blocks: []}
        """,
    )
    found = problems(path)
    assert any(p.startswith("plans.fast.blocks[0].routed[0]: given") for p in found)
    assert "plans.slow.experts: given 8, allowed: experts.count, 16" in found
    assert any(p.startswith("default_plan: given 'fats', allowed: one of") for p in found)
    assert len(found) == 3


def test_the_models_shape_can_be_looked_up_by_the_recipe() -> None:
    asked = []

    def look_up(recipe: Recipe) -> TransformerConfig:
        asked.append(recipe.model)
        return TINY

    assert problems("fashion", ("experts.count=24",), config=look_up)[0].startswith("experts.count: given 24")
    assert asked == ["fashion"]

    def fail(recipe: Recipe) -> TransformerConfig:
        raise InputError(f"no file {recipe.model}")

    found = problems("fashion", ("experts.cuont=1", "model=x.pth"), config=fail)
    assert found == ["experts.cuont: unknown setting; did you mean experts.count?", "model: no file x.pth"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("fashon", "did you mean 'fashion'"),
        ("missing.yaml", "missing.yaml cannot be read: No such file"),
        ("var_d16.pth", "neither shipped nor a file"),
    ],
)
def test_sources_that_are_not_there(source: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(source)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"a: [1", "not a valid YAML file: line"),
        (b"- 1\n- 2\n", r"holds \[1, 2\] where a section"),
        (b"", "holds null where a section"),
        (b"a: &a [*a]", "not a valid YAML file"),
        (b"name: a\nname: b", "line 2, column 1: key 'name' is given twice"),
        (b"? [1, 2]\n: 3", "not a valid YAML file"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_what_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is a folder without a recipe\.yaml; give a YAML file"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"/dev/null is no file"):
        load_recipe("/dev/null")
    with pytest.raises(RecipeError, match=r"--set =3: give it as path=value"):
        load_recipe("fashion", ["=3"])
