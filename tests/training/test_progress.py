import io
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from genkernels._bar import Bar, Waiting, bar_on, duration, number, rate_text
from genkernels._config import TrainConfig
from genkernels._interrupt import Interrupt
from genkernels._loss_file import LossFile
from genkernels._words import UsageError
from genkernels.training.report import history_of, remember
from genkernels.training.watch import LossRecord, StepClock, check_terms, first_bad, weights_are_finite


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_rate_is_the_median_without_the_warm_up():
    clock = StepClock(torch.device("cpu"))
    assert clock.rate(8) is None
    clock.seconds = [9.0] * 5 + [0.5] * 6 + [30.0]
    assert clock.rate(8) == 16.0
    assert clock.rate(8, last=1) == pytest.approx(8 / 30)
    clock.seconds = [2.0, 4.0]
    assert clock.rate(8) == pytest.approx(8 / 3), "too few steps to leave any out"


def test_time_between_restarts_is_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("genkernels.training.watch.time.perf_counter", lambda: now[0])
    clock = StepClock(torch.device("cpu"))
    clock.restart()
    for passed in (1.0, 2.0):
        now[0] += passed
        clock.tick()
    now[0] += 100.0  # an evaluation
    clock.restart()
    now[0] += 3.0
    clock.tick()
    assert clock.read() == [3.0] and clock.seconds == [1.0, 2.0, 3.0]


@pytest.fixture
def now(monkeypatch):
    value = [0.0]
    monkeypatch.setattr("genkernels._bar.time", SimpleNamespace(monotonic=lambda: value[0]))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return value


def run_of_ten(bar, now):
    for step in range(1, 11):
        now[0] += 1.0
        bar.update(step, lambda step=step: ["1,234 images/s", f"loss {step}.000", "kl 0.125", "held out 1.500"])
    bar.note("step 10: held out [1.5]")
    bar.close()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(now):
    pipe = io.StringIO()
    run_of_ten(bar_on(pipe, 10), now)
    assert "\r" not in pipe.getvalue() and "\x1b" not in pipe.getvalue() and pipe.getvalue().isascii()
    assert pipe.getvalue().splitlines() == [
        " 10% 1/10  1,234 images/s  loss 1.000  kl 0.125  held out 1.500  0:09 left",
        "100% 10/10  1,234 images/s  loss 10.000  kl 0.125  held out 1.500",
        "step 10: held out [1.5]",
    ], "every 10 s, and the end"
    quiet = io.StringIO()
    Bar(1, 0, quiet, quiet=True).update(1, lambda: ["loss"])
    bar_on(Terminal(), 1, quiet=True).note("nothing")
    assert quiet.getvalue() == ""


def shown(terminal, width) -> list[list[str]]:
    """The lines of each picture that was drawn, without control sequences."""
    import re

    pictures = re.split(r"\x1b\[2K", re.sub(r"\x1b\[[\d;?]*[mhlAG]|\r", "", terminal.getvalue()))
    lines = [line.rstrip() for picture in pictures for line in picture.split("\n")]
    assert all(len(line) <= width for line in lines), lines
    return lines


@pytest.mark.parametrize("width", [80, 40])
def test_on_a_terminal_nothing_is_cut(now, monkeypatch, width):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    run_of_ten(bar_on(terminal, 10, start=0), now)
    lines = shown(terminal, width)
    middle = next(i for i, line in enumerate(lines) if " 50% " in line)
    for part in (" 50%  5/10", "0:00:0", "0:05 left", "1,234 images/s", "loss 5.000", "kl 0.125", "held out 1.500"):
        assert any(part in line for line in lines[middle : middle + 4]), (part, lines[middle : middle + 4])
    after = lines.index("step 10: held out [1.5]")
    assert any("held out 1.500" in line for line in lines[after:]), "the bar is drawn again below a line that stays"
    assert "━" in lines[middle] and "step 10: held out [1.5]" in lines
    assert terminal.getvalue().endswith("\n") or lines[-1] == ""


