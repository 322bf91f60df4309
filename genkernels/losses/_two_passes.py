"""Log-weights in chunks of samples: without a graph first, and each chunk again with one, times what it weighs by then.

Of the gradient of a bound, :math:`\\sum_i w_i \\nabla \\ell_i`, the weights need every log-weight, the rest only its
own sample. So nothing but log-weights is kept of the samples; a chunk is drawn again from its own seed. The last chunk
has its graph from the start: which leaves the gradient is by is read there, and it need not run again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from genkernels._seeds import derive_seed
from genkernels.losses import _graphs
from genkernels.losses._estimators import Estimator, Weighed
from genkernels.ops._stream import Stream, again

LogWeight = Callable[[tuple[Tensor, ...], int, torch.Generator, bool], tuple[Tensor, object]]


class Chunks:
    """The samples of one call, in chunks of `sizes`."""

    def __init__(
        self,
        who: str,
        log_weight: LogWeight,
        parameters: Sequence[Tensor],
        sizes: Sequence[int],
        estimator: Estimator,
        seed: int | Tensor,
    ):
        self.who, self.log_weight, self.estimator, self.seed = who, log_weight, estimator, seed
        self.parameters, self.sizes = tuple(parameters), list(sizes)

    @functools.cached_property
    def autocast(self) -> Callable[[], contextlib.AbstractContextManager]:
        """The state of the first pass, for those to come."""
        return _autocast_state(self.parameters[0].device.type)

    # ----------------------------------------------------------------------------------------------------- one chunk

    def generator(self, index: int) -> torch.Generator | Stream:
        if torch.compiler.is_compiling() or isinstance(self.seed, Tensor):
            return Stream(self.seed, index, self.parameters[0].device)
        return torch.Generator(self.parameters[0].device).manual_seed(derive_seed(self.seed, index))

    def one_graph(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log-weights and latents of all samples at once, as autograd records them."""
        (size,) = self.sizes
        return self._checked(self.parameters, size, self.generator(0))

    def run(self, parameters: tuple[Tensor, ...], index: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log-weights ``[N, size]`` of one chunk, and its latents: the same numbers in every pass."""
        with self.autocast(), self._torchs_own(index):
            return self._checked(parameters, self.sizes[index], self.generator(index))

    def _torchs_own(self, index: int) -> contextlib.AbstractContextManager:
        """Whatever draws from torch's own generators (dropout) draws alike in both passes too; what a compiled pass
        holds draws from a stream alone."""
        if isinstance(self.seed, Tensor):
            return contextlib.nullcontext()
        return _torchs_own(self.parameters[0].device, derive_seed(self.seed, "own", index))

    def _checked(self, parameters, size: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        who, stopped = self.who, self.estimator.stopped
        given = self.log_weight(parameters, size, generator, stopped)
        if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], Tensor):
            raise TypeError(f"{who}: log_weight must return (log_w, latents), got {type(given).__name__}")
        log_w, latents = given
        if log_w.dim() != 2 or log_w.shape[1] != size or not log_w.is_floating_point():
            raise ValueError(
                f"{who}: log_weight must give floats [N, {size}] for {size} samples, got {log_w.dtype} "
                f"{list(log_w.shape)}"
            )
        if not isinstance(latents, tuple | list):
            latents = () if latents is None else (latents,)
        for z in latents:
            if not isinstance(z, Tensor) or z.shape[:2] != log_w.shape:
                found = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"{who}: latents must be tensors [N, {size}, ...] = {list(log_w.shape)}, got {found}")
        return log_w, tuple(latents)

    # ------------------------------------------------------------------------------------------------- the first pass

    def values(self) -> Tensor:
        """All log-weights, ``[N, k]``, without a graph."""
        with torch.no_grad():
            parameters = tuple(p.detach() for p in self.parameters)
            chunks = [_widened(self.run(parameters, index)[0]) for index in range(len(self.sizes))]
            return torch.cat(chunks, 1)

    def recorded(self) -> Tensor:
        """The same, and the last chunk with its graph, in which `leaves` are found."""
        self.context = contextvars.copy_context()
        self.points = tuple(p.detach().requires_grad_(p.requires_grad) for p in self.parameters)
        with torch.no_grad():
            chunks = [_widened(self.run(self.points, index)[0]) for index in range(len(self.sizes) - 1)]
        self.kept = self._with_graph(len(self.sizes) - 1)
        self.leaves = list(self._leaves(self.kept[0]).values())
        return torch.cat([*chunks, _widened(self.kept[0].detach())], 1)

    def _with_graph(self, index: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            self.since = _graphs.now()
            log_w, latents = self.run(self.points, index)
        check_latents(self.who, self.estimator, log_w, latents, self.points)
        return log_w, latents

    def _leaves(self, log_w: Tensor) -> dict[int, Tensor]:
        """The leaves below, without `points`."""
        found, older = _graphs.leaves(log_w, self.since)
        if older:
            raise RuntimeError(
                f"{self.who}: log_weight must get what has a graph through `parameters` when it runs in chunks, got a "
                f"tensor of its own with the graph of {older}"
            )
        own = {id(p) for p in self.points}
        return {key: leaf for key, leaf in found.items() if key not in own}

    # ------------------------------------------------------------------------------------------------ the second pass

    def gradients(self, weighed: Weighed, grad: Tensor) -> list[Tensor | None]:
        """The gradients by all `parameters`, then by `leaves`, where the bound's is `grad` ``[N]``."""
        return self.context.copy().run(self._gradients, weighed, grad)

    def _gradients(self, weighed: Weighed, grad: Tensor) -> list[Tensor | None]:
        if isinstance(self.seed, Tensor):  # else a compiler would keep what the first pass computed
            self.seed = again(self.seed, grad)
        known = {id(leaf) for leaf in self.leaves}
        points = [p for p in self.points if p.requires_grad]
        sums = _Sums([*points, *self.leaves])
        end = sum(self.sizes)
        for index in reversed(range(len(self.sizes))):
            begin = end - self.sizes[index]
            kept, self.kept = self.kept, None
            log_w, latents = self._with_graph(index) if kept is None else kept
            if log_w.requires_grad:
                if kept is None and (new := self._leaves(log_w).keys() - known):
                    raise RuntimeError(
                        f"{self.who}: log_weight must reach the same parameters in every chunk, got one whose graph "
                        f"has {len(new)} more than the last one's; chunk=None takes all samples in one graph"
                    )
                self._of_chunk(log_w, latents, weighed, grad, slice(begin, end), points, sums)
            del kept, log_w, latents
            end = begin
        totals = sums.totals()
        by_point = iter(totals)
        return [next(by_point) if p.requires_grad else None for p in self.points] + totals[len(points) :]

    def _of_chunk(self, log_w, latents, weighed: Weighed, grad: Tensor, part: slice, points, sums: _Sums) -> None:
        def seeds(weights: Tensor) -> Tensor:
            return (weights[:, part] * grad[:, None]).to(log_w.dtype)

        if self.estimator.name == "dreg":
            carry(latents, weighed.shares[:, part])
        if not self.estimator.weighs_apart:
            sums.add(log_w, [*points, *self.leaves], seeds(weighed.by_p))
            return
        sums.add(log_w, points, seeds(weighed.by_q), retain_graph=bool(self.leaves))
        sums.add(log_w, self.leaves, seeds(weighed.by_p))

    def attached(self, weighed: Weighed) -> Tensor:
        """The bound, with its gradient to come from the second pass."""
        stands_for = getattr(self.log_weight, "stands_for", {})
        tensors = [*self.parameters, *(stands_for.get(id(leaf), leaf) for leaf in self.leaves)]
        if not any(t.requires_grad for t in tensors):
            return weighed.bound
        return _InChunks.apply(self, weighed, weighed.bound, *tensors)


def carry(latents: Sequence[Tensor], shares: Tensor) -> None:
    """What flows back through the latents of each sample is multiplied by its share."""
    for z in latents:
        if z.requires_grad:
            weights = shares.reshape(shares.shape + (1,) * (z.dim() - 2)).to(z.dtype)
            # None comes where nothing flows through this one of an operator's outputs
            z.register_hook(lambda g, weights=weights: None if g is None else g * weights)


def check_latents(who: str, estimator: Estimator, log_w: Tensor, latents: Sequence[Tensor], parameters) -> None:
    """That the gradient takes the ways that the estimator rests on."""
    carrying = [z for z in latents if z.requires_grad]
    if estimator.name == "vimco" and carrying:
        raise ValueError(
            f"{who}: vimco is for discrete latents, got latents that have a gradient; take 'iwae' or 'dreg'"
        )
    if estimator.name != "dreg" or not log_w.requires_grad:
        return
    at = _graphs.edges(carrying)
    for i, edge in enumerate(at):
        others = [other for other in at if other != edge]
        below = [_graphs.GradientEdge(*next_edge) for next_edge in edge.node.next_functions]
        if any(_graphs.reached(start, others) for start in below):
            raise ValueError(
                f"{who}: dreg must have latents of which none is made from another, got number {i} made from another: "
                "where the density of one depends on the other it is wrong, and needs the generalised form of Bauer & "
                "Mnih, 2021, which is not here; take 'iwae' or 'stl'"
            )
    if _graphs.reached(_graphs.edges([log_w])[0], _graphs.edges(parameters), past=at):
        raise ValueError(
            f"{who}: dreg must meet `parameters` through the latents alone, got log-weights that reach them otherwise: "
            "log_weight must return every tensor that carries their gradient, and stop those inside ln q"
        )


class _InChunks(torch.autograd.Function):
    """The bound, whose gradient by the tensors that follow is found when it is asked for."""

    @staticmethod
    def forward(ctx, chunks, weighed, bound, *tensors):
        ctx.chunks, ctx.weighed = chunks, weighed
        ctx.save_for_backward(*tensors)  # which notices if one is changed before the second pass
        return bound.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.chunks.who}: a gradient found in chunks cannot be differentiated again; that of chunk=None can"
            )
        _ = ctx.saved_tensors
        found = ctx.chunks.gradients(ctx.weighed, grad)
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(g if need else None for g, need in zip(found, needed, strict=True))


