"""Evaluation of a model against its teacher: measures, caching, resuming, the JSON contract."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.measure import image_features
from actvar_convert.measure.agreement import HELD_OUT_SEED
from actvar_convert.measure.distances import feature_distances, pairs_of, summarise
from actvar_convert.measure.evaluation import Evaluation, evaluate_models
from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.measure.image_features import ImageSet, chunks, model_fingerprint
from actvar_convert.measure.latency import Timing
from actvar_convert.measure.quality_report import QualityReport, load_quality
from actvar_convert.models.base import Sampling
from actvar_convert.models.casting import cast
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.models.split import take_dense
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.show.tables import quality_notes

IMAGES, BATCH, HELD_OUT = 40, 8, 12


@pytest.fixture(scope="module")
def extractor() -> ClassifierExtractor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = FashionClassifier(classes=5).eval()
        images = torch.rand(60, 3, 8, 8)
    with torch.inference_mode():
        features = classifier.features(images)
    return ClassifierExtractor(classifier, features, name="tiny", image_size=8)


@pytest.fixture
def other(tiny_model: Model) -> Model:
    """The tiny model with changed weights."""
    model = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            if name.endswith("fc2.weight"):
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.5 * float(weight.std()))
    return model


def evaluate(model: Model, teacher: Model, extractor: ClassifierExtractor | None, **changes: object) -> QualityReport:
    given: dict[str, object] = {"images": IMAGES, "batch": BATCH, "held_out": HELD_OUT, **changes}
    others = {name: given.pop(name) for name in ("sampling", "cache_dir") if name in given}
    settings = Evaluation(**given)
    return evaluate_models(model, teacher, settings, extractor=extractor, **others)


class Counting(ClassifierExtractor):
    """Counts the images that are really measured, and can be told to stop."""

    def __init__(self, inner: ClassifierExtractor, stop_after: int | None = None) -> None:
        features = inner.reference().features_NF
        assert features is not None
        super().__init__(inner.classifier, features, name=inner.name, image_size=8)
        self.seen, self.stop_after = 0, stop_after

    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(image_B3HW)
        return super().__call__(image_B3HW)


def test_a_model_equals_itself(tiny_model: Model, extractor: ClassifierExtractor) -> None:
    report = evaluate(copy.deepcopy(tiny_model), tiny_model, extractor)
    assert report.fid.dense == report.fid.sparse > 0
    assert report.fid.increase == 0 and report.fid.jackknife_error == 0
    assert report.fid.standard_error is None and "one seed set" in report.notes[0]
    assert report.kl.mean == 0 and set(report.kl.per_scale) == {0.0}
    assert report.agreement.top1 == 1 and set(report.agreement.per_scale) == {1.0}
    assert report.precision is not None and report.precision.dense == report.precision.sparse
    assert report.distances is not None and report.distances.feature is not None and report.distances.psnr is None
    for each in (report.distances.pixel, report.distances.feature):
        assert (each.mean, each.standard_error, set(each.quantiles)) == (0, 0, {0.0})


def test_figures_of_two_models(tiny_model: Model, other: Model, extractor: ClassifierExtractor) -> None:
    report = evaluate(other, tiny_model, extractor, seeds=(0, 1))
    assert report.fid.dense != report.fid.sparse
    assert report.fid.dense == pytest.approx(sum(report.fid.dense_per_seed) / 2)
    a, b = ((s - d) / d for d, s in zip(report.fid.dense_per_seed, report.fid.sparse_per_seed, strict=True))
    assert report.fid.increase == pytest.approx((a + b) / 2)
    assert report.fid.standard_error == pytest.approx(abs(a - b) / 2)
    assert report.fid.jackknife_error > 0 and report.notes == ()
    assert report.kl.mean > 0 and 0 < report.agreement.top1 < 1
    assert report.label_agreement is not None and 0 <= report.label_agreement.sparse <= 1
    assert 1 <= report.inception_score.dense <= 5

    labels = balanced_labels(IMAGES, 5)
    image = tiny_model.generate(labels, seed=1, chunk=BATCH)
    _, logits = extractor(image)
    assert report.label_agreement.dense_per_seed[1] == float((logits.argmax(1) == labels).double().mean())


def test_without_images_there_are_kl_and_agreement(
    tiny_model: Model, other: Model, extractor: ClassifierExtractor
) -> None:
    full = evaluate(other, tiny_model, extractor)
    report = evaluate(other, tiny_model, None, images=0)
    assert (report.kl, report.agreement, report.sampling) == (full.kl, full.agreement, full.sampling)
    assert (report.images, report.extractor, report.fid, report.inception_score) == (0, None, None, None)
    assert report.reference is None
    assert (report.precision, report.recall, report.label_agreement) == (None, None, None)
    assert report.notes == ("no images were measured: there is no FID, and nothing else that is measured on images",)
    assert QualityReport.model_validate_json(report.to_json()) == report
    assert report.distances is None


def test_distances_need_no_extractor(tiny_model: Model, other: Model, extractor: ClassifierExtractor) -> None:
    full, report = (evaluate(other, tiny_model, judge) for judge in (extractor, None))
    assert (report.images, report.extractor, report.fid) == (0, None, None)
    assert len(report.notes) == 1 and "--reference" in report.notes[0]
    assert full.distances is not None and report.distances is not None
    assert report.distances.feature is None and report.distances.pixel == full.distances.pixel
    assert QualityReport.model_validate_json(report.to_json()) == report
    old = {name: value for name, value in json.loads(report.to_json()).items() if name != "distances"}
    assert QualityReport.model_validate(old).distances is None


def test_distances_are_those_of_the_pictures(tiny_model: Model, other: Model, extractor: ClassifierExtractor) -> None:
    found = evaluate(other, tiny_model, extractor, seeds=(3, 4)).distances
    labels = balanced_labels(IMAGES, 5)
    dense, sparse = (model.generate(labels, seed=3, chunk=BATCH) for model in (tiny_model, other))
    pixel = ((dense - sparse) ** 2).mean((1, 2, 3)).sqrt().double()
    feature = 1 - torch.cosine_similarity(*(extractor(each)[0].double() for each in (dense, sparse)))
    assert found is not None and found.feature is not None and found.pairs == IMAGES
    for spread, expected in ((found.pixel, pixel), (found.feature, feature)):
        assert spread.mean == pytest.approx(float(expected.mean()), rel=1e-4)
        assert spread.standard_error == pytest.approx(float(expected.std()) / IMAGES**0.5, rel=1e-4)
        assert spread.quantiles == pytest.approx(np.quantile(expected, (0.05, 0.25, 0.5, 0.75, 0.95)), rel=1e-3)
    farthest = pixel.argsort(descending=True)[:8].tolist()
    assert [(each.seed, each.index, each.label) for each in found.worst] == [(3, i, int(labels[i])) for i in farthest]
    assert [each.pixel for each in found.worst] == pytest.approx(pixel[farthest].tolist(), rel=1e-4)
    assert [each.feature for each in found.worst] == pytest.approx(feature[farthest].tolist(), rel=1e-3)


def test_distances_by_hand() -> None:
    found = summarise(torch.tensor([0.1, 0.4, 0.1]), torch.tensor([0.0, 1.0, 0.5]), seed=2, labels=[5, 6, 7])
    assert found.pixel.mean == pytest.approx(0.2) and found.pixel.standard_error == pytest.approx(0.1)
    assert found.psnr == pytest.approx(-20 * np.log10(0.2))
    assert [(each.index, each.label, each.feature) for each in found.worst] == [(1, 6, 1.0), (0, 5, 0.0), (2, 7, 0.5)]
    right_angle, opposite = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [-2.0, 0.0]])
    assert feature_distances(right_angle, opposite).tolist() == pytest.approx([1.0, 2.0])


def test_pairs_are_whole_chunks() -> None:
    sets = (5000, 64), (5000, 100), (40, 64), (5000, 500), (100, 1)
    assert [pairs_of(*each) for each in sets] == [256, 200, 40, 500, 100]


def test_kept_distances_are_those_of_new_pictures(tiny_model: Model, other: Model, tmp_path: Path) -> None:
    plain = evaluate(other, tiny_model, None)
    assert evaluate(other, tiny_model, None, cache_dir=tmp_path) == plain
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert evaluate(other, tiny_model, None, cache_dir=tmp_path) == plain
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert evaluate(other, tiny_model, None, cache_dir=tmp_path, seeds=(1,)).distances != plain.distances


def test_few_images_of_many_classes_are_not_taken_for_others(tiny_model: Model) -> None:
    """Which labels the first images have depends on how many there are, if those are fewer than the classes."""
    sets = [ImageSet(images, 0, 2, tiny_model.sampling) for images in (3, 4, 20, 40)]
    few, more, many, most = (each.key(tiny_model) for each in sets)
    assert few != more and many == most


def test_agreement_is_the_definition(tiny_model: Model, other: Model, extractor: ClassifierExtractor) -> None:
    report = evaluate(other, tiny_model, extractor)
    labels = balanced_labels(HELD_OUT, 5)
    tokens = tiny_model.generate_tokens(labels, seed=HELD_OUT_SEED, chunk=BATCH)
    pyramid = tiny_model.config.schedule
    with torch.inference_mode():
        inputs = tiny_model.teacher_forcing_input(tokens)
        p, q = (m.transformer(labels, inputs).double() for m in (tiny_model, other))
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    assert report.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert report.agreement.top1 == pytest.approx(float(same.mean()))
    for scale in range(pyramid.num_scales):
        part = pyramid.slice(scale)
        assert report.kl.per_scale[scale] == pytest.approx(float(kl[:, part].mean()), rel=1e-4)
        assert report.agreement.per_scale[scale] == pytest.approx(float(same[:, part].mean()))
    assert report.kl.standard_error == pytest.approx(float(kl.mean(1).std()) / HELD_OUT**0.5, rel=1e-4)


def test_guided_predictions_are_compared_as_they_are_sampled(
    tiny_model: Model, other: Model, extractor: ClassifierExtractor
) -> None:
    """With the strength of this evaluation's sampling, not the model's own; not if nothing is guided."""
    sampling = tiny_model.sampling._replace(cfg=3.0)
    report = evaluate(other, tiny_model, extractor, sampling=sampling)
    labels = balanced_labels(HELD_OUT, 5)
    tokens = tiny_model.generate_tokens(
        labels, seed=HELD_OUT_SEED, chunk=BATCH, sampling=tiny_model.sampling_with(cfg=3.0)
    )
    lengths = tiny_model.config.schedule.lengths
    strength = torch.cat([torch.full((n, 1), 3.0 * scale / (len(lengths) - 1)) for scale, n in enumerate(lengths)])
    with torch.inference_mode():
        inputs = tiny_model.teacher_forcing_input(tokens)
        p, q = (
            (1 + strength) * m.transformer(labels, inputs).double()
            - strength * m.transformer(torch.full_like(labels, 5), inputs).double()
            for m in (tiny_model, other)
        )
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert report.guided_kl is not None
    assert report.guided_kl.mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert report.guided_kl.mean != pytest.approx(report.kl.mean, rel=1e-2)
    assert f"of guided predictions {report.guided_kl.mean:.4f}" in " ".join(quality_notes(report))
    assert evaluate(other, tiny_model, extractor, sampling=sampling._replace(cfg=0.0)).guided_kl is None


def test_chunks_are_those_of_one_call(tiny_model: Model) -> None:
    labels = tiny_model.family.balanced(tiny_model.config, 19)
    whole = tiny_model.generate(labels, seed=4, chunk=8)
    parts = [tiny_model.generate(part, seed=seed, chunk=8) for part, seed in chunks(labels, 4, 8)]
    assert [len(part) for part in parts] == [8, 8, 3]
    assert torch.equal(torch.cat(parts), whole)


def test_contract_of_the_json(tiny_model: Model, other: Model, extractor: ClassifierExtractor, tmp_path: Path) -> None:
    sampling = Sampling(cfg=0.5, top_k=20, top_p=0.9)
    report = evaluate(other, tiny_model, extractor, sampling=sampling)
    data = json.loads(report.to_json())
    assert data["schema"] == "actvar.eval/1" and data["images"] == IMAGES and data["seeds"] == [0]
    assert data["sampling"] == {"cfg": 0.5, "top_k": 20, "top_p": 0.9, "chunk": BATCH}
    assert data["extractor"] == "tiny" and data["reference"] == extractor.reference().fingerprint
    assert data["plan"] is None and data["plans"] == {}
    assert {"dense", "sparse", "tokenizer", "standard_error"} <= set(data["fid"])
    for name in ("inception_score", "precision", "recall", "label_agreement"):
        assert {"dense", "sparse"} <= set(data[name])
    assert {"mean", "per_scale"} <= set(data["kl"]) and {"top1", "per_scale"} <= set(data["agreement"])
    path = tmp_path / "eval.json"
    path.write_text(report.to_json())
    assert load_quality(path) == report


def test_generation_in_half_precision(
    tiny_model: Model, other: Model, extractor: ClassifierExtractor, tmp_path: Path
) -> None:
    full = evaluate(other, tiny_model, extractor, cache_dir=tmp_path)
    short = evaluate(other, tiny_model, extractor, dtype="bf16", cache_dir=tmp_path)
    assert (full.dtype, short.dtype) == ("float32", "bfloat16")
    assert short.kl == full.kl and short.fid.dense != full.fid.dense
    assert short.fid.dense == pytest.approx(full.fid.dense, rel=0.5)


def test_wrong_or_missing_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    with pytest.raises(InputError, match=r"eval\.json: cannot be read"):
        load_quality(path)
    path.write_text('{"schema": "actvar.flops/1"}')
    with pytest.raises(InputError) as caught:
        load_quality(path)
    assert any("schema" in problem for problem in caught.value.problems)


def test_stored_features_are_reused_and_an_interruption_costs_one_group(
    tiny_model: Model,
    other: Model,
    extractor: ClassifierExtractor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_features, "GROUP", 2 * BATCH)
    plain = evaluate(other, tiny_model, extractor)
    stopped = Counting(extractor, stop_after=3 * BATCH)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, tiny_model, stopped, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".kept"]
    resumed = Counting(extractor)
    assert evaluate(other, tiny_model, resumed, cache_dir=tmp_path) == plain
    assert resumed.seen == 2 * IMAGES - 2 * BATCH
    again = Counting(extractor)
    assert evaluate(other, tiny_model, again, cache_dir=tmp_path) == plain
    assert again.seen == 0
    more = Counting(extractor)
    evaluate(other, tiny_model, more, cache_dir=tmp_path, seeds=(0, 1))
    assert more.seen == 2 * IMAGES
    changed = copy.deepcopy(other)
    with torch.no_grad():
        changed.transformer.head.bias[0].add_(0.1)
    student_only = Counting(extractor)
    evaluate(changed, tiny_model, student_only, cache_dir=tmp_path)
    assert student_only.seen == IMAGES


def test_damaged_stored_features_are_made_again(
    tiny_model: Model, extractor: ClassifierExtractor, tmp_path: Path
) -> None:
    first = evaluate(tiny_model, tiny_model, extractor, cache_dir=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert evaluate(tiny_model, tiny_model, extractor, cache_dir=tmp_path) == first


def test_tokenizer_figure_belongs_to_one_tokenizer(tiny_model: Model, extractor: ClassifierExtractor) -> None:
    features = extractor.reference().features_NF
    assert features is not None
    known = {state_fingerprint(tiny_model.tokenizer): 1.25}
    knowing = ClassifierExtractor(extractor.classifier, features, name="tiny", image_size=8, tokenizer_distances=known)
    assert knowing.tokenizer_distance(tiny_model.tokenizer) == 1.25
    changed = copy.deepcopy(tiny_model.tokenizer)
    with torch.no_grad():
        changed.quantize.embedding.weight[0].add_(1)
    assert knowing.tokenizer_distance(changed) is None


@pytest.fixture
def sparse(tiny_model: Model) -> Model:
    """The tiny model's weights under two plans, with gates that have learnt nothing."""
    lean = BlockPlan(prefix=(4, 4, 1, 1), routed=(0, 0, 1, 1), keep=(1.0, 1.0, 1.0, 0.5))
    leaner = BlockPlan(prefix=(4, 4, 1, 0), routed=(0, 0, 0, 1), keep=(1.0, 1.0, 0.5, 0.5))
    plans = {name: SparsityPlan(experts=4, blocks=(block,) * 2) for name, block in {"a": lean, "b": leaner}.items()}
    model = fresh_sparse(tiny_model.config, tiny_model.tokenizer, plans, "a").eval()
    missing = take_dense(model.transformer, tiny_model.transformer.state_dict())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.transformer.named_parameters():
        if name in missing:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_plans_are_measured_and_the_model_is_left_as_it_was(
    sparse: Model, tiny_model: Model, extractor: ClassifierExtractor, tmp_path: Path
) -> None:
    report = evaluate(sparse, tiny_model, extractor, plans=["a", "b"], cache_dir=tmp_path)
    assert report.plan == "a" == sparse.plans.name and set(report.plans) == {"b"}
    assert 0 < report.kl.mean < report.plans["b"].kl.mean
    sparse.use_plan("b")
    alone = evaluate(sparse, tiny_model, extractor)
    assert alone.plan == "b" and alone.kl == report.plans["b"].kl and alone.fid == report.plans["b"].fid
    assert alone.fid.sparse != report.fid.sparse


