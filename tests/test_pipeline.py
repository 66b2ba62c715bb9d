"""What the public verbs add to the library functions that they call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import actvar_convert as av
from actvar_convert.errors import InputError
from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.casting import cast
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Model
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.origins import Run
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.progress import SilentProgress, Task

TINY = {
    "name": "tiny",
    "model": "tiny",
    "experts": {"count": 8},
    "gate": {"rank": 4},
    "budget": {"reduction": 0.1},
    "calibration": {"pyramids": 4, "batch": 4},
    "data": {"pyramids": 4, "batch": 4},
    "distill": {"stage1": {"steps": 1, "batch": 4}, "stage2": {"steps": 1, "batch": 4}},
}


class Listener(SilentProgress):
    """Keeps the tasks that it hears of, with every advance, and what is said."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int | None, list[int]]] = []
        self.said: list[str] = []

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        steps: list[int] = []
        self.heard.append((description, total, steps))
        with super().task(description, total) as task:
            task.advance = lambda count=1: steps.append(count)  # type: ignore[method-assign]
            yield task

    def say(self, text: str) -> None:
        self.said.append(text)


def test_a_classifier_that_may_know_other_images_is_named_as_such(tiny_model: Model) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = FashionClassifier(classes=5).eval()
        features = torch.randn(40, classifier.feature_dim)
    extractor = ClassifierExtractor(classifier, features, name="tiny classifier", image_size=8)

    def notes() -> tuple[str, ...]:
        settings = av.Evaluation(images=20, held_out=2, batch=20)
        report = av.evaluate(tiny_model, teacher=tiny_model, extractor=extractor, settings=settings)
        assert report.extractor == "tiny classifier" and report.neighbours == 3
        return report.notes

    assert any("the tiny classifier compares with the images it was trained on" in note for note in notes())
    tiny_model.origin = {"name": "fashion"}
    assert not any("trained on" in note for note in notes())


def test_benchmark_takes_what_the_library_takes(tiny_model: Model) -> None:
    timing = av.Timing((1,), repeats=1, with_decoder=(True,), decoder_dtype="bf16", compile=False)
    assert [row.decoder_dtype for row in av.benchmark(tiny_model, timing=timing).rows] == ["bf16"]
    with pytest.raises(InputError, match="CUDA graphs"):
        av.benchmark(tiny_model, timing=replace(timing, compile=True))


def test_a_model_is_loaded_with_its_decoder_in_another_dtype() -> None:
    exact, low = (av.load("fashion", device="cpu", decoder_dtype=name) for name in (None, "bf16"))
    assert (exact.tokenizer.decoder_dtype, low.tokenizer.decoder_dtype) == (torch.float32, torch.bfloat16)
    assert low.origin == exact.origin and low.dtype == torch.float32
    assert torch.equal(low.generate_tokens([3], seed=1), exact.generate_tokens([3], seed=1))
    torch.testing.assert_close(low.generate([3], seed=1), exact.generate([3], seed=1), rtol=0, atol=0.05)


def test_sampling_tells_of_every_chunk(tiny_model: Model) -> None:
    progress = Listener()
    images = av.sample(tiny_model, labels=[0, 1, 4], per_class=2, chunk=4, noise="cpu", progress=progress)
    assert progress.heard == [("generating", 6, [4, 2])]
    assert torch.equal(images, tiny_model.generate([0, 1, 4, 0, 1, 4], chunk=4))


def test_a_finished_distillation_is_found_and_leaves_nothing_beside_it(tiny_model: Model, tmp_path: Path) -> None:
    recipe, out = Recipe.model_validate(TINY), tmp_path / "out"
    start = av.convert(tiny_model, recipe=recipe)
    before = {name: tensor.clone() for name, tensor in start.transformer.state_dict().items()}

    def distilled(recipe: Recipe) -> tuple[dict[str, torch.Tensor], Listener]:
        progress = Listener()
        start.transformer.load_state_dict(before)
        model = av.distill(start, teacher=tiny_model, recipe=recipe, out=out, progress=progress)
        assert model is start and [entry.name for entry in tmp_path.iterdir()] == ["out"]
        return {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}, progress

    first, progress = distilled(recipe)
    assert progress.heard and not progress.said
    assert any(not torch.equal(first[name], tensor) for name, tensor in before.items())
    again, progress = distilled(recipe)
    assert progress.said == [f"{out} holds the result of this distillation already"] and not progress.heard
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    _, progress = distilled(recipe.model_copy(update={"seed": 1}))
    assert progress.heard and not progress.said


