import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml
from rich.console import Console

from actvar_convert.cost.flops import FlopsReport, count_flops
from actvar_convert.measure.components import ComponentTimes
from actvar_convert.measure.distances import summarise
from actvar_convert.measure.latency import BenchmarkReport, BenchmarkRow
from actvar_convert.measure.quality_report import (
    AgreementQuality,
    FidQuality,
    KLQuality,
    Paired,
    QualityReport,
    SamplingSettings,
)
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.show.card import model_card, plan_in_words
from actvar_convert.show.charts import Series, line_chart, thinned
from actvar_convert.show.figures import MISSING, Table, Unit, change, label, share
from actvar_convert.show.html import flops_html, report_html
from actvar_convert.show.tables import (
    Reports,
    benchmark_tables,
    flops_figures,
    flops_tables,
    inspection_table,
    quality_tables,
    summary_table,
)
from actvar_convert.show.terminal import render
from actvar_convert.system.progress import digits

SIDES = (1, 2, 4)
CONFIG = TransformerConfig(depth=3, width=64, heads=2, hidden=256, sides=SIDES, vocab=32, z_channels=8, classes=5)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=SIDES)


def plan(keep: float) -> SparsityPlan:
    dense = BlockPlan(prefix=(8, 8, 3), routed=(0, 0, 2), keep=(1.0, 1.0, 1.0))
    gated = BlockPlan(prefix=(8, 8, 2), routed=(0, 0, 2), keep=(1.0, 1.0, keep))
    return SparsityPlan(experts=8, blocks=(dense, gated, gated), reconstruction_rank=4)


@pytest.fixture(scope="module")
def flops() -> FlopsReport:
    return count_flops(CONFIG, TOKENIZER, {"first": plan(0.5), "second": plan(0.75)}, "first")


def paired(dense: float, sparse: float) -> Paired:
    return Paired(dense=dense, sparse=sparse, dense_per_seed=(dense,), sparse_per_seed=(sparse,))


@pytest.fixture(scope="module")
def quality() -> QualityReport:
    fid = FidQuality(
        **paired(2.5, 2.57).model_dump(), tokenizer=1.1, increase=0.028, standard_error=None, jackknife_error=0.006
    )
    return QualityReport(
        fid=fid,
        inception_score=paired(8.1, 8.05),
        precision=paired(0.81, 0.8),
        recall=None,
        label_agreement=paired(0.93, 0.928),
        kl=KLQuality(mean=0.0345, per_scale=(0.0012, 0.0101, 0.0399), standard_error=0.001, pyramids=512),
        agreement=AgreementQuality(top1=0.91, per_scale=(0.99, 0.95, 0.9)),
        images=5000,
        seeds=(0, 1),
        sampling=SamplingSettings(cfg=1.5, top_k=0, top_p=0.0, chunk=64),
        dtype="fp32",
        extractor="a <classifier>",
        plan="first",
        notes=("one note & another",),
    )


def row(batch: int, with_decoder: bool, **values) -> BenchmarkRow:
    both = {"dense_ms": 100.0 * batch, "sparse_ms": 80.0 * batch}
    both |= {"dense_images_per_second": 10.0, "sparse_images_per_second": 12.5}
    ratios = {"speedup": 1.25, "promised": 1.4, "realised_over_promised": 1.25 / 1.4}
    measured = both | ratios | values
    return BenchmarkRow(
        device="cpu", dtype="fp32", batch=batch, with_decoder=with_decoder, spread=0.02, peak_memory_bytes=2**30
    ).model_copy(update=measured)


def benchmark_of(*rows: BenchmarkRow, components=None) -> BenchmarkReport:
    return BenchmarkReport(
        plan="first", hardware="two cores", threads=2, torch="2", repeats=5, rows=rows, components=components
    )


@pytest.fixture(scope="module")
def benchmark() -> BenchmarkReport:
    times = (ComponentTimes(batch=16, dtype="fp32", side="sparse", ms={"ffn": 40.0, "gate": 2.0}, total_ms=42.0),)
    rows = [row(batch, decoder) for batch in (1, 16) for decoder in (False, True)]
    return benchmark_of(*rows, components=times)


def printed(*tables: Table, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render(*tables))
    return console.file.getvalue()


