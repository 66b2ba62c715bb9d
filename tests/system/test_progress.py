"""Bars, plain lines and the metrics log."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from actvar_convert.system.progress import MetricsLog, SilentProgress, TerminalProgress, duration


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[TerminalProgress, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return TerminalProgress(Console(file=out, force_terminal=False, width=60), interval=5.0, clock=clock), out, clock


def test_plain_lines_come_every_few_seconds_with_the_remaining_time() -> None:
    progress, out, clock = plain()
    with progress.task("training [stage 1]", 40) as task:
        for _ in range(20):
            clock.now += 1
            task.note("loss 0.5")
            task.advance()
    lines = out.getvalue().splitlines()
    assert lines[0] == "training [stage 1]: 5/40, 5.0 s, about 35.0 s left, loss 0.5"
    assert [line.split(",")[0] for line in lines] == [f"training [stage 1]: {n}/40" for n in (5, 10, 15, 20, 20)]


def test_steps_of_an_earlier_run_do_not_count_as_speed() -> None:
    progress, out, clock = plain()
    with progress.task("training", 220) as task:
        task.advance(80)
        for _ in range(12):
            clock.now += 5
            task.advance()
    assert out.getvalue().splitlines()[1] == "training: 82/220, 10.0 s, about 11 min 30 s left"


def test_a_finished_task_says_so_once() -> None:
    progress, out, clock = plain()
    with progress.task("training", 2) as task:
        clock.now += 6
        task.advance()
        clock.now += 6
        task.advance()
    assert out.getvalue().splitlines() == ["training: 1/2, 6.0 s", "training: 2/2, 12.0 s"]


def test_a_task_of_unknown_length() -> None:
    progress, out, clock = plain()
    with progress.task("reading") as task:
        clock.now += 6
        task.advance(3)
    assert out.getvalue() == "reading: 3, 6.0 s\n"


def test_the_last_line_comes_when_the_work_fails_too() -> None:
    progress, out, _ = plain()
    with pytest.raises(RuntimeError), progress.task("work", 3) as task:
        task.advance()
        raise RuntimeError
    assert out.getvalue() == "work: 1/3, 0.0 s\n"


def test_bars_on_a_terminal_show_the_count_and_leave_one_line() -> None:
    out = io.StringIO()
    progress = TerminalProgress(Console(file=out, force_terminal=True, width=120))
    with progress.task("outer", 2) as outer, progress.task("inner", 4) as inner:
        outer.advance()
        inner.advance(2)
        inner.note("half")
        progress.bars.refresh()
        progress.say("a word")
    text = out.getvalue()
    assert "1/2" in text and "2/4" in text and "left" in text and "a word" in text
    assert text.rstrip().splitlines()[-1].startswith("outer: 1/2")
    assert progress.bars.tasks == [] and progress.open == 0


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SilentProgress()
    with progress.task("work", 3) as task:
        task.advance()
        task.note("x")
    progress.say("y")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_metrics_are_one_object_per_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new" / "metrics.jsonl") as log:
        log.write(step=1, loss=0.5, per_scale=[1.0, float("inf")])
        log.write(step=2, loss=float("nan"))
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "per_scale": [1.0, None]},
        {"step": 2, "loss": None},
    ]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\x00\x00\x00\n", b'{"step": 2}\nnot json\n{"a"']
)
def test_a_torn_end_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    with MetricsLog(path) as log:
        kept = log.read()
        log.write(step=3)
        assert log.read() == [*kept, {"step": 3}]
    assert kept[0] == {"step": 1}
    assert all(isinstance(json.loads(line), dict) for line in path.read_bytes().splitlines())


def test_rewind_drops_what_was_written_past_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for stage in ("stage1", "stage2"):
            for step in (1, 2, 3):
                log.write(stage=stage, step=step)
        log.write(note="no step")
        log.rewind(1, stage="stage2")
        log.write(stage="stage2", step=2)
        steps = [(line.get("stage"), line.get("step")) for line in log.read()]
    assert steps == [("stage1", 1), ("stage1", 2), ("stage1", 3), ("stage2", 1), (None, None), ("stage2", 2)]