def test_a_finished_distillation_of_another_conversion_is_not_taken(tiny_model: Model, tmp_path: Path) -> None:
    recipe, progress = Recipe.model_validate(TINY), Listener()
    other = Recipe.model_validate(TINY | {"experts": {"count": 8, "clustering": "gradient"}})
    for chosen in (recipe, other):
        start = av.convert(tiny_model, recipe=chosen)
        own = start.transformer.blocks[0].ffn.permutation.clone()
        av.distill(start, teacher=tiny_model, recipe=recipe, out=tmp_path / "out", progress=progress)
        stored = av.load(tmp_path / "out", device="cpu")
        assert stored.is_sparse
        for model in (start, stored):
            assert torch.equal(model.transformer.blocks[0].ffn.permutation, own)
    assert not progress.said


def test_a_distillation_that_trains_nothing_samples_nothing(tiny_model: Model, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(TINY | {"distill": {stage: {"steps": 0} for stage in ("stage1", "stage2")}})
    start = av.convert(tiny_model, recipe=recipe)
    before = {name: tensor.clone() for name, tensor in start.transformer.state_dict().items()}
    progress = Listener()
    model = av.distill(start, teacher=tiny_model, recipe=recipe, out=tmp_path / "out", progress=progress)
    assert [(task, total) for task, total, _ in progress.heard] == [
        ("distilling, stage1", 0),
        ("distilling, stage2", 0),
    ]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.transformer.state_dict().items())


def test_what_cannot_be_measured_is_said_first(tiny_model: Model) -> None:
    sparse = av.convert(tiny_model, recipe=Recipe.model_validate(TINY))
    few = av.Evaluation(images=0, held_out=4)
    with pytest.raises(InputError, match="the teacher is sparse"):
        av.evaluate(sparse, teacher=sparse, settings=few)
    with pytest.raises(InputError, match="no image is compared with it if images is 0"):
        av.evaluate(sparse, teacher=tiny_model, settings=few, reference=Path("real"))
    with pytest.raises(InputError, match=r"seeds: \[-1\] given"):
        av.evaluate(sparse, teacher=tiny_model, settings=replace(few, seeds=[-1]))
    with pytest.raises(InputError, match="cfg must be a number"):
        tiny_model.generate([0], sampling=tiny_model.sampling_with(cfg=float("nan")))
    for wrong in ([2**70], [6]):
        with pytest.raises(InputError, match="within 0 to 4"):
            tiny_model.generate(wrong)


