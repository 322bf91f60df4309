"""``torch.compile`` takes the loss of every likelihood, of VAEs and of both players of an adversary as one graph,
values and gradients those of eager mode."""

import copy
import os
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import genkernels as gk
from genkernels import backends
from genkernels.models import MODELS, LikelihoodModel
from genkernels.networks import _outside

#: One of each layer is enough.
SMALL = {
    "nice": {"couplings": 2},
    "realnvp": {"blocks": 0},
    "glow": {"steps": 1},
    "maf": {"transforms": 2},
    "iaf": {"transforms": 2},
    "nsf": {"couplings": 2, "hidden": 16},
    "hybridflow": {"steps": 1},
    "pixelcnn": {"layers": 1, "dropout": 0.0},
    "gatedpixelcnn": {"layers": 1, "dropout": 0.0},
    "vae": {"width": 16},
    "pixelvae": {"width": 8, "pixel_width": 8},
}
LIKELIHOODS = [name for name, kind in MODELS.items() if issubclass(kind, LikelihoodModel)]
IMAGES = [(name, "digits", "auto") for name in LIKELIHOODS if name != "residualflow"]  # which has tests of its own
POINTS = [(name, "points", "auto") for name in ("glow", "maf")]
BOUNDS = [("vae", "digits", "auto"), ("vae", "points", "auto"), ("pixelvae", "digits", "auto")]
REFERENCE = [("nice", "digits", "reference"), ("maf", "points", "reference"), ("pixelcnn", "digits", "reference")]


@pytest.mark.parametrize(("name", "preset", "backend"), [*IMAGES, *POINTS, *BOUNDS, *REFERENCE])
def test_loss_is_one_graph(name, preset, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name].from_preset(preset, num_classes=3, **SMALL.get(name, {})).train()
    y = torch.tensor([0, 2, 1, 1])
    x = torch.randint(17, (4, *model.shape)).to(torch.uint8) if preset == "digits" else torch.randn(4, *model.shape)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    results = []
    with gk.use_backend(backend):
        model.loss(x, y)  # ActNorms set themselves
        for loss in (model.loss, compiled):
            torch.manual_seed(1)
            value = loss(x, y)
            results.append([value, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)])
    for eager, traced in zip(*results, strict=True):
        assert (eager is None) == (traced is None)
        if eager is not None:
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_masked_autoregressive_transforms_are_one_call_within_a_graph_too():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS["maf"].from_preset("points", transforms=3).train()
    x, calls = torch.randn(8, 2), []
    model.loss(x)

    def counting(graph, inputs):
        calls.extend(node for node in graph.graph.nodes if "made_forward" in str(node.target))
        return graph

    expected = model.loss(x)
    torch.testing.assert_close(torch.compile(model.loss, fullgraph=True, backend=counting)(x), expected)
    assert len(calls) == 1


