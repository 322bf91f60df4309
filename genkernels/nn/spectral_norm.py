"""Spectral norm of all layers below a module, by one update a training step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genkernels.networks import operator_norm
from genkernels.networks._outside import outside
from genkernels.networks._plain import hooked
from genkernels.nn import _compiled_norm, _scaled_norm
from genkernels.nn._norm_group import Group, looked_on, searched
from genkernels.nn._seen import Seen
from genkernels.ops import MATRIX, Geometry, checks
from genkernels.reference.spectral_norm import as_plan

WHO = "spectral_norm_"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
OPERATORS = ("matrix", "convolution")

Module = TypeVar("Module", bound=nn.Module)


def spectral_norm_(
    module: Module,
    n_power_iterations: int = 1,
    *,
    operator: str = "matrix",
    coefficient: float = 1.0,
    at_most: bool = False,
    tolerance: float | None = None,
) -> Module:
    r"""Divides the weight of every ``Linear`` and ``Conv*`` below a module by its spectral norm, in place.

    All weights are normalised in one call of an operator, once a training step: every forward pass of that step (real
    and fake batch, micro-batches, checkpointed blocks) reads the same weights. In evaluation nothing is written.
    In training on a CPU a ``Linear`` or ``Conv*`` whose weight is large beside its outputs (small batches) does without
    the normalised weight: its outputs are divided in its stead, which differs by rounding alone. ``layer.weight`` is
    there whenever it is asked for.

    Equivalent to, but for the number of updates::

        for layer in module.modules():
            if isinstance(layer, LAYERS):
                torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=n_power_iterations)

    Args:
        module: what lies below it, itself included, is normalised; an ``Embedding`` where it is the module itself.
        n_power_iterations: power iterations an update, from where the last one ended.
        operator: ``matrix``: the norm of the weight as a matrix of outputs against all else (SN-GAN). ``convolution``:
            the norm of the convolution that the layer is, at its stride, padding and size of input (i-ResNet); another
            size of input starts anew, with a warning.
        coefficient: the norm that weights are given, c > 0. at_most: weights of a smaller norm stay as they are.
        tolerance: in evaluation the norm is searched to this relative accuracy, from u and v as training left them. By
            default they count as they are, as in torch, unless that is more than 2 % below the norm: then they belong
            to other weights (an average of models, weights copied in place).

    Returns:
        The module. Its state dict is that of ``torch.nn.utils.parametrizations.spectral_norm``
        (``parametrizations.weight.original``, ``.0._u``, ``.0._v``; as convolutions u and v have channels and sizes);
        that of ``torch.nn.utils.spectral_norm`` (``weight_orig``, ``weight_u``, ``weight_v``) loads too. Taken off by
        ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    An update belongs to the weights that it was made for: it is made where a weight in training mode is another tensor
    or has been written to since (an optimiser's step). Weights that were replaced, moved or loaded are searched until
    their norm is known.

    Raises:
        ValueError: an option is wrong, nothing below the module can be normalised, a layer is normalised already, or
            its padding is no linear map's (``reflect``, ``replicate`` as a convolution). TypeError: no module was
            given.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018; Behrmann et al.,
    "Invertible residual networks", 2019.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{WHO}: module must be a torch.nn.Module, got {type(module).__name__}")
    checks.integer(WHO, "n_power_iterations", n_power_iterations, 1)
    checks.option(WHO, "operator", operator, OPERATORS)
    _positive("coefficient", coefficient)
    if tolerance is not None:
        _positive("tolerance", tolerance)
    named = [(name, layer) for name, layer in module.named_modules() if _takes(layer, layer is module)]
    if not named:
        raise ValueError(
            f"{WHO}: module must be or hold a Linear or a convolution, got {type(module).__name__} without any"
        )
    settings = Settings(n_power_iterations, float(coefficient), bool(at_most), tolerance)
    for name, layer in named:
        _check_layer(name or type(layer).__name__, layer)
    parts = [_register(layer, operator, settings) for _, layer in named]
    join(parts)
    return module


def _positive(label: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{WHO}: {label} must be a positive number, got {value!r}")


def _takes(layer: nn.Module, is_root: bool) -> bool:
    return isinstance(layer, LAYERS) or (is_root and isinstance(layer, nn.Embedding))


def _check_layer(name: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        for part in layer.parametrizations.weight:
            if isinstance(part, SpectralNorm) or type(part).__name__ == "_SpectralNorm":
                raise ValueError(f"{WHO}: {name} must not be normalised twice, got a layer with spectral norm")
        return
    if any(type(hook).__name__ == "SpectralNorm" for hook in layer._forward_pre_hooks.values()):
        raise ValueError(
            f"{WHO}: {name} must not be normalised twice, got a layer with torch.nn.utils.spectral_norm; "
            "torch.nn.utils.remove_spectral_norm takes it off"
        )
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{WHO}: {name} must have its weight before it is normalised, got a lazy layer: call it once")
    checks.tensor(WHO, f"the weight of {name}", layer.weight)


def _register(layer: nn.Module, operator: str, settings: Settings) -> SpectralNorm:
    convolution = operator == "convolution" and isinstance(layer, CONVOLUTIONS)
    if convolution:
        geometry = operator_norm.geometry_of(layer)
    else:
        geometry = Geometry(MATRIX, 1 if "Transpose" in type(layer).__name__ else 0)
    part = SpectralNorm(geometry, settings)
    part.begin(layer.weight)
    # unsafe: the two passes over forward by which torch tests shapes would count as a step
    parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    part.owner = (layer.parametrizations.weight,)
    if geometry == Geometry() and _scaled_norm.route(layer, _taken):
        part.routed = layer.parametrizations.weight.original.numel() >= _scaled_norm.LARGE
    layer.register_load_state_dict_pre_hook(_rename_older_keys)
    if convolution and not hasattr(layer, "notes_size"):
        layer.register_forward_pre_hook(_note_size)
    return part


def _taken(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a layer makes of x, the way past ``layer.weight``, whose modules within modules take as long as a small
    product. In training it may do without the normalised weight, where that saves bytes."""
    held = layer._modules["parametrizations"]._modules.get("weight")
    part = held._modules["0"] if held is not None and len(held._modules) == 1 else None
    if not isinstance(part, SpectralNorm) or parametrize._cache_enabled or torch.jit.is_tracing() or hooked(held, part):
        return None
    weight, bias = held._parameters.get("original"), layer.bias
    if weight is None:
        return None
    group = part.group
    if part.routed and part.training and not torch.is_autocast_enabled("cpu") and not looked_on():
        vectors = group.known(part, weight)
        if (vectors or group.scales(part, weight)) and _scaled_norm.suits(layer, weight, bias, x):
            return _scaled_norm.forward(layer, weight, bias, x, (vectors or group.found(part, weight)).found)
    normal = group.normalised(part, weight)
    return F.linear(x, normal, bias) if weight.dim() == 2 else layer._conv_forward(x, normal, bias)


def _note_size(layer: nn.Module, arguments: tuple) -> None:
    note_size(layer, arguments[0])


def note_size(layer: nn.Module, x: Tensor) -> None:
    """What a layer normalised as a convolution says before it reads its weight: the size of its input."""
    size = tuple(x.shape[x.dim() - len(layer.kernel_size) :])
    for part in layer.parametrizations.weight:
        if isinstance(part, SpectralNorm) and part.geometry.kind != MATRIX:
            part.resize(layer, size)


def _rename_older_keys(layer, state_dict, prefix, *_) -> None:
    """``torch.nn.utils.spectral_norm``'s names, into those of its parametrization."""
    held = f"{prefix}parametrizations.weight."
    if f"{prefix}weight_orig" in state_dict and f"{held}original" not in state_dict:
        state_dict[f"{held}original"] = state_dict.pop(f"{prefix}weight_orig")
        for letter in "uv":
            if (value := state_dict.pop(f"{prefix}weight_{letter}", None)) is not None:
                state_dict[f"{held}0._{letter}"] = value


# ------------------------------------------------------------------------------------------------------------ one layer


class Settings(NamedTuple):
    iterations: int
    coefficient: float
    at_most: bool
    tolerance: float | None


class SpectralNorm(nn.Module):
    """The parametrization of one weight: its u and v, and its place in a `Group`."""

    genkernels_given = ("_number",)  #: what a compiled pass is given beside parameters and buffers
    _u: Tensor
    _v: Tensor

    def __init__(self, geometry: Geometry, settings: Settings):
        super().__init__()
        self.geometry, self.settings = geometry, settings
        self.owner: tuple[parametrize.ParametrizationList, ...] = ()  # in a tuple: it is no part of this module
        self.group = Group([self])
        self.register_buffer("_u", torch.empty(0))
        self.register_buffer("_v", torch.empty(0))
        self._updated_for = Seen()
        self.routed = False  #: its layer may ask for u, v and sigma instead of the normalised weight
        self._alien = False  #: u and v are not this weight's: it was loaded without them
        self._plan, self._number = as_plan([geometry]), _compiled_norm.numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._number = as_plan([self.geometry]), _compiled_norm.numbered(self)

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.group.normalised(self, weight)
        # a replica of `DataParallel` has its original's number; a pass that is exported is to run without the group
        alone = getattr(self, "_is_replica", False) or torch.compiler.is_exporting()
        if alone or not self._v.numel():
            return outside(self.group.normalised, self, weight)
        return _compiled_norm.normalised(weight, self._number, self._u, self._v, self._plan, self.settings)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def begin(self, weight: Tensor, layer: nn.Module | None = None, size: tuple[int, ...] = ()) -> None:
        """Fresh u and v, searched from the same start whatever was drawn before; those of a convolution are empty until
        the size of its input is known."""
        if self.geometry.kind == MATRIX:
            rows = weight.shape[self.geometry.axis]
            shapes = (rows,), (weight.numel() // rows,)
        elif layer is None:
            shapes = (0,), (0,)
        else:
            v, u = operator_norm.sizes_of(layer, size, weight)
            shapes = u, v
        generator = torch.Generator().manual_seed(0)
        for name, shape in zip(("_u", "_v"), shapes, strict=True):
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, (drawn / drawn.norm()).to(weight.device, weight.dtype))
        if self._v.numel() and not weight.is_meta:
            self.write(*searched(self, weight))
        self.group.forget(self)

    def resize(self, layer: nn.Module, size: tuple[int, ...]) -> None:
        """Begins anew where the input of a convolution has another size."""
        held = tuple(self._v.shape[1:])
        if held == size and self._v.numel():
            return
        if self._v.numel():
            warnings.warn(
                f"spectral_norm_: the norm of a convolution belongs to a size of input, {list(held)} so far, got "
                f"{list(size)}: its power iteration starts anew",
                stacklevel=4,
            )
        self.begin(self.original(), layer, size)

    def original(self) -> Tensor:
        held = self.owner[0]
        weight = held._parameters.get("original")  # what a step of training asks of each layer, in few steps
        return held.original if weight is None else weight

    def as_original(self, weight: Tensor) -> Tensor:
        """The original weight where `weight` is the same memory, as a compiled pass hands it on, whose views have
        versions of their own."""
        held = self.original() if self.leads() else None
        if held is None or weight.is_inference() or held.is_inference():
            return weight
        same = weight.data_ptr() == held.data_ptr() and weight.dtype == held.dtype
        return held if same and weight.shape == held.shape and weight.stride() == held.stride() else weight

    def leads(self) -> bool:
        """Whether it is given the original weight, not what another parametrization makes of it."""
        return bool(self.owner) and self.owner[0]._modules.get("0") is self

    @torch.no_grad()
    def write(self, u: Tensor, v: Tensor) -> None:
        self._u.copy_(u)
        self._v.copy_(v)

    def _apply(self, *arguments, **options):
        super()._apply(*arguments, **options)
        self.group.forget(self)
        return self

    # Whether u and v have been updated for the weights beside them decides what the next pass does, so that a run that
    # is resumed goes on as it would have. It travels in the state dict's metadata: its keys are torch's.

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.group.forget(self)  # a norm that is taken again from u and v may differ in the last bit: here as there
        if hasattr(destination, "_metadata") and self.leads():
            updated = self._updated_for.holds(self.original())
            destination._metadata.setdefault(prefix[:-1], {})["updated"] = updated

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
        keys = [f"{prefix}_u", f"{prefix}_v"]
        values = [state_dict.get(key) for key in keys]
        self._alien = any(value is None for value in values)
        if not self._alien and self.geometry.kind != MATRIX:
            as_convolution = all(value.dim() == self.original().dim() - 1 or not value.numel() for value in values)
            for key, value in zip(keys, values, strict=True):
                held = getattr(self, key.removeprefix(prefix))
                if not as_convolution:  # the vectors of the matrix: its own stay, and are searched anew
                    state_dict[key], self._alien = held, True
                elif value.shape != held.shape:  # of another size of input
                    setattr(self, key.removeprefix(prefix), held.new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        self._updated_for = Seen()
        if local_metadata.get("updated") and self.leads():
            self._updated_for.note(self.original())
        self.group.forget(self)

    def extra_repr(self) -> str:
        kind = "matrix" if self.geometry.kind == MATRIX else "convolution"
        return f"{kind}, " + ", ".join(f"{k}={v}" for k, v in self.settings._asdict().items())


def parts_below(module: nn.Module) -> list[SpectralNorm]:
    """The parametrizations of all layers below a module."""
    return [part for part in module.modules() if isinstance(part, SpectralNorm)]


def join(parts: Iterable[SpectralNorm]) -> None:
    """Makes parts, and those that are with them already, one group."""
    members = list(dict.fromkeys(member for part in parts for member in part.group.members))
    group = Group(members)
    for member in members:
        member.group = group