def figures(text: str, name: str) -> list[str]:
    """The columns of the first line of a table that begins with a name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())


def test_what_was_measured_without_images_is_shown_without_them(flops, quality):
    absent = dict.fromkeys(("fid", "inception_score", "precision", "recall", "label_agreement", "extractor"))
    report = quality.model_copy(update={**absent, "images": 0, "plans": {"second": quality.model_copy(update=absent)}})
    table = printed(*quality_tables(report), width=120)
    assert figures(table, "second") == ["second", MISSING, MISSING, MISSING, "0.0345", "91.0 %"]
    assert "0.0399" in table and "inception" not in table and "classifier" not in table
    both = Reports(flops, report)
    shown = [table, printed(summary_table(both)), report_html(both), model_card("m", both)]
    for text in shown:
        assert "None" not in text
    for text in (*shown[:1], *shown[2:]):
        said = " ".join(text.split())
        assert "KL to the dense model 0.0345" in said and "Held-out pyramids sampled with guidance 1.5" in said
    assert "<h3>Images" not in shown[2] and "| FID" not in shown[3] and "FID," not in shown[1]


def test_flops_table(flops):
    text = printed(*flops_tables(flops))
    unit = Unit.of(flops.dense.end_to_end.flops)
    for name in ("attention projections", "FFN", "router", "gate", "reconstruction", "AdaLN", "head", "VQVAE decoder"):
        assert figures(text, name)[0] == name
    dense, sparse = flops.dense.transformer, flops.sparse.transformer
    shown = [unit.show(value) for value in (dense.flops, dense.macs, sparse.flops, sparse.macs)]
    assert figures(text, "transformer") == ["transformer", *shown, change(dense.flops, sparse.flops)]
    assert figures(text, "2 ")[1:3] == ["4x4", "16"], "the last scale has a line with its map"
    assert figures(text, "second")[2:] == [
        share(flops.plans["second"].reduction.transformer),
        share(flops.plans["second"].reduction.end_to_end),
    ]
    assert "2 FLOPs" in text.replace("\n", " ") and "not counted" in text
    assert "…" not in text, "nothing is cut off at 80 columns"


def test_flops_table_of_a_dense_model():
    text = printed(*flops_tables(count_flops(CONFIG)))
    assert "sparse" not in text and "end to end" not in text
    assert len(figures(text, "transformer")) == 3


def test_quality_table(quality):
    text = printed(*quality_tables(quality))
    assert figures(text, "FID") == ["FID", "2.500", "2.570", "+2.8 %"]
    assert figures(text, "1 ") == ["1", "0.0101", "95.0 %"]
    assert figures(text, "mean") == ["mean", "0.0345", "91.0 %"]
    assert "recall" not in text, "what was not measured has no line"
    assert "0.60 percentage points" in text and "one note & another" in text
    nested = quality.model_copy(update={"plans": {"second": quality}})
    assert figures(printed(*quality_tables(nested)), "second")[1:3] == ["2.500", "2.570"]


def test_distances_are_shown_with_the_pairs_to_look_at(flops, quality):
    pixel, feature = torch.tensor([0.1, 0.4, 0.1]), torch.tensor([0.0, 1.0, 0.5])
    report = quality.model_copy(update={"distances": summarise(pixel, feature, seed=7, labels=[0, 1, 2])})
    text = printed(*quality_tables(report))
    assert figures(text, "pixels (RMSE)")[1:6] == ["0.2000", "0.1000", "0.1000", "0.1000", "0.1000"]
    assert figures(text, "features (1 - cosine)")[1] == "0.5000" and "…" not in text
    both = Reports(flops, report)
    for shown in (text, report_html(both), model_card("m", both)):
        said = " ".join(shown.split())
        assert "3 pictures lie 0.2000 from the dense model" in said and "14.0 dB" in said
        assert "Farthest apart of seed 7: 1 (label 1, 0.400), 0 (label 0, 0.100)" in said
    assert figures(printed(summary_table(both)), "pixel distance") == [
        "pixel distance to the dense model's picture",
        MISSING,
        digits(0.2),
        MISSING,
    ]
    equal = quality.model_copy(update={"distances": summarise(torch.zeros(3), None, seed=7)})
    text = printed(*quality_tables(equal))
    assert "features (" not in text and "PSNR" not in text and "Farthest" not in text and "None" not in text


def test_benchmark_table(benchmark):
    text = printed(*benchmark_tables(benchmark))
    expected = ["fp32", "16", "1,600.0", "1,280.0", "12.50", "1.25x", "1.40x", "0.89", "2.0 %", "1.1 GB"]
    assert figures(text, "fp32") == ["fp32", "1", "100.0", "80.00", *expected[4:]]
    assert expected in [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert "latency with decoder in fp32, cpu, plan first" in text and "latency of tokens alone" in text
    assert figures(text, "FFN") == ["FFN", "40.00"] and figures(text, "total") == ["total", "42.00"]
    assert "…" not in text


def test_benchmark_of_one_side():
    alone = row(1, True, dense_ms=None, speedup=None, promised=None, realised_over_promised=None)
    alone = alone.model_copy(update={"dense_images_per_second": None})
    text = printed(*benchmark_tables(benchmark_of(alone)))
    assert "graphs" not in text, "there are none on a CPU"
    assert figures(text, "fp32")[2:8] == ["–", "80.00", "12.50", "–", "–", "–"]  # noqa: RUF001


@pytest.mark.parametrize(
    ("recorded", "said"),
    [(("fp32", "bf16"), "CUDA graphs, plan"), (("bf16",), "graphs in bf16 alone, plan"), ((), "no CUDA graphs, plan")],
)
def test_a_gpu_says_what_was_recorded(recorded, said):
    rows = [
        row(1, True, device="cuda:0", dtype=dtype, graphs=dtype in recorded, decoder_dtype="bf16")
        for dtype in ("fp32", "bf16")
    ]
    text = printed(*benchmark_tables(benchmark_of(*rows)))
    assert "latency with decoder in bf16, cuda:0, " in text and said in text and "…" not in text


def test_summary_is_one_table_of_what_was_measured(flops, quality, benchmark):
    text = printed(summary_table(Reports(flops, quality, benchmark)))
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["FID, 5000 images", "2.500", "2.570", "+2.8 %"] in lines
    seconds = [line for line in lines if line[0].startswith("seconds per image")]
    assert [line[1:] for line in seconds] == [["0.100", "0.0800", "-20.0 %"]] * 2
    assert seconds[0][0] == "seconds per image with decoder, batch 16 fp32 cpu"
    assert sum("FLOPs per image" in line[0] for line in lines) == 2
    told = {line[0]: line[1:] for line in lines}
    assert told["KL to the dense model, nats per token"] == [MISSING, digits(quality.kl.mean), MISSING]
    assert told["likeliest token as in the dense model"] == [MISSING, share(quality.agreement.top1), MISSING]

    alone = printed(summary_table(Reports(flops)))
    assert "FID" not in alone and "seconds" not in alone


def test_csv_holds_every_figure(flops):
    rows = list(csv.DictReader(io.StringIO(flops_figures(flops).to_csv())))
    assert {row["plan"] for row in rows} == {"", "first", "second"}
    for name, model in (("", flops.dense), ("first", flops.sparse), ("second", flops.plans["second"].sparse)):
        own = [row for row in rows if row["plan"] == name]
        assert all(int(row["flops"]) == 2 * int(row["macs"]) for row in own)

        def total(part: str, own=own) -> int:
            return sum(int(row["macs"]) for row in own if row["part"] == part)

        assert total("component") == model.end_to_end.macs
        assert total("scale") == sum(scale.macs for scale in model.per_scale)
        assert total("block") == sum(block.macs for block in model.per_block)
        cells = [row for row in own if row["part"] == "cell"]
        assert len(cells) == 9
        assert int(cells[-1]["macs"]) == model.per_block[-1].scales[-1].macs


def test_inspection_shows_fields_and_shortens_lists():
    text = printed(
        inspection_table(
            {
                "schema": "actvar.inspect/1",
                "kind": "VAR",
                "config": {"depth": 16, "sides": [1, 2, 3]},
                "missing": [f"blocks.{i}" for i in range(30)],
                "unexpected": [],
                "finite": True,
                "guess": None,
                "mismatched": [{"name": "head", "shape": [1, 2]}],
            }
        )
    )
    assert figures(text, "config.depth") == ["config.depth", "16"]
    assert figures(text, "config.sides") == ["config.sides", "1, 2, 3"]
    assert "blocks.19" in text and "blocks.20" not in text and "and 10 more" in text
    assert "unexpected" not in text and "guess" not in text
    assert "schema" not in text
    assert figures(text, "finite") == ["finite", "yes"]
    assert "name head, shape 1, 2" in text


class Page(HTMLParser):
    """Collects the elements of a page and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe"}
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    assert "prefers-color-scheme: dark" in text and "http" not in text and "url(" not in text
    return page


