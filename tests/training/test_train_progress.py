import io
import signal

import pytest
import torch

from genkernels.training.interrupt import Interrupt
from genkernels.training.progress import Progress, StepClock, duration, rate_text
from genkernels.training.record import LossFile, LossRecord, first_bad, weights_are_finite


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
    monkeypatch.setattr("genkernels.training.progress.time.perf_counter", lambda: now[0])
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


def test_the_line_is_redrawn_on_a_terminal_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("genkernels.training.progress.time.monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "80")
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = Progress(10, stream=stream)
        for step in range(1, 11):
            now[0] += 1.0
            bar.update(step, lambda step=step: f"loss {step}")
        bar.note("held out 1.5")
        bar.close()
    assert (
        terminal.getvalue().count("\r") == 11
        and "━" in terminal.getvalue()
        and "50% 5/10  loss 5  0:05 left" in terminal.getvalue()
    )
    assert "\r" not in pipe.getvalue() and pipe.getvalue().isascii()
    lines = pipe.getvalue().splitlines()
    assert lines[-1] == "held out 1.5" and lines[-2] == "100% 10/10  loss 10" and len(lines) == 3, (
        "every 10 s, and the end"
    )
    monkeypatch.setenv("COLUMNS", "30")
    narrow = Terminal()
    bar = Progress(10, stream=narrow)
    bar.update(1, lambda: "a text that would wrap")
    bar.close()
    assert len(narrow.getvalue().split("\x1b[2K")[1].rstrip("\n")) == 29 and narrow.getvalue().endswith("\n")
    quiet = io.StringIO()
    Progress(1, stream=quiet, quiet=True).update(1, lambda: "loss")
    assert quiet.getvalue() == ""


def test_words():
    assert duration(59.6) == "1:00" and duration(3723) == "1:02:03"
    assert (
        rate_text(1234.5) == "1,234 images/s" and rate_text(3.21, "points") == "3.2 points/s" and rate_text(None) == ""
    )


def test_losses_are_kept_until_looked_at():
    record = LossRecord(3, torch.device("cpu"))
    record.add(torch.tensor(1.5), torch.tensor(2.0))
    record.add(torch.tensor(float("nan"), dtype=torch.bfloat16), None)
    assert len(record) == 2 and not record.full
    rows = record.read()
    assert rows[0] == (1.5, 2.0) and rows[1][1] == 0.0 and len(record) == 0
    assert first_bad(rows, check_norm=True)[:2] == (1, "loss")
    assert first_bad([(1.0, 2.0), (1.0, float("inf"))], check_norm=True)[:2] == (1, "gradient norm")
    assert first_bad([(1.0, float("inf"))], check_norm=False) is None
    for value in (1.0, 2.0, 3.0):
        record.add(torch.tensor(value), None)
    assert record.full and record.read(average=lambda rows: rows / 2) == [(0.5, 0.0), (1.0, 0.0), (1.5, 0.0)]


def test_weights_with_nan_or_infinity_are_noticed():
    model = torch.nn.BatchNorm1d(3)
    assert weights_are_finite(model) and weights_are_finite(torch.nn.Identity())
    model.running_var[1] = float("inf")
    assert not weights_are_finite(model)


def test_the_loss_file_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "losses.csv"
    file = LossFile(path, 0)
    values = [0.1 + 0.2, 1 / 3, 2.5, 1e-9]
    for step, loss in enumerate(values):
        file.append(step, loss, 1.0, 0.001, 0.01)
    file.close()
    with open(path, "a") as broken:
        broken.write("4,3.2")  # killed in the middle of a row
    assert [float(row["loss"]) for row in LossFile.read(path)] == values, "exactly the same numbers"
    file = LossFile(path, 2)
    file.append(2, 7.0, 1.0, 0.001, 0.01)
    file.close()
    assert file.losses == [*values[:2], 7.0] == [float(row["loss"]) for row in LossFile.read(path)]


def test_signals_are_heard_and_given_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt
        signal.raise_signal(signal.SIGTERM)
        assert interrupt and interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupt.forced and interrupt.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