def _widened(log_w: Tensor) -> Tensor:
    return log_w.to(torch.promote_types(log_w.dtype, torch.float32))


class _Sums:
    """Running sums, in fp32 at least, of the gradients by some leaves. Each is taken as soon as it is there, so that
    those of one chunk are never all alive beside the sums."""

    def __init__(self, targets: Sequence[Tensor]):
        self.targets = list(targets)
        self.found: dict[int, Tensor] = {}

    def add(self, root: Tensor, targets: Sequence[Tensor], seeds: Tensor, retain_graph: bool = False) -> None:
        if not targets:
            return
        with _graphs.without_hooks(targets):
            hooks = [t.register_hook(lambda g, t=t: self._taken(t, g)) for t in targets]
            try:
                torch.autograd.grad(root, targets, seeds, allow_unused=True, retain_graph=retain_graph)
            finally:
                for hook in hooks:
                    hook.remove()

    def _taken(self, target: Tensor, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        wide = torch.promote_types(g.dtype, torch.float32)
        total = self.found.get(id(target))
        if total is None:
            self.found[id(target)] = g.to(wide, copy=True)  # autograd may give the same tensor twice
        elif g.is_sparse != total.is_sparse:
            self.found[id(target)] = total + g
        else:
            total.add_(g)
        # what autograd collects in its stead takes no memory
        return g if g.is_sparse else g.new_zeros(()).expand_as(g)

    def totals(self) -> list[Tensor | None]:
        found = [self.found.get(id(t)) for t in self.targets]
        return [None if s is None else s.to(t.dtype) for s, t in zip(found, self.targets, strict=True)]


@contextlib.contextmanager
def _torchs_own(device: torch.device, seed: int) -> Iterator[None]:
    """Within, torch's own generators of the CPU and of `device` begin at `seed`; then they are where they were."""
    own = [torch.default_generator]
    if device.type == "cuda":
        own.append(torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index])
    states = [g.get_state() for g in own]
    for g in own:
        g.manual_seed(seed)
    try:
        yield
    finally:
        for g, state in zip(own, states, strict=True):
            g.set_state(state)


def _autocast_state(device: str) -> Callable[[], contextlib.AbstractContextManager]:
    """A context that puts autocast in the state it has now, in any thread. Without its cache: a weight that was cast
    without a graph would have none in the next pass, nor outside."""
    kinds = {"cpu", device} - {"meta"}
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)]

    @contextlib.contextmanager
    def state() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    return state
