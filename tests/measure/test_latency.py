import json

import pytest
import torch

from actvar_convert.cost.flops import count_flops
from actvar_convert.errors import InputError
from actvar_convert.measure import latency
from actvar_convert.measure.components import ComponentClock, split_components, timed_components
from actvar_convert.measure.latency import BenchmarkReport, Timing, benchmark_models
from actvar_convert.models.casting import cast
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.system.progress import SilentProgress

SIDES = (1, 2, 3, 4)
CONFIG = TransformerConfig(depth=2, width=64, heads=2, hidden=128, sides=SIDES, vocab=32, z_channels=8, classes=5)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=SIDES)
BLOCK = BlockPlan(prefix=(8, 8, 2, 2), routed=(0, 0, 2, 2), keep=(1.0, 1.0, 0.7, 0.5))
PLAN = SparsityPlan(experts=8, blocks=(BLOCK, BLOCK), reconstruction_rank=4)


@pytest.fixture(scope="module")
def dense() -> Model:
    torch.manual_seed(0)
    return Model(VARTransformer(CONFIG), VQVAE(TOKENIZER)).eval()


@pytest.fixture(scope="module")
def sparse(dense) -> Model:
    return fresh_sparse(CONFIG, dense.tokenizer, {"plan": PLAN}, "plan").eval()


class CountingProgress(SilentProgress):
    """Counts the steps that a task announces and those it takes."""

    def __init__(self) -> None:
        self.total, self.taken = 0, 0

    def task(self, description, total=None):
        self.total = total
        outer = super().task(description, total)
        counting = self

        class Context:
            def __enter__(self):
                task = outer.__enter__()
                task.advance = lambda n=1: setattr(counting, "taken", counting.taken + n)
                return task

            def __exit__(self, *error):
                return outer.__exit__(*error)

        return Context()


def test_sparse_against_dense(dense, sparse):
    progress = CountingProgress()
    report = benchmark_models(sparse, dense, Timing(batches=(1, 2), repeats=3), progress=progress)
    assert progress.total == progress.taken == 2 * 2 * 4 * 2
    assert [(row.batch, row.with_decoder) for row in report.rows] == [(1, False), (1, True), (2, False), (2, True)]
    priced = count_flops(CONFIG, TOKENIZER, {"plan": PLAN})
    for row in report.rows:
        assert row.promised == pytest.approx(priced.promised_speedup(row.with_decoder))
        assert row.promised > 1
        assert row.speedup == pytest.approx(row.dense_ms / row.sparse_ms)
        assert row.realised_over_promised == pytest.approx(row.speedup / row.promised)
        assert row.dense_images_per_second == pytest.approx(1000 * row.batch / row.dense_ms)
        assert row.sparse_images_per_second == pytest.approx(1000 * row.batch / row.sparse_ms)
        assert row.spread >= 0
        assert row.peak_memory_bytes > 50 * 2**20, "at least the interpreter with torch"
    assert report.plan == "plan" and report.repeats == 3 and report.hardware


def test_json_keeps_its_contract(dense, sparse):
    report = benchmark_models(sparse, dense, Timing(batches=(1,), repeats=1, with_decoder=(True,)))
    given = json.loads(report.to_json())
    assert given["schema"] == "actvar.benchmark/1"
    expected = {"device", "dtype", "batch", "dense_ms", "sparse_ms", "speedup", "promised", "realised_over_promised"}
    assert expected | {"peak_memory_bytes", "with_decoder"} <= set(given["rows"][0])
    assert BenchmarkReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_alone_only_its_own_time_is_filled(request, side):
    report = benchmark_models(
        request.getfixturevalue(side), None, Timing(batches=(1,), repeats=1, with_decoder=(False,))
    )
    row, other = report.rows[0], {"dense": "sparse", "sparse": "dense"}[side]
    assert getattr(row, f"{side}_ms") > 0 and getattr(row, f"{side}_images_per_second") > 0
    assert getattr(row, f"{other}_ms") is None
    assert row.speedup is row.promised is row.realised_over_promised is None
    assert report.plan == ("plan" if side == "sparse" else None)


