"""Two processes do what one does: the same losses, the same files, and either goes on where the other stopped.

The file is also the program of the processes, started once for all tests: ``python test_processes.py FOLDER``.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from actvar_convert import verbs
from actvar_convert.conversion.budget import uniform_plan
from actvar_convert.distillation import loop
from actvar_convert.distillation.data import Making, TokenStore, store_from_teacher
from actvar_convert.distillation.loop import Upkeep, distill_model
from actvar_convert.distillation.training_memory import estimate_distill
from actvar_convert.errors import InputError, Interrupted, RecipeError
from actvar_convert.files.layout import official_config
from actvar_convert.files.sparse_folder import load_sparse
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import (
    BudgetRecipe,
    CalibrationRecipe,
    DataRecipe,
    DistillRecipe,
    ExpertsRecipe,
    GateRecipe,
    JointStage,
    Recipe,
    StageRecipe,
)
from actvar_convert.runs import run
from actvar_convert.system.atomic import CHECKSUM_BYTES
from actvar_convert.system.device import end_process
from actvar_convert.system.locks import OWNER, Owner
from actvar_convert.system.processes import ALONE, Processes, join
from actvar_convert.system.progress import MetricsLog, SilentProgress

sys.path.insert(0, str(Path(__file__).parents[1]))  # it starts itself as a script too
from conftest import convert_with, gated_plan

STEPS = 5
STOPS = (3, 8)
"""Steps after which runs are stopped: in the first stage, in the second."""
SIDES = (1, 2, 3, 4)


class Setting(NamedTuple):
    """What one run needs; equal in all processes."""

    teacher: Model
    student: Model
    recipe: Recipe
    store: TokenStore


def recipe(plans: str = "default", **stage2: object) -> Recipe:
    """Both stages; 7 pyramids a step do not divide by two."""
    short: dict[str, object] = {"steps": STEPS, "batch": 7, "warmup": 2, "learning_rate": 1e-3}
    return Recipe(
        name="tiny",
        model="tiny",
        experts=ExpertsRecipe(count=8),
        calibration=CalibrationRecipe(pyramids=14, batch=7),
        budget=BudgetRecipe(reduction=0.25, gate_keep=0.6),
        gate=GateRecipe(rank=4),
        data=DataRecipe(pyramids=14, batch=3),
        distill=DistillRecipe(plans=plans, stage1=StageRecipe(**short), stage2=JointStage(**(short | stage2))),
    )


RECIPES = {
    "all": recipe(),
    "lora": recipe(trainable="lora"),
    "elastic": recipe(plans="random"),
}


def setting(name: str, shared_adaln: bool = False) -> Setting:
    """A small teacher and a fresh copy of its converted student, the same in every process."""
    made = converted(name, shared_adaln)
    return made._replace(student=copy.deepcopy(made.student))


@functools.cache
def converted(name: str, shared_adaln: bool) -> Setting:
    config = TransformerConfig(
        depth=2, width=32, heads=2, hidden=64, sides=SIDES, vocab=32, z_channels=8, classes=5, shared_adaln=shared_adaln
    )
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1, 2), res_blocks=1, vocab=32, z_channels=8, sides=SIDES)
    torch.manual_seed(0)
    transformer = VARTransformer(config)
    transformer.initialise(torch.Generator().manual_seed(0))
    for parameter in transformer.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    teacher = Model(transformer, VQVAE(tokenizer)).eval().requires_grad_(False)
    labels = torch.arange(14) % 5
    store = TokenStore(teacher, teacher.generate_tokens(labels, seed=1), labels)
    chosen = RECIPES[name]
    plans = {"plan": gated_plan(uniform_plan(config, chosen))}
    if chosen.distill.plans == "random":
        gentle = chosen.model_copy(update={"budget": BudgetRecipe(reduction=0.1)})
        plans["gentle"] = uniform_plan(config, gentle)
    student = convert_with(teacher, plans, "plan", chosen, store.tokens.long(), store.condition.values)
    return Setting(teacher, student, chosen, store)


def train(given: Setting, folder: Path, processes: Processes = ALONE, stop_after: int = 0) -> Model:
    """Runs both stages; after ``stop_after`` steps the last process gets a Ctrl-C."""
    taken, original = 0, loop.StageRun.train_step

    def stopping(self: loop.StageRun, *args: object) -> dict[str, float]:
        nonlocal taken
        taken += 1
        if taken == stop_after and processes.rank == processes.count - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)  # type: ignore[arg-type]

    log = MetricsLog(folder / "metrics.jsonl") if processes.main else None
    loop.StageRun.train_step = stopping  # type: ignore[method-assign, assignment]
    try:
        distill_model(
            given.student,
            given.teacher,
            given.recipe,
            given.store,
            Upkeep(SilentProgress(), log, folder / "state.safetensors", "run"),
            processes=processes,
        )
    finally:
        loop.StageRun.train_step = original  # type: ignore[method-assign]
        if log is not None:
            log.close()
    return given.student


def sample(folder: Path, processes: Processes) -> TokenStore:
    """Ten pyramids in parts of three, the first four of them there already, torn."""
    teacher = setting("all").teacher
    path = folder / "tokens.bin"
    return store_from_teacher(teacher, 10, Making(3, 3, SilentProgress(), path, processes))


def convert_and_distill(folder: Path) -> Model:
    """The public verbs, from the teacher's samples to sparse folders."""
    given = setting("all")
    sparse = verbs.convert(given.teacher, recipe=given.recipe, out=folder / "converted")
    return verbs.distill(sparse, teacher=given.teacher, recipe=given.recipe, out=folder / "distilled")