def test_sparse_generation_in_half_precision(sparse: Model, tiny_model: Model, extractor: ClassifierExtractor) -> None:
    full, short = (evaluate(sparse, tiny_model, extractor, dtype=dtype) for dtype in (None, "bf16"))
    assert short.fid.sparse == pytest.approx(full.fid.sparse, rel=0.5) and short.kl == full.kl


def test_fingerprint_follows_weights(tiny_model: Model, other: Model) -> None:
    assert model_fingerprint(tiny_model) == model_fingerprint(copy.deepcopy(tiny_model))
    assert model_fingerprint(tiny_model) != model_fingerprint(other)
    low = cast(tiny_model, torch.float32, decoder=torch.bfloat16)
    assert model_fingerprint(low) != model_fingerprint(tiny_model), "its images are others"
    mixed = copy.deepcopy(tiny_model)
    mixed.tokenizer = VQVAE(tiny_model.tokenizer.config.model_copy(update={"residual_ratio": 0.1}))
    mixed.tokenizer.load_state_dict(tiny_model.tokenizer.state_dict())
    mixed.eval()
    assert not torch.equal(mixed.generate([1]), tiny_model.generate([1]))
    assert model_fingerprint(mixed) != model_fingerprint(tiny_model), "no tensor tells it"


def test_all_problems_are_named_at_once(tiny_model: Model, extractor: ClassifierExtractor) -> None:
    features = extractor.reference().features_NF
    assert features is not None
    large = ClassifierExtractor(FashionClassifier(), features, name="large")
    with pytest.raises(InputError) as caught:
        evaluate(
            tiny_model,
            tiny_model,
            large,
            images=4,
            seeds=(1, 1),
            batch=0,
            held_out=0,
            plans=["lean"],
        )
    text = str(caught.value)
    for expected in ("images: 4", "seeds: [1, 1]", "batch: 0", "held_out: 0", "no plan lean"):
        assert expected in text
    assert "8 x 8 pixels; large knows 32 x 32" in text and "5 classes; large knows 10" in text


