"""Paths as people write them: the home folder in front, a user nobody knows, a folder that is named ``~``."""

from __future__ import annotations

from pathlib import Path

import pytest

import actvar_convert as av
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.recipe.load import dump_recipe, load_recipe
from actvar_convert.system.paths import expanded, path_of

NOBODY = "~nobody-of-this-name/x"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder, from which the test starts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_home_folder_stands_for_a_tilde_in_front_alone(home: Path) -> None:
    assert expanded("~") == str(home) and path_of("~/a/b") == home / "a" / "b"
    for same in ("fashion", "a~/b", "a/~", "./a", ""):
        assert expanded(same) == same
    assert expanded(Path("~/a")) == Path("~/a") and expanded(None) is None


def test_a_folder_named_tilde_is_reached_with_a_dot(home: Path) -> None:
    assert path_of("./~/a") == home / "~" / "a" and expanded(expanded("./~")) == str(home / "~")


def test_an_unknown_user_is_said_everywhere(home: Path) -> None:
    for call in (lambda: av.load(NOBODY), lambda: av.inspect(NOBODY), lambda: av.report_flops(NOBODY)):
        with pytest.raises(InputError, match=r"no user 'nobody-of-this-name' on this machine.*write \./~nobody"):
            call()
    with pytest.raises(RecipeError) as caught:
        load_recipe("fashion", [f"model={NOBODY}", f"data.images={NOBODY}"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["model", "data.images"]
    assert all("no user" in problem for problem in caught.value.problems)


def test_every_path_of_a_recipe_is_expanded_once(home: Path) -> None:
    paths = ["model", "vae", "data.images", "evaluate.reference", "checks.baseline"]
    recipe = load_recipe("fashion", [f"{path}=~/x" for path in paths])
    assert recipe.checks is not None
    found = [recipe.model, recipe.vae, recipe.data.images, recipe.evaluate.reference, recipe.checks.baseline]
    assert found == [str(home / "x")] * len(paths)
    (home / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe("~/again.yaml") == recipe


def test_verbs_read_and_write_there(home: Path) -> None:
    av.sample(av.load("fashion", device="cpu"), labels=[0], out="~/picture.png")
    assert (home / "picture.png").exists() and not (home / "~").exists()
    with pytest.raises(InputError, match=str(home / "model.pth")):
        av.load("~/model.pth")