def test_the_time_left_is_told_within_a_fifth_over_the_last_half(now):
    """A slow beginning; an evaluation in every tenth step, the last five times as long as the others; sheets, few and
    long; steps that take twice as long between those of 0.2 and 0.6."""
    bar = Bar(1000, 0, io.StringIO(), quiet=True)
    config = TrainConfig(max_steps=1000, eval_every=100, sample_every=300, eval_examples=10)
    bar.ahead = lambda done: config.pauses(done - 1, 1000, 40)
    pauses = {step: {"evaluate": 30.0} for step in range(100, 1000, 100)} | {1000: {"evaluate": 150.0, "draw": 80.0}}
    for step in (300, 600, 900):
        pauses[step]["draw"] = 80.0
    seconds = [1.0 + (200 < step < 600) for step in range(1, 1001)]
    seconds[0] = 400.0
    for step, passed in enumerate(seconds, 1):
        now[0] += passed
        bar.update(step, list)
        left = sum(seconds[step:]) + sum(sum(took.values()) for at, took in pauses.items() if at >= step)
        if step >= 750 or 500 <= step < 550:
            assert bar._left(now[0]) == pytest.approx(left, rel=0.2 if step >= 750 else 0.5), step
        for kind, took in pauses.get(step, {}).items():
            now[0] += took
            bar.pause(kind, took)
    assert len(bar._marks) <= 257
    long = Bar(10**6, 5, io.StringIO())
    long.update(5, list)
    long.update(7, list)
    assert "left" in long.stream.getvalue()


def test_waiting_for_data_is_told_from_the_second_second_on(now):
    for terminal, every in ((True, 0.1), (False, 10.0)):
        stream = io.StringIO()
        waiting = Waiting(stream, "genkernels: folder:pics", terminal)
        for done in range(0, 4000, 10):
            now[0] += 0.05
            waiting.update("decoding", done, 4000)
        waiting.close()
        drawn = re.split("\r\x1b\\[K" if terminal else "\n", stream.getvalue())
        texts = [text for text in drawn if text]
        assert texts[0] == "genkernels: folder:pics: decoding 190 of 4,000 images"
        assert len(texts) == pytest.approx(19 / every, abs=19 if terminal else 1) and drawn[-1] == ""
    quick = io.StringIO()
    waiting = Waiting(quick, "a", True)
    waiting.update("decoding", 1, 2)
    waiting.close()
    Waiting(None, "a", False).update("decoding", 1, 2)
    assert quick.getvalue() == ""


def test_where_rich_is_missing_a_terminal_gets_plain_lines(now, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    run_of_ten(bar_on(terminal, 10), now)
    assert "\x1b" not in terminal.getvalue() and len(terminal.getvalue().splitlines()) == 3


def test_words():
    assert duration(59.6) == "1:00" and duration(3723) == "1:02:03"
    assert (
        rate_text(1234.5) == "1,234 images/s" and rate_text(3.21, "points") == "3.2 points/s" and rate_text(None) == ""
    )
    assert [number(v) for v in (0.0, 1.23456, -12.5, 1.5e-5, 3e7)] == ["0.000", "1.235", "-12.500", "1.5e-05", "3e+07"]


def test_terms_are_kept_until_looked_at():
    record = LossRecord(3, torch.device("cpu"))
    record.add({"loss": torch.tensor(1.5), "grad_norm": torch.tensor([2.0])})
    record.add({"other": 3})
    record.close()
    record.add({"loss": torch.tensor(float("nan"), dtype=torch.bfloat16), "grad_norm": 0.0})
    record.close()
    assert len(record) == 2 and not record.full
    rows = record.read()
    assert rows[0] == {"loss": 1.5, "grad_norm": 2.0, "other": 3.0} and len(record) == 0
    assert rows[1].keys() == {"loss", "grad_norm"} and rows[1]["grad_norm"] == 0.0, "what did not move has no cell"
    assert record.read() == []
    for value in (1.0, 2.0, 3.0):
        record.add({"loss": torch.tensor(value)})
        record.close()
    assert record.full and record.read(average=lambda table: table / 2) == [{"loss": v} for v in (0.5, 1.0, 1.5)]


def test_what_is_not_finite_is_found():
    fine = {"a/loss": 1.0, "a/grad_norm": 1.0, "b/loss": 1.0, "b/grad_norm": 1.0, "a/other": float("nan")}
    losses, norms = ["a/loss", "b/loss"], ["a/loss", "a/grad_norm", "b/loss", "b/grad_norm"]
    assert first_bad([fine, {"b/loss": 1.0}], norms) is None, "a term that is only shown may be anything"
    assert first_bad([fine, {**fine, "b/loss": float("nan")}], norms) == (1, "b/loss")
    assert first_bad([fine, {**fine, "a/grad_norm": float("inf"), "b/loss": float("nan")}], norms) == (1, "a/grad_norm")
    assert first_bad([{**fine, "a/grad_norm": float("inf")}], losses) is None


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({}, "Identity.losses('p') must give a dict with the tensor 'loss', got an empty one"),
        ({"los": torch.tensor(0.0)}, "got los"),
        (torch.tensor(0.0), "got Tensor"),
        ({"loss": 1.0}, "must give a dict with the tensor 'loss'"),
        ({"loss": torch.zeros(3)}, "each term must be a single number, got loss of shape [3]"),
        (
            {"loss": torch.tensor(0.0), "lr": 0.5},
            "a term must not be called step or grad_norm or lr or seconds, got lr",
        ),
    ],
)
def test_losses_that_cannot_be_minimised_or_shown_are_refused(terms, words):
    with pytest.raises(UsageError) as error:
        check_terms(torch.nn.Identity(), "p", terms)
    assert words in str(error.value)