def apart(results, names, dtype):
    """Asserts that two runs gave the same; None where nothing flows, or zeros."""
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for name, expected, got in zip(names, *results, strict=True):
        if expected is None:
            assert got is None or not got.any(), name
        else:
            torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("preset", "options", "dtype"),
    [
        ("points", {}, torch.float32),
        ("points", {"log_det": "unbiased", "stop": "poisson", "p": 1.0}, torch.float64),
        ("digits", {"probes": 2}, torch.float64),
        ("digits", {"log_det": "series", "first_term": "probe"}, torch.float32),
        ("points", {"log_det": "unbiased", "num_classes": 3}, torch.float64),
        ("digits", {"num_classes": 3}, torch.float32),
    ],
)
def test_a_residual_flow_is_one_graph_with_the_same_draws(preset, options, dtype):
    """The ratios of terms that it learns from them among its buffers, and u and v, too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS["residualflow"].from_preset(preset, blocks=2, hidden=8, **options).to(dtype).train()
    points = preset == "points"
    x = torch.randn(4, *model.shape, dtype=dtype) if points else torch.randint(17, (4, *model.shape)).to(torch.uint8)
    y = torch.tensor([0, 2, 1, 1]) if model.num_classes else None
    model.loss(x, y)
    state, results = copy.deepcopy(model.state_dict()), []
    names = ["loss", *dict(model.named_parameters()), *dict(model.named_buffers())]
    for run in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        model.load_state_dict(state)
        for seed in (1, 2):
            torch.manual_seed(seed)
            value = run(x, y)
            found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        results.append([value, *found, *(buffer.clone() for buffer in model.buffers())])
    apart(results, names, dtype)


@pytest.mark.parametrize(
    ("name", "preset", "options", "dtype"),
    [
        ("iwae", "digits", {"importance": 5}, torch.float32),
        ("iwae", "points", {"importance": 6, "estimator": "stl", "posterior": "planar"}, torch.float64),
        ("iwae", "points", {"importance": 6, "estimator": "miwae:3"}, torch.float32),
        ("iwae", "points", {"importance": 6, "estimator": "ciwae:0.5", "posterior": "iaf"}, torch.float64),
        ("iwae", "points", {"importance": 6, "estimator": "stl", "posterior": "iaf"}, torch.float64),
        ("iwae", "points", {"importance": 6, "estimator": "dreg"}, torch.float64),
        ("iwae", "points", {"importance": 3, "estimator": "dreg", "posterior": "iaf", "chunk": 2}, torch.float64),
        ("iwae", "points", {"importance": 4, "estimator": "piwae:2"}, torch.float64),
        ("iwae", "points", {"importance": 4, "estimator": "piwae:2", "posterior": "planar", "chunk": 2}, torch.float64),
        ("iwae", "points", {"importance": 6, "estimator": "ciwae:0.123456789", "chunk": 4}, torch.float64),
        ("iwae", "digits", {"importance": 5, "chunk": 2}, torch.float32),
        (
            *("hierarchicalvae", "digits"),
            {"importance": 3, "free_bits": 0.0, "strides": (8,), "latent": (2,)},
            torch.float32,
        ),
        (
            *("hierarchicalvae", "digits"),
            {"importance": 3, "chunk": 2, "free_bits": 0.0, "strides": (8,), "latent": (2,)},
            torch.float64,
        ),
    ],
)
def test_a_bound_of_several_draws_is_one_graph_with_the_same_draws(name, preset, options, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name].from_preset(preset, width=8, **options).to(dtype).train()
    points = preset == "points"
    x = torch.randn(4, *model.shape, dtype=dtype) if points else torch.randint(17, (4, *model.shape)).to(torch.uint8)
    parameters, results = list(model.parameters()), []

    def loss(x):
        return model.losses("model", x, None, 0)

    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        terms = run(x)
        results.append([*terms.values(), *torch.autograd.grad(terms["loss"], parameters, allow_unused=True)])
    apart(results, [*terms, *dict(model.named_parameters())], dtype)


def test_a_bound_in_chunks_breaks_the_graphs_of_compilers_that_ask_nothing_of_modules(monkeypatch):
    """With the draws of eager mode still."""
    monkeypatch.setattr(_outside, "ASKS_OF_MODULES", False)
    torch._dynamo.reset()
    model = MODELS["iwae"].from_preset("points", width=8, importance=6, chunk=4)
    x, values = torch.randn(4, 2), []
    for run in (model.log_bound, torch.compile(model.log_bound, backend="aot_eager")):
        torch.manual_seed(1)
        values.append(run(x, chunk=4))
    torch.testing.assert_close(*values)


def test_a_compiled_pass_in_chunks_keeps_of_them_what_one_draw_more_does_not_change():
    """It draws anew going back, as an eager one does: a compiler that knew the draws to be the same would keep all."""

    def kept(importance, chunk=None):
        torch._dynamo.reset()
        sizes = []

        def forward(graph, _):
            (output,) = graph.graph.find_nodes(op="output")
            found = [n.meta["val"] for n in output.args[0] if isinstance(n, torch.fx.Node) and n.op != "placeholder"]
            sizes.append(sum(t.numel() for t in found if isinstance(t, torch.Tensor)))
            return make_boxed_func(graph)

        backend = aot_autograd(
            fw_compiler=forward,
            bw_compiler=lambda graph, _: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
        )
        model = MODELS["iwae"].from_preset("points", width=64, importance=importance, chunk=chunk)
        loss = torch.compile(lambda x: model.losses("model", x, None, 0)["loss"], backend=backend, fullgraph=True)
        loss(torch.randn(256, 2)).backward()
        return sizes[0]

    whole, two, four = kept(4), kept(2, chunk=1), kept(4, chunk=1)
    assert four - two < 256 * 2 * 2 + 1, "numbers of an example and a draw"
    assert four < whole / 2


ADVERSARIES = [
    ("gan", "points", {"width": 8}, torch.float32),
    ("bigan", "points", {"width": 8}, torch.float32),
    ("cyclegan", "two_photos32", {"width": 2, "blocks": 0}, torch.float32),
    ("avade", "digits", {"width": 4, "steps": 1, "hidden": 8, "r1": 0.0}, torch.float32),
    ("sngan", "points", {"width": 8}, torch.float32),
    ("sngan", "digits", {"width": 4, "num_classes": 3}, torch.float64),
    ("wgangp", "points", {"width": 8}, torch.float64),
    ("wgangp", "digits", {"width": 4, "num_classes": 3}, torch.float32),
    ("r3gan", "points", {"width": 8, "num_classes": 3}, torch.float32),
    ("r3gan", "digits", {"width": 4, "cardinality": 2}, torch.float64),
    ("avade", "digits", {"width": 4, "steps": 1, "hidden": 8, "r1": 1.0}, torch.float64),
]


@pytest.mark.parametrize(("name", "preset", "options", "dtype"), ADVERSARIES)
def test_both_players_losses_are_one_graph_each(name, preset, options, dtype):
    """And each makes gradients for its own player alone."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name].from_preset(preset, **options).to(dtype).train()
    points = len(model.shape) == 1
    x = torch.randn(4, *model.shape, dtype=dtype) if points else torch.randint(17, (4, *model.shape)).to(torch.uint8)
    y, state = torch.tensor([0, 2, 1, 1]) % (model.num_classes or 1), copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    for player, part in model.players().items():

        def loss(player=player):
            return model.losses(player, x, y, 0)["loss"]

        own, results = {id(p) for p in part.module.parameters()}, []
        for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            model.load_state_dict(state)  # a pool of images; u and v
            torch.manual_seed(1)
            value = run()
            found = torch.autograd.grad(value, parameters.values(), allow_unused=True)
            results.append([value, *found, *(buffer.clone() for buffer in model.buffers())])
        others = [i for i, p in enumerate(parameters.values(), start=1) if id(p) not in own]
        for i in others:
            results[0][i] = None
        apart(results, ["loss", *parameters, *dict(model.named_buffers())], dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [("residualflow", {"blocks": 2, "log_det": "unbiased"}), ("iwae", {}), ("sngan", {}), ("wgangp", {})],
)
def test_one_graph_has_batches_of_any_size(name, options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name].from_preset("points", **options).train()
    player = next(iter(model.players()))
    parameters = dict(model.players()[player].module.named_parameters())

    def loss(x):
        return model.losses(player, x, None, 0)["loss"]

    loss(torch.randn(4, 2))
    run = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 9):
        x, results = torch.randn(count, 2), []
        for each in (loss, run):
            torch.manual_seed(count)
            value = each(x)
            results.append([value, *torch.autograd.grad(value, parameters.values(), allow_unused=True)])
        apart(results, ["loss", *parameters], torch.float32)


