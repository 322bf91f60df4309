"""Peers answer from a process of their own, and a peer that dies or is missing costs its row and nothing else."""

import importlib.util

import pytest
import torch

from genkernels.benchmarks.cases import (
    affine_coupling,
    elementary_flows,
    made,
    rational_quadratic_spline,
    spectral_norm,
)
from genkernels.benchmarks.peers import PACKAGES, Peer
from genkernels.benchmarks.providers import Unavailable
from genkernels.benchmarks.runner import draw, run_case

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def peer_named():
    """A peer by its package's name, skipped where it is not installed; one process of each serves all tests here."""
    peers = {}

    def named(name):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        return peers.setdefault(name, Peer(name))

    yield named
    for peer in peers.values():
        peer.close()


def coupling(scale_map="sigmoid", direction="forward+backward", dtype=torch.float32, **options):
    return affine_coupling.case((4, 6, 5, 3), scale_map, direction, dtype, options)


def test_reasons(monkeypatch):
    problem = draw(coupling("tanh"), CPU)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, found=importlib.util.find_spec: None if name in PACKAGES else found(name),
    )
    with pytest.raises(Unavailable, match="is not installed"):
        Peer("nflows").open(problem)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(Unavailable, match="has no tanh scale map"):
        Peer("nflows").open(problem)


def test_a_process_that_raises_or_dies_is_a_reason_not_a_crash(tmp_path):
    peer = Peer("json")  # any module will do for a peer that fails
    try:
        with pytest.raises(Unavailable, match="raised FileNotFoundError"):
            peer.ask(do="open", file=str(tmp_path / "missing"))
        peer._process.kill()
        peer._process.wait()
        with pytest.raises(Unavailable, match="ended|[Pp]ipe"):
            peer.ask(do="turn")
        assert peer._process is None
    finally:
        peer.close()


COMPUTED = {"nflows": 2, "normflows": 3, "FrEIA": 2}  # scale maps


@pytest.mark.parametrize("name", COMPUTED)
def test_the_real_peer_computes_our_function(name, effort, peer_named):
    """Every scale map and direction that it offers passes the gate. Skipped where it is not installed (extra
    `bench`)."""
    peer = peer_named(name)
    passed = []
    for scale_map in ("exp", "sigmoid", "tanh", "additive"):
        for direction in ("forward", "inverse", "forward+backward"):
            rows, skipped = run_case(coupling(scale_map, direction), [peer], CPU, effort)
            assert [row.fault for row in rows] == [""] * len(rows)
            assert [reason for _, reason in skipped] == [f"has no {scale_map} scale map"] * (1 - len(rows))
            passed += [row.case for row in rows if row.median_s and row.peak_bytes]
    if name == "normflows":
        rows, _ = run_case(coupling(layout="interleaved"), [peer], CPU, effort)
        assert [row.fault for row in rows] == [""]
    assert len(passed) == 3 * COMPUTED[name]


@pytest.mark.parametrize("name, shapes", [("nflows", [(5, 6, 16, 16)]), ("zuko", [(5, 6, 16, 16), (3, 9, 7, 20)])])
def test_a_peers_masked_network_is_ours(name, shapes, effort, peer_named):
    """Forward, gradients and inverse pass the gate, with fewer hidden units than degrees too. Skipped where it is not
    installed."""
    peer = peer_named(name)
    for shape in shapes:
        for direction in ("forward", "forward+backward", "inverse"):
            rows, skipped = run_case(made.case(shape, direction), [peer], CPU, effort)
            assert not skipped and [row.fault for row in rows] == [""] and rows[0].median_s
        if name == "zuko":
            rows, skipped = run_case(rational_quadratic_spline.autoregressive_case(shape), [peer], CPU, effort)
            assert not skipped and [row.fault for row in rows] == [""] and rows[0].median_s


@pytest.mark.parametrize(("name", "kind"), [("nflows", "nflows"), ("zuko", "zuko"), ("normflows", "circular")])
def test_a_peers_spline_is_ours(name, kind, effort, peer_named):
    peer = peer_named(name)
    for direction in ("inverse", "forward+backward"):
        case = rational_quadratic_spline.case((60, 3), 4, kind, direction)
        rows, skipped = run_case(case, [peer], CPU, effort)
        assert not skipped and [row.fault for row in rows] == [""] and rows[0].median_s
    other = rational_quadratic_spline.case((60, 3), 4, "nflows" if name == "zuko" else "zuko", "forward")
    assert run_case(other, [peer], CPU, effort)[0] == []


def test_the_peers_elementary_flows_are_ours(effort, peer_named):
    """Values and gradients pass the gate. Skipped where it is not installed."""
    peer = peer_named("normflows")
    for kind in ("planar", "radial"):
        rows, skipped = run_case(elementary_flows.case(kind, (9, 5), 3, False, torch.float32), [peer], CPU, effort)
        assert [row.fault for row in rows] == [""] and not skipped
    rows, skipped = run_case(elementary_flows.case(kind, (9, 5), 3, True, torch.float32), [peer], CPU, effort)
    assert not rows and skipped == [("normflows", "has no layers of each example's own")]


def test_torchs_spectral_norm_is_ours_but_for_true_convolutions(effort, peer_named):
    weights = [(8, 3, 3, 3), (16, 8, 4, 4), (2, 256)]
    peer = peer_named("torch")
    cases = [spectral_norm.case("critic", weights, None, way) for way in ("forward", "forward+backward")]
    for case in [*cases, *(spectral_norm.layers("layers", weights, side) for side in (8, None))]:
        rows, skipped = run_case(case, [peer], CPU, effort)
        assert [row.fault for row in rows] == [""] and not skipped
    rows, skipped = run_case(spectral_norm.case("blocks", weights[:2], (4, 4), "forward"), [peer], CPU, effort)
    assert not rows and skipped == [("torch", "takes the weight of a convolution for a matrix")]