def test_another_precision_is_measured_on_a_copy(dense, sparse):
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in sparse.state_dict().items()}
    report = benchmark_models(sparse, dense, Timing(batches=(2,), dtypes=("fp32", "bf16"), repeats=1))
    assert [row.dtype for row in report.rows] == ["fp32", "fp32", "bf16", "bf16"]
    after = sparse.state_dict()
    assert all(after[name].dtype == dtype and after[name].equal(value) for name, (dtype, value) in before.items())


def test_a_decoder_of_its_own_dtype_is_measured_on_both_sides(dense, sparse):
    report = benchmark_models(sparse, dense, Timing(batches=(1,), decoder_dtype="bf16", repeats=1))
    assert {(row.dtype, row.decoder_dtype) for row in report.rows} == {("fp32", "bf16")}
    assert sparse.tokenizer.decoder_dtype == torch.float32
    low = cast(sparse, torch.float32, decoder=torch.float16)
    own = benchmark_models(low, dense, Timing(batches=(1,), repeats=1, with_decoder=(True,)))
    assert [row.decoder_dtype for row in own.rows] == ["fp16"]
    with pytest.raises(InputError, match="decoder_dtype: bf8"):
        benchmark_models(sparse, dense, Timing(decoder_dtype="bf8"))


def test_recordings_of_other_batches_are_gone_before_a_row(dense, sparse, monkeypatch):
    events = []
    for side in (dense, sparse):
        monkeypatch.setattr(side.recordings, "clear", lambda: events.append("clear"))
    monkeypatch.setattr(latency, "reset_peak_memory", lambda device: events.append("reset"))
    benchmark_models(sparse, dense, Timing(batches=(1, 2), repeats=1, with_decoder=(False,)))
    assert events == ["clear", "clear", *["reset"] * 4] * 2


def test_all_problems_at_once(dense, sparse):
    other = Model(VARTransformer(TransformerConfig(**CONFIG.model_dump() | {"depth": 1})), dense.tokenizer)
    with pytest.raises(InputError) as error:
        benchmark_models(sparse, other, Timing(batches=(0,), dtypes=("fp64",), repeats=0))
    assert len(error.value.problems) == 4
    for part in ("batches: [0]", "fp64", "repeats: 0", "depth differ"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="made from"):
        benchmark_models(sparse, sparse, Timing())


def test_components_add_up_and_leave_no_trace(dense, sparse):
    for model, own in ((dense, set()), (sparse, {"router", "gate", "reconstruction", "gather and scatter"})):
        attributes = [set(vars(module)) for module in model.modules()]
        times = split_components(model, 2, repeats=2)
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert sum(times.ms.values()) == pytest.approx(times.total_ms)
        common = {"attention", "ffn", "norms and residuals", "adaln", "embedding", "head", "decoder", "sampling"}
        assert set(times.ms) == common | own
        assert all(value > 0 for value in times.ms.values())
    assert times.side == "sparse" and times.batch == 2


def test_timing_changes_no_result(sparse):
    plain = sparse.generate_tokens([0, 1], seed=3)
    with timed_components(sparse):
        timed = sparse.generate_tokens([0, 1], seed=3)
    assert torch.equal(plain, timed)


def test_traces_go_away_after_an_error(sparse):
    def traced() -> list[str]:
        return [name for name, part in sparse.named_modules() if part._forward_hooks or part._forward_pre_hooks]

    before = traced()
    with pytest.raises(InputError), timed_components(sparse):
        assert {"tokenizer.decoder", "transformer.head"} < set(traced())
        sparse.generate([99])
    assert traced() == before == []


def test_clock_charges_the_innermost_component():
    now = iter([0.0, 1.0, 11.0, 111.0])
    clock = ComponentClock(torch.device("cpu"), now=lambda: next(now))
    with clock.running("outer"), clock.running("inner"):
        pass
    assert clock.seconds == {"outer": 1.0 + 100.0, "inner": 10.0}


def test_split_is_part_of_the_report(dense, sparse):
    report = benchmark_models(sparse, dense, Timing(batches=(1,), repeats=1, with_decoder=(True,), split=True))
    assert [times.side for times in report.components] == ["sparse", "dense"]
    assert {times.dtype for times in report.components} == {"fp32"}