def test_weights_with_nan_or_infinity_are_noticed():
    model = torch.nn.BatchNorm1d(3)
    assert weights_are_finite(model) and weights_are_finite(torch.nn.Identity())
    model.running_var[1] = float("inf")
    assert not weights_are_finite(model)


def test_the_loss_file_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "losses.csv"
    file = LossFile(path, 0, ["loss", "grad_norm"])
    values = [0.1 + 0.2, 1 / 3, 2.5, 1e-9]
    for step, loss in enumerate(values):
        file.append(step, {"loss": loss, "grad_norm": 1.0}, 0.001, 0.01)
    file.close()
    with open(path, "a") as broken:
        broken.write("4,3.2")  # killed in the middle of a row
    assert path.read_text().splitlines()[0] == "step,loss,grad_norm,lr,seconds"
    assert [float(row["loss"]) for row in LossFile.read(path)] == values, "exactly the same numbers"
    file = LossFile(path, 2, ["loss", "grad_norm"])
    file.append(2, {"loss": 7.0, "grad_norm": 1.0}, 0.001, 0.01)
    file.close()
    assert (
        history_of(LossFile.read(path))["loss"]
        == [*values[:2], 7.0]
        == [float(row["loss"]) for row in LossFile.read(path)]
    )


def test_the_loss_file_takes_new_terms_and_empty_cells(tmp_path):
    path, rows = tmp_path / "losses.csv", [{"a/loss": 1.5, "a/kl": 2.0}, {"b/loss": 3.0}, {"a/loss": 4.0, "b/new": 5.0}]
    file, history = LossFile(path, 0, ["a/loss", "b/loss"]), {}
    for step, row in enumerate(rows):
        file.append(step, row, 0.001, 0.01)
        remember(history, row)
    file.close()
    assert path.read_text().splitlines() == [
        "step,a/loss,b/loss,lr,seconds,a/kl,b/new",
        "0,1.5,,0.001,0.010000,2.0,",
        "1,,3.0,0.001,0.010000,,",
        "2,4.0,,0.001,0.010000,,5.0",
    ]
    assert (
        history_of(LossFile.read(path))
        == history
        == {
            "a/loss": [1.5, None, 4.0],
            "b/loss": [None, 3.0, None],
            "a/kl": [2.0, None, None],
            "b/new": [None, None, 5.0],
        }
    )
    again = LossFile(path, 1, ["a/loss", "b/loss"])  # the columns of a run that goes on stay
    again.close()
    assert path.read_text().splitlines()[0] == "step,a/loss,b/loss,lr,seconds,a/kl,b/new"


def test_signals_are_heard_and_given_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt
        signal.raise_signal(signal.SIGTERM)
        assert interrupt and interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