def convert_searched(folder: Path) -> Model:
    """A conversion whose plan is found by a search, on three batches of calibration pyramids."""
    chosen = RECIPES["all"]
    searched = chosen.model_copy(
        update={
            "calibration": CalibrationRecipe(pyramids=14, batch=5),
            "budget": BudgetRecipe(reduction=0.25, gate_keep=0.6),
        }
    )
    return verbs.convert(setting("all").teacher, recipe=searched, out=folder / "searched")


class Scenario(NamedTuple):
    """One thing that the processes do together."""

    recipe: str
    shard: bool = False
    stop_after: int = 0
    shared_adaln: bool = False


SCENARIOS = {
    "copied": Scenario("all"),
    "sharded": Scenario("all", shard=True),
    "sharded-lora-shared-adaln": Scenario("lora", shard=True, shared_adaln=True),
    "sharded-elastic": Scenario("elastic", shard=True),
    **{f"copied-stop{n}": Scenario("all", stop_after=n) for n in STOPS},
    f"sharded-stop{STOPS[1]}": Scenario("all", shard=True, stop_after=STOPS[1]),
    **{f"copied-on{n}": Scenario("all") for n in STOPS},
    f"sharded-on{STOPS[0]}": Scenario("all", shard=True),
}


def main(folder: Path) -> None:
    """What each of the two processes does."""
    both = join(torch.device("cpu"))
    split = join(torch.device("cpu"), shard=True)
    assert (both.count, both.rank, both.shard, split.shard) == (2, int(os.environ["RANK"]), False, True)
    for name, scenario in SCENARIOS.items():
        given = setting(scenario.recipe, scenario.shared_adaln)
        try:
            model = train(given, folder / name, split if scenario.shard else both, scenario.stop_after)
        except Interrupted as stopped:
            (folder / name / f"stopped-{both.rank}").write_text(str(stopped))
            continue
        torch.save(model.transformer.state_dict(), folder / name / f"weights-{both.rank}.pt")
    store = sample(folder / "sampling", both)
    torch.save(store.tokens, folder / "sampling" / f"tokens-{both.rank}.pt")
    model = convert_and_distill(folder / "verbs")
    torch.save(model.transformer.state_dict(), folder / "verbs" / f"weights-{both.rank}.pt")
    convert_searched(folder / "verbs")
    copied = torch.full((2, 3), float(both.rank)).t()
    both.copy_from_main([copied])
    assert copied.eq(0).all() and both.from_main(both.rank) == 0 and both.gather(both.rank) == [0, 1]
    one = TokenStore(given.teacher, given.store.tokens[:1], given.store.condition.values[:1])
    with pytest.raises(InputError, match="2 processes share every batch"):
        train(given._replace(store=one), folder / "few", both)
    whole = given.recipe.distill.stage2.model_copy(update={"optimizer": "muon"})
    chosen = given.recipe.model_copy(update={"distill": given.recipe.distill.model_copy(update={"stage2": whole})})
    with pytest.raises(InputError, match=r"no whole matrices.*\n.*distill\.stage2\.optimizer: given muon"):
        train(given._replace(recipe=chosen), folder / "few", split)
    for refuse in (
        lambda out: verbs.distill(given.student, teacher=given.teacher, recipe=chosen, out=out, shard=True),
        lambda out: run("fashion", out=out, shard=True),
    ):
        with pytest.raises(RecipeError, match=r"distill\.stage2\.optimizer: given muon, allowed: adamw"):
            refuse(folder / "whole")
    assert not list(folder.glob("whole*"))
    if both.main:
        (folder / "held.work").mkdir()
        owner = asdict(replace(Owner.here(), host="node7"))
        (folder / "held.work" / OWNER).write_text(json.dumps(owner))
    both.wait()
    with pytest.raises(InputError, match="of the host node7"):
        verbs.distill(given.student, teacher=given.teacher, recipe=given.recipe, out=folder / "held")
    both.wait()
    assert [entry.name for entry in (folder / "held.work").iterdir()] == [OWNER]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the two processes have one each; sums in another order would differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of everything that one process and two processes did."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, stop in ((name, stop) for name in SCENARIOS for stop in STOPS if name.endswith(f"-on{stop}")):
        with pytest.raises(Interrupted):
            train(setting("all"), folder / name, stop_after=stop)
    (folder / "sampling").mkdir()
    (folder / "sampling" / "tokens.bin").write_bytes(sample_alone(folder / "alone").read_bytes()[: 4 * 30 + 7])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return folder