def test_values_are_still_checked_outside_a_graph():
    model = MODELS["glow"].from_preset("digits", num_classes=3, steps=1)
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="x must hold level indices 0..16"):
        model.loss(x + 17, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="y must lie in 0..2"):
        model.loss(x, torch.tensor([0, 3]))


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_inductors_gradients_are_those_of_eager_mode():
    """A flow on points begins with an ActNorm whose input has no gradient; joined with the others, Inductor got it
    wrong, in as small a flow as this. Each kernel of a larger one is compiled for a second."""
    torch._dynamo.reset()
    flow = gk.nn.FlowSequential(gk.nn.ActNorm(2), gk.nn.AffineCoupling(torch.nn.Linear(1, 2)), gk.nn.ActNorm(2))
    x = torch.randn(64, 2)
    flow(x)  # ActNorms set themselves

    def negative_log_density(x):
        z, log_det = flow(x)
        return (z.square().sum(1) / 2 - log_det).mean()

    with gk.use_backend("auto"):
        compiled = torch.compile(negative_log_density, fullgraph=True, dynamic=False)
        results = [torch.autograd.grad(loss(x), list(flow.parameters())) for loss in (negative_log_density, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_small_couplings_are_inlined_and_large_ones_call_the_operator(split, additive, inverse):
    """The same numbers either way."""
    if backends.why_missing("cpu"):
        pytest.skip("needs the CPU kernels")
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph

    halves = 2 if split == "checkerboard" else 1
    net = torch.nn.Conv2d(halves, halves * (1 if additive else 2), 1)
    layer = gk.nn.AffineCoupling(net, split=split, scale_map="tanh", additive=additive)
    run = layer.inverse if inverse else layer.forward
    with gk.use_backend("auto"):
        for side in (4, 64):
            torch._dynamo.reset()
            x = torch.randn(2, 2, side, side)
            for mine, theirs in zip(torch.compile(run, fullgraph=True, backend=keep)(x), run(x), strict=True):
                torch.testing.assert_close(mine, theirs)
    assert ["genkernels" in graph for graph in graphs] == [False, True]


@pytest.mark.parametrize(("kind", "depth"), [(gk.models.Glow, {"steps": 2}), (gk.models.MAF, {"transforms": 2})])
def test_loaded_weights_compile_as_one_graph_in_training(kind, depth):
    """Whether its ActNorms have started is known from the loading; written in place, from one break of the graph."""
    torch._dynamo.reset()
    x = torch.randn(64, 4)
    source, loaded, copied = (kind(shape=(4,), hidden=8, **depth) for _ in range(3))
    source.loss(x)
    loaded.load_state_dict(source.state_dict())
    expected = source.loss(x)
    torch.testing.assert_close(torch.compile(loaded.loss, fullgraph=True, backend="eager")(x), expected)
    with torch.no_grad():
        for name, value in copied.state_dict().items():
            value.copy_(source.state_dict()[name])
    torch.compile(copied.loss, backend="eager")(x)
    torch.testing.assert_close(torch.compile(copied.loss, fullgraph=True, backend="eager")(x), expected)
