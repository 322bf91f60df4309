"""ReLU and LeakyReLU of the library's networks: torch's own, and in compiled passes on a CPU without masks kept."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import genkernels as gk
from genkernels.models import MODELS
from genkernels.networks import trace
from genkernels.nn import _rectified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [0.0, 0.2, 0.01])
def test_values_and_gradients_are_torchs_own(slope, dtype):
    """To the bit, at zeros of either sign and at what is not finite too."""
    torch._dynamo.reset()
    x = torch.randn(300).to(dtype)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    grad = torch.randn(300).to(dtype)

    def mine(x):
        return _rectified.leaky_relu(x, slope) if slope else _rectified.relu(x)

    def torchs(x):
        return F.leaky_relu(x, slope) if slope else F.relu(x)

    results = []
    with gk.use_backend("auto"):
        for run in (torchs, mine, torch.compile(mine, backend="aot_eager", fullgraph=True)):
            at = x.clone().requires_grad_()
            y = run(at)
            results.append([y.detach(), *torch.autograd.grad(y, at, grad)])
    for found in results[1:]:
        for value, expected in zip(found, results[0], strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("name", "preset", "options", "player"),
    [
        ("gan", "points", {"width": 16}, "critic"),
        ("gan", "points", {"width": 16}, "generator"),  # whose critic is frozen: no layer keeps the result
        ("sngan", "digits", {"width": 16}, "generator"),
        ("glow", "digits", {"steps": 1, "scales": 1}, "model"),
        ("vae", "photos32", {"width": 4}, "model"),
    ],
)
def test_a_compiled_pass_keeps_no_mask_of_activations(name, preset, options, player):
    """Inductor writes masks many times slower than it computes what they are of."""
    torch._dynamo.reset()
    masks = []

    def forward(graph, _):
        (output,) = graph.graph.find_nodes(op="output")
        kept = [node.meta["val"] for node in output.args[0] if isinstance(node, torch.fx.Node)]
        masks.extend(t.shape for t in kept if isinstance(t, torch.Tensor) and t.dtype == torch.bool and t.numel() > 64)
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.manual_seed(0)
    model = MODELS[name].from_preset(preset, **options).train()
    points = len(model.shape) == 1
    x = torch.randn(64, *model.shape) if points else torch.randint(17, (64, *model.shape)).to(torch.uint8)
    with gk.use_backend("auto"):
        model.losses(player, x, None, 0)  # ActNorms set themselves
        torch.compile(lambda x: model.losses(player, x, None, 0)["loss"], backend=backend, fullgraph=True)(x).backward()
    assert masks == []


def test_networks_of_them_are_known():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), _rectified.LeakyReLU(0.1), _rectified.ReLU())
    steps = trace(net, torch.zeros(1, 3))
    assert [step.name for step in steps if hasattr(step, "name")] == ["leaky_relu", "relu"]