def sample_alone(folder: Path) -> Path:
    """The file that one process makes."""
    sample(folder, ALONE)
    return folder / "tokens.bin"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Folder of what one process does from beginning to end, by recipe."""
    made: dict[tuple[str, bool], Path] = {}

    def run(name: str, shared_adaln: bool) -> Path:
        if (name, shared_adaln) not in made:
            folder = tmp_path_factory.mktemp("alone")
            torch.save(train(setting(name, shared_adaln), folder).transformer.state_dict(), folder / "weights-0.pt")
            made[name, shared_adaln] = folder
        return made[name, shared_adaln]

    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Every number of every step to 1e-5."""
    found, expected = lines(folder), lines(reference)
    assert len(expected) == 2 * STEPS and {"output", "router"} <= expected[0].keys()
    assert {"kl", "hidden"} <= expected[-1].keys() and any("gate" in line for line in expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.pop("stage") == other.pop("stage") and one.pop("plan", None) == other.pop("plan", None)
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if not scenario.stop_after])
def test_two_processes_give_the_losses_of_one(runs: Path, alone: Callable[[str, bool], Path], name: str) -> None:
    scenario = SCENARIOS[name]
    reference = alone(scenario.recipe, scenario.shared_adaln)
    assert_same_run(runs / name, reference)
    expected = torch.load(reference / "weights-0.pt")
    for rank in range(2):
        found = torch.load(runs / name / f"weights-{rank}.pt")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert type(tensor) is torch.Tensor
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.stop_after])
def test_one_process_goes_on_where_two_stopped(runs: Path, alone: Callable[[str, bool], Path], name: str) -> None:
    folder, stop = runs / name, SCENARIOS[name].stop_after
    said = [(folder / f"stopped-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] and f"after step {(stop - 1) % STEPS + 1} of {STEPS}" in said[0]
    assert len(lines(folder)) == stop
    train(setting("all"), folder)
    assert_same_run(folder, alone("all", False))


def test_sampling_by_two_ends_with_the_file_of_one(runs: Path) -> None:
    expected = (runs / "alone" / "tokens.bin").read_bytes()
    part = CHECKSUM_BYTES + 3 * 30
    rows = b"".join(expected[begin + CHECKSUM_BYTES : begin + part] for begin in range(0, len(expected), part))
    assert len(rows) == 10 * 30
    assert (runs / "sampling" / "tokens.bin").read_bytes() == expected
    for rank in range(2):
        tokens = torch.load(runs / "sampling" / f"tokens-{rank}.pt")
        assert tokens.numpy().astype("uint8").tobytes() == rows


def test_two_processes_write_the_folders_of_one(runs: Path, tmp_path: Path) -> None:
    convert_and_distill(tmp_path)
    for name, tolerance in (("converted", 0.0), ("distilled", 1e-4)):
        expected = load_sparse(tmp_path / name).transformer.state_dict()
        found = load_sparse(runs / "verbs" / name).transformer.state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    for rank in range(2):
        weights = torch.load(runs / "verbs" / f"weights-{rank}.pt")
        assert all(torch.equal(weights[key], tensor) for key, tensor in found.items())
    assert len(lines(runs / "verbs" / "distilled")) == 2 * STEPS


def test_two_processes_find_the_plan_of_one(runs: Path, tmp_path: Path) -> None:
    """Each measures gradients on batches of its own; their sums lead to the same experts, gates and weights."""
    expected, found = convert_searched(tmp_path), load_sparse(runs / "verbs" / "searched")
    assert found.plan == expected.plan and found.plan.gated
    torch.testing.assert_close(found.transformer.state_dict(), expected.transformer.state_dict(), rtol=0, atol=1e-5)


def test_rows_are_shared_without_gap_or_overlap() -> None:
    for rows, count in ((7, 2), (8, 3), (3, 3)):
        parts = [Processes(rank, count).part(rows) for rank in range(count)]
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert all(part.stop > part.start for part in parts)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(torch.device("cpu")) == ALONE
    with pytest.raises(InputError, match=r"this one is alone\. Start it under torchrun"):
        join(torch.device("cpu"), shard=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(torch.device("cpu"), shard=True) == ALONE


def test_a_signal_that_the_launcher_repeats_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with loop.StopRequest().listening() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
    monkeypatch.delenv("LOCAL_RANK")
    with loop.StopRequest().listening() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_each_process_needs_less_memory() -> None:
    chosen, (config, tokenizer) = load_recipe("var_d30"), official_config("var-d30")
    one = estimate_distill(config, tokenizer, chosen)
    shared = estimate_distill(config, tokenizer, chosen, processes=8)
    split = estimate_distill(config, tokenizer, chosen, processes=8, sharded=True)
    assert one.total > shared.total > split.total
    assert shared.parts["optimiser"] == one.parts["optimiser"]
    assert split.total < one.total / 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