def test_flops_page(flops):
    text = flops_html(flops)
    page = assert_self_contained(text)
    cells = [attributes for tag, attributes in page.tags if tag == "td" and "--depth" in attributes.get("style", "")]
    assert len(cells) == 2 * 3 * 3, "two maps of three blocks and three scales"
    assert any("50.0 % of the tokens" in cell["title"] for cell in cells)
    bars = [attributes for tag, attributes in page.tags if attributes.get("class", "").startswith("bar s")]
    assert max(float(re.search(r"width:([\d.]+)%", bar["style"]).group(1)) for bar in bars) == 100.0
    left = flops.sparse.per_block[2].scales[2].macs / flops.dense.per_block[2].scales[2].macs
    assert f"{100 * left:.0f} %" in text
    assert "second" in text

    dense = flops_html(count_flops(CONFIG))
    maps = [attributes for tag, attributes in Page(dense).tags if "--depth" in attributes.get("style", "")]
    assert len(maps) == 9 and "sparse" not in dense.split("</style>")[1]


def test_report_page(flops, quality, benchmark):
    metrics = [{"stage": "stage1", "step": step, "loss": 1 / (step + 1), "learning_rate": 1e-4} for step in range(50)]
    metrics += [{"stage": "stage2", "step": 0, "loss": 0.3, "per_scale": [1.0, 2.0]}]
    text = report_html(Reports(flops, quality, benchmark), metrics, title="A & B", samples_png=b"\x89PNG")
    page = assert_self_contained(text)
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert charts == ["stage1 loss: loss from 1 to 0.02"]
    assert "<h1>A &amp; B</h1>" in text
    assert "a &lt;classifier&gt;" in text and "one note &amp; another" in text
    assert "data:image/png;base64,iVBORw==" in text
    assert "2.570" in text and "1.25x" in text and "0.0399" in text

    alone = report_html(Reports(flops))
    assert_self_contained(alone)
    assert "Quality" not in alone and "Latency" not in alone and "Distillation" not in alone


