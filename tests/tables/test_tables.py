"""`genkernels table`: every table there is, listed, made and written whole; `hybrid` from a tiny run."""

import csv
import importlib
import os
import signal

import numpy as np
import pytest

from genkernels import models, tables
from genkernels._words import UsageError
from genkernels.cli import main
from genkernels.tables import avade, hybrid, iwae

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("lightning")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few and small flows, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    sizes = {"realnvp": {"blocks": 0}, "glow": {"steps": 1}, "residualflow": {"blocks": 1}}
    from_preset = models.HybridFlow.from_preset

    def shrunk(name, **options):
        return from_preset(name, hidden=4, **sizes[name.removeprefix("digits-")], **options)

    monkeypatch.setattr(models.HybridFlow, "from_preset", shrunk)
    return tmp_path


def test_every_table_has_its_three_parts_and_is_listed(capsys):
    assert main(["table"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == tables.names() == ["avade", "hybrid", "iwae"]
    for name, line in zip(tables.names(), listed, strict=True):
        module = importlib.import_module(f"genkernels.tables.{name}")
        assert line.endswith(module.TITLE) and callable(module.make) and callable(module.add_arguments)
        assert main(["table", name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in ("--out", "--steps", "--seed", "--threads"))
    with pytest.raises(UsageError, match="did you mean hybrid"):
        tables.find("hybird")


def test_hybrid(small, capsys):
    assert main(["table", "hybrid", "--steps", "2", "--seed", "3", "--threads", "1", "--out", "deep/t.csv"]) == 0
    out, err = capsys.readouterr()
    assert out == "deep/t.csv\ndeep/t.png\n" and err.count("\n") == 9 and "9 of 9: residualflow, λ = 1: " in err
    assert sorted(os.listdir("deep")) == ["t.csv", "t.png"] and np.asarray(Image.open("deep/t.png")).shape[1] > 800
    with open("deep/t.csv") as file:
        rows = list(csv.DictReader(file))
    wanted = [(flow, weight) for flow in ("realnvp", "glow", "residualflow") for weight in ("0", "1/D", "1")]
    assert [(row["flow"], row["weight"]) for row in rows] == wanted
    assert [float(row["lambda"]) for row in rows[:3]] == [0, 1 / 64, 1]
    for row in rows:
        right = float(row["accuracy"]) * 3.6  # of 360 digits
        assert 0 <= right <= 360 and right == pytest.approx(round(right), abs=1e-3)
        assert 1 < float(row["bits_per_dim"]) < 20 and float(row["bits_per_dim_standard_error"]) > 0
        assert (row["steps"], row["seed"], row["examples"], row["data"]) == ("2", "3", "360", "digits")
    last = rows[-1]
    assert (last["paper_accuracy"], last["paper_bits_per_dim"], last["paper_data"]) == ("70.32", "3.39", "CIFAR-10")
    assert [row["paper_bits_per_dim"] for row in rows[::3]] == ["", "", ""], "the paper tells none of λ = 0"
    bits = {(row["flow"], row["weight"]): row["bits_per_dim"] for row in rows}
    assert len(set(bits.values())) == 9, "two cells are of one run"


def test_avade(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from_preset = models.AVADE.from_preset
    small = {"width": 4, "latent": 2, "steps": 1, "hidden": 2}
    monkeypatch.setattr(models.AVADE, "from_preset", lambda name, **options: from_preset(name, **small, **options))
    monkeypatch.setattr(avade, "SAMPLES", 100)
    assert main(["table", "avade", "--steps", "2", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "avade.csv\navade.png\n" and err.count("\n") == 5
    with open("avade.csv") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["gan", "vae", "v-ade", "av-gde", "av-ade"]
    assert rows["gan"]["bits_per_dim"] == "" and rows["av-ade"]["paper_fid"] == "28.0"
    for name, row in rows.items():
        assert float(row["frechet_distance"]) > 0 and float(row["sliced_wasserstein"]) > 0
        assert name == "gan" or 1 < float(row["bits_per_dim"]) < 20
        assert (row["steps"], row["examples"], row["samples"]) == ("2", "360", "100")


def test_iwae(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(iwae, "IMPORTANCE", 20)
    monkeypatch.setattr(iwae, "EXAMPLES", 30)
    assert main(["table", "iwae", "--steps", "2", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "iwae.csv\niwae.png\n" and err.count("\n") == 5
    with open("iwae.csv") as file:
        rows = {(row["model"], row["k"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(model, k) for k in ("1", "5", "50") for model in ("VAE", "IWAE")]
    assert rows["VAE", "1"]["nats"] == rows["IWAE", "1"]["nats"], "one bound"
    assert len({row["nats"] for row in rows.values()}) == 5
    assert all(10 < float(row["nats"]) < 60 and row["draws"] == "20" for row in rows.values())
    assert (rows["IWAE", "50"]["paper_nats"], rows["VAE", "50"]["paper_nats"]) == ("84.78", "86.35")
    assert main(["table", "iwae", "--steps", "2", "--threads", "1", "--seeds", "2", "--out", "two.csv"]) == 0
    assert "12 of 12: IWAE, k = 50, seed 1: " in capsys.readouterr().err
    with open("two.csv") as file:
        both = [(row["model"], row["k"], row["seed"], row["nats"]) for row in csv.DictReader(file)]
    assert len(set(both)) == 12 and [row[2] for row in both] == ["0", "1"] * 6
    assert [nats for *_, seed, nats in both if seed == "0"] == [row["nats"] for row in rows.values()]
    assert main(["table", "iwae", "--data", "moons"]) == 2
    assert "--data must be images with grey levels" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_numbers(small, monkeypatch):
    monkeypatch.setattr(hybrid, "BLOCKS", {"glow": "Glow"})
    monkeypatch.setattr(hybrid, "PAPER", {"glow": hybrid.PAPER["glow"]})
    texts = []
    for seed in (0, 0, 1):
        assert main(["table", "hybrid", "--steps", "2", "--seed", str(seed)]) == 0
        with open("hybrid.csv") as file:
            texts.append([(row["accuracy"], row["bits_per_dim"]) for row in csv.DictReader(file)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_table_that_is_stopped_leaves_nothing(small, monkeypatch, capsys, number, code):
    losses, calls = models.HybridFlow.losses, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return losses(self, *arguments)

    monkeypatch.setattr(models.HybridFlow, "losses", stopped)
    assert main(["table", "hybrid", "--steps", "50"]) == code
    assert len(calls) < 10 and os.listdir(small) == []
    assert "Traceback" not in capsys.readouterr().err


def test_a_table_whose_picture_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    table = tables.Table([{"a": 1, "b": None}], np.zeros((4, 4, 3), np.uint8))
    tables.save(tmp_path / "t.csv", table)
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,\n"

    def fails(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="full"):
        tables.save(tmp_path / "t.csv", tables.Table([{"a": 2, "b": 3}], table.picture))
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,\n"
    assert sorted(os.listdir(tmp_path)) == ["t.csv", "t.png"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("table hybird", "table: NAME must be one of avade, hybrid, iwae, got 'hybird'; did you mean hybrid?"),
        ("tabel hybrid", "unknown command 'tabel'; did you mean table?"),
        ("table hybrid --step 4", "table hybrid: unknown argument '--step'; did you mean --steps"),
        ("table hybrid --steps 0", "--steps must be at least 1, got 0"),
        ("table hybrid --threads 0", "--threads must be at least 1, got 0"),
        ("table hybrid --seed 99999999999999999999", "--seed must be an integer of 64 bits"),
        ("table hybrid --out t.png", "--out must end in .csv (the picture goes beside it), got 't.png'"),
        ("table hybrid --out /proc/none/t.csv", "cannot be written"),
    ],
)
def test_mistakes_give_one_sentence(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.startswith("genkernels: error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []
