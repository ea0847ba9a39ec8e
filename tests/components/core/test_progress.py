"""The bar and the lines: what they say, when, and to whom."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from tutelage.components.core import progress as module
from tutelage.components.core.progress import duration, progress, say


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stderr got, without the times of day."""
    out, err = capsys.readouterr()
    assert out == ""
    said = err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in said)
    return [line[9:] for line in said]


def test_say_puts_the_time_and_the_stage_before_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    say("resumed at step 3", stage="sft")
    say("done")
    assert lines(capsys) == ["sft: resumed at step 3", "done"]


def test_lines_come_at_most_every_ten_seconds_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(40, "sft: training") as bar:
        for step in range(40):
            clock.now += 0.5
            bar.advance(1, **({"train/loss": 2.0 - step / 100} if step % 10 == 9 else {}))
    # Step 20 ends at 10 s, step 40 at 20 s. The first step only starts the clock of the rate: 2 steps/s after it.
    assert lines(capsys) == [
        "sft: training: 20/40 steps (2 steps/s, 0:10 left) train/loss 1.81",
        "sft: training: 40/40 steps (in 0:20, 2 steps/s) train/loss 1.61",
    ]


def test_where_a_resumed_run_goes_on_is_no_part_of_its_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1000, "sft: training") as bar:
        bar.advance(900)
        for _ in range(5):
            clock.now += 4.0
            bar.advance(1)
    # The third step ends at 12 s: 3 steps in 12 s, so 97 more take 388 s.
    assert lines(capsys) == [
        "sft: training: 903/1000 steps (4 s/step, 6:28 left)",
        "sft: training: 905/1000 steps (stopped early, in 0:20, 4 s/step)",
    ]


def test_an_unknown_total_is_counted_and_an_error_still_shows_how_far_it_came(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def read() -> None:
        with progress(None, "data_prep: reading", unit="row") as bar:
            bar.advance(10)
            clock.now += 2.0
            bar.advance(50, bad=3)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert lines(capsys) == ["data_prep: reading: 60 rows (in 0:02, 25 rows/s) bad 3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.69314718, "0.6931"), (12345.6, "12,346"), (9999.4, "9999"), (1e-7, "1e-07"), (12345, "12345"), ("sgd", "sgd")],
)
def test_figures_are_short(value: object, text: str, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1, "x") as bar:
        bar.advance(1, figure=value)
    assert lines(capsys) == [f"x: 1/1 steps (in 0:00) figure {text}"]


def test_a_fast_rate_is_whole(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100_001, "x", unit="token") as bar:
        bar.advance(1)
        clock.now += 2.0
        bar.advance(100_000)
    assert lines(capsys) == ["x: 100001/100001 tokens (in 0:02, 50,000 tokens/s)"]


def test_nothing_done_is_said_without_a_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(0, "empty"):
        pass
    assert lines(capsys) == ["empty: 0/0 steps (in 0:00)"]


def test_other_ranks_are_silent_and_count_all_the_same(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say("hello")
    with progress(2, "sft") as bar:
        bar.advance(2)
    assert bar.done == 2
    assert lines(capsys) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (90_000, "25:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


ON_A_TERMINAL = """
from tutelage.components.core.progress import progress, say
with progress(10, "sft: [training]") as outer:
    outer.advance(0)
    say("between")
    with progress(2, "inner", unit="prompt") as inner:
        inner.advance(2)
    for _ in range(10):
        outer.advance(1, loss=0.25)
"""


def on_a_terminal(script: str, **variables: str) -> str:
    """What `script` writes to a terminal of 120 columns."""
    import pty

    main, worker = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm", **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=worker, stdout=worker, stderr=worker, env=environment
    )
    os.close(worker)
    written = io.BytesIO()
    try:
        while chunk := os.read(main, 65536):
            written.write(chunk)
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(main)
    assert process.wait(timeout=30) == 0, written.getvalue().decode()
    return written.getvalue().decode()


def test_a_terminal_gets_a_bar_even_with_another_inside_and_lines_between() -> None:
    written = on_a_terminal(ON_A_TERMINAL)
    assert "\x1b[" in written
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)
    assert re.search(r"sft: \[training\] ━+ +10/10 steps .*steps/s +loss 0.25", plain)
    assert re.search(r"inner ━+ +2/2 prompts", plain)
    assert re.search(r"[\r\n]\d\d:\d\d:\d\d between[\r\n]", plain)


def test_a_dumb_terminal_gets_lines() -> None:
    written = on_a_terminal(ON_A_TERMINAL, TERM="dumb")
    assert "\x1b" not in written
    assert "sft: [training]: 10/10 steps" in written


def test_a_log_does_not_pay_for_the_bar() -> None:
    script = (
        "import sys\nfrom tutelage.components.core.progress import progress\n"
        "with progress(1, 'x') as bar:\n    bar.advance(1)\nassert 'rich' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "x: 1/1 steps" in done.stderr