def test_line_chart_leaves_out_what_is_not_finite_and_thins_long_series():
    points = [(float(i), float(i + 1)) for i in range(1000)]
    assert len(thinned(points)) == 200
    assert thinned(points)[0] == (2.0, 3.0)
    chart = line_chart("x", [Series("a", [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0)])])
    assert len(re.search(r'points="([^"]*)"', chart).group(1).split()) == 2
    assert line_chart("x", [Series("a", [(0.0, float("inf"))])]) == ""
    flat = line_chart("x", [Series("a", [(0.0, 2.0), (1.0, 2.0)])])
    assert flat.count('class="grid"') == 1


def front_matter(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2) if card.count("---\n") >= 2 else card.split("---", 2)
    return yaml.safe_load(matter)


def test_model_card(flops, quality, benchmark):
    card = model_card(
        "small",
        Reports(flops, quality, benchmark),
        plan=plan(0.5),
        base_model="var-d16",
        repository="FoundationVision/var",
        provenance={"source sha256": "ab12"},
    )
    matter = front_matter(card)
    assert matter["library_name"] == "actvar-convert" and matter["license"] == "mit"
    assert matter["base_model"] == "FoundationVision/var" and "sparse" in matter["tags"]
    assert "# small\n" in card and "av.load(" in card and "- source sha256: `ab12`" in card
    assert "| FID, 5000 images | 2.500 | 2.570 | +2.8 % |" in card
    assert card.count("| FID") == 1
    assert share(flops.reduction.transformer) in card

    bare = model_card("small", Reports(flops), base_model="models/var.pth")
    assert "base_model" not in front_matter(bare) and "`models/var.pth`" in bare
    assert "FID" not in bare and "seconds" not in bare and "Provenance" not in bare


def test_plan_in_words():
    experts, gate = plan_in_words(plan(0.5))
    assert "split into 8" in experts and "from scale 2 on, 3 blocks" in experts and "4 at the least" in experts
    assert "2 blocks compute" in gate and "scales 2" in gate and "50.0 %" in gate and "rank 4" in gate
    *others, guidance = plan_in_words(plan(0.5).model_copy(update={"guidance": "folded"}))
    assert others == [experts, gate] and "one row" in guidance
    assert plan_in_words(SparsityPlan.dense(CONFIG)) == ["Nothing: the plan runs every expert for every token."]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0, "0"), (1234.56, "1,234.6"), (12.345, "12.35"), (1.2345, "1.234"), (0.0123, "0.0123"), (1e-5, "1e-05")],
)
def test_digits(given, expected):
    assert digits(given) == expected


def test_words_and_units():
    assert (share(0.212), share(None)) == ("21.2 %", "–")  # noqa: RUF001
    assert (change(2, 1.5), change(2, 2.0000001), change(0, 1)) == ("-25.0 %", "0.0 %", "–")  # noqa: RUF001
    assert label("vqvae_decoder") == "VQVAE decoder" and label("ffn") == "FFN"
    assert [Unit.of(value).prefix for value in (0, 5, 5e3, 1.5e9, 5e9, 5e12)] == ["", "", "k", "M", "G", "T"]
    assert json.loads(json.dumps(Unit.of(5e9).show(5.4321e9))) == "5.432"