@pytest.mark.parametrize(("count", "classes"), [(64, 1000), (256, 1000), (3, 5), (99, 100), (7, 1000)])
def test_few_labels_lie_spread_over_all_classes(count: int, classes: int) -> None:
    labels = balanced_labels(count, classes)
    for part in (labels, labels[: count // 4 + 1]):
        assert len(part.unique()) == len(part) and part.min() >= 0 and part.max() < classes
        gaps = part.sort().values.diff(prepend=torch.tensor([-1]), append=torch.tensor([classes]))
        assert int(gaps.max()) <= 2 * (classes / len(part) + 1)


def test_enough_labels_are_balanced() -> None:
    assert balanced_labels(25, 10).bincount().tolist() == [3] * 5 + [2] * 5


def test_numbers_of_an_evaluation_and_a_timing_are_whole_numbers_of_any_type() -> None:
    assert Evaluation(images=np.int64(20), seeds=np.arange(2)).seeds == (0, 1)
    assert Timing(batches=np.array([1, 4]), repeats=np.int8(2)) == Timing(batches=(1, 4), repeats=2)
    for make in (lambda: Evaluation(images=20.5), lambda: Evaluation(seeds=(0, 1.5)), lambda: Timing(batches=(2.5,))):
        with pytest.raises(InputError, match="must be a whole number, got"):
            make()