def test_what_cannot_be_trained_is_said_first(tiny_model: Model, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(TINY)
    start = av.convert(tiny_model, recipe=recipe)
    half = cast(start, torch.bfloat16)
    with pytest.raises(InputError, match="a training moves them in fp32"):
        av.distill(half, teacher=tiny_model, recipe=recipe, out=tmp_path / "out")
    config = tiny_model.config.model_copy(update={"vocab": 16, "hidden": 64})
    tokenizer = VQVAE(tiny_model.tokenizer.config.model_copy(update={"vocab": 16}))
    with pytest.raises(InputError, match="not made from this teacher") as shapes:
        other, progress = Model(VARTransformer(config), tokenizer), Listener()
        av.distill(start, teacher=other, recipe=recipe, out=tmp_path / "out", progress=progress)
    assert shapes.value.problems == [
        "hidden: the model has 128, its teacher 64",
        "vocab: the model has 32, its teacher 16",
    ]
    assert not progress.heard
    (tmp_path / "images" / "one class").mkdir(parents=True)
    data = recipe.data.model_copy(update={"images": str(tmp_path / "images")})
    wrong = recipe.model_copy(update={"data": data})
    for verb in ("convert", "distill"):
        with pytest.raises(InputError, match=r"data.images: .* holds 1 class folders, the model has 5") as said:
            if verb == "convert":
                av.convert(tiny_model, recipe=wrong, progress=Listener())
            else:
                av.distill(start, teacher=tiny_model, recipe=wrong, out=tmp_path / "out")
        assert "class-per-folder" in str(said.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_may_be_named_from_within(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, here = Recipe.model_validate(TINY), tmp_path / "here"
    av.convert(tiny_model, recipe=recipe, out=here)
    monkeypatch.chdir(here)
    start = av.load(".", device="cpu")
    av.distill(start, teacher=tiny_model, recipe=recipe, out=".")
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]
    assert (here / "metrics.jsonl").is_file() and av.load(here, device="cpu").is_sparse


def test_an_interrupted_conversion_goes_on_from_what_is_kept(tiny_model: Model, tmp_path: Path) -> None:
    budget = {"reduction": 0.1, "pyramids": 4}
    recipe = Recipe.model_validate(TINY | {"budget": budget, "calibration": {"pyramids": 6, "batch": 2}})
    whole, stopped = av.convert(tiny_model, recipe=recipe), Listener()
    searching = stopped.task

    @contextmanager
    def breaking(description: str, total: int | None = None) -> Iterator[Task]:
        with searching(description, total) as task:
            if description == "converting blocks":
                raise KeyboardInterrupt
            yield task

    stopped.task = breaking  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        av.convert(tiny_model, recipe=recipe, work=tmp_path / "work", progress=stopped)
    assert len(list((tmp_path / "work").iterdir())) == 2
    progress = Listener()
    resumed = av.convert(tiny_model, recipe=recipe, work=tmp_path / "work", progress=progress)
    advances = {description: steps for description, _, steps in progress.heard}
    assert advances["sampling from the teacher"] == [6]
    assert advances["searching for a plan"][0] == 4
    expected = whole.transformer.state_dict()
    assert resumed.plans == whole.plans
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.transformer.state_dict().items())


class Stopping(Listener):
    """Stops the work in one of its tasks."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        with super().task(description, total) as task:
            if self.where in description:
                raise KeyboardInterrupt
            yield task


def test_images_replaced_after_an_interruption_are_not_taken_for_the_old_ones(
    tiny_model: Model, tmp_path: Path
) -> None:
    """By the same names, size and time: pyramids, sums of the search and training start anew."""
    folder, work = tmp_path / "images", tmp_path / "work"

    def draw(seed: int) -> None:
        random = np.random.default_rng(seed)
        for label in range(5):
            for i in range(3):
                path = folder / str(label) / f"{i}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
                os.utime(path, (1, 1))

    settings = TINY | {
        "budget": {"reduction": 0.1, "pyramids": 4},
        "data": {"pyramids": 6, "batch": 4, "images": str(folder)},
    }
    recipe = Recipe.model_validate(settings)
    draw(0)
    with pytest.raises(KeyboardInterrupt):
        av.convert(tiny_model, recipe=recipe, work=work, progress=Stopping("converting"))
    draw(1)
    resumed = av.convert(tiny_model, recipe=recipe, work=work)
    fresh = av.convert(tiny_model, recipe=recipe)
    expected = fresh.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.transformer.state_dict().items())

    draw(0)
    with pytest.raises(KeyboardInterrupt):
        av.distill(resumed, teacher=tiny_model, recipe=recipe, out=tmp_path / "out", progress=Stopping("stage"))
    draw(1)
    for out in ("out", "other"):
        av.distill(resumed if out == "out" else fresh, teacher=tiny_model, recipe=recipe, out=tmp_path / out)
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "other")]
    assert weights[0] == weights[1]


def test_images_that_change_between_the_check_and_the_work_end_it(tiny_model: Model, tmp_path: Path) -> None:
    for label in range(5):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (50 * label, 0, 0)).save(tmp_path / "images" / str(label) / "0.png")
    settings = TINY | {"data": {"pyramids": 5, "batch": 4, "images": str(tmp_path / "images")}}
    recipe = Recipe.model_validate(settings)
    run = Run.of(tiny_model, recipe)
    student = av.convert(tiny_model, recipe=recipe, run=run)
    Image.new("RGB", (8, 8), (0, 99, 0)).save(tmp_path / "images" / "2" / "0.png")
    with pytest.raises(InputError, match=r"2/0\.png: the image was changed while it was in use; run the command again"):
        av.distill(student, teacher=tiny_model, recipe=recipe, out=tmp_path / "out", run=run)
    assert not (tmp_path / "out").exists()
