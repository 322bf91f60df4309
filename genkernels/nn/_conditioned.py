"""What couplings share: a network that reads one part of x, and is not to change it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genkernels.nn._context import check_context
from genkernels.nn._seen import wrapped


def _has_versions(t: Tensor) -> bool:
    """Whether a change of t in place shows in its version."""
    return not (torch.compiler.is_compiling() or t.is_inference() or wrapped(t))


class Conditioned(nn.Module):
    """A layer whose parameters `net` makes of a part of x, a view, and of the context: ``net(x_part[, context])``.

    A network that works in place on its input is given a copy where one of its layers says so.
    """

    #: Whether what the network sees is no view of x.
    _seen_is_new = False

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self._writes = self._announced()

    def params(self, seen: Tensor, context: Tensor | None) -> Tensor:
        """What the network makes of the half that it sees, a view of x, and of the context.

        Raises:
            RuntimeError: the network changed one of them in place. ValueError: the context has not a row a sample.
        """
        check_context(seen, context)
        if context is None and not self._writes and isinstance(seen, Tensor) and _has_versions(seen):  # nearly always
            version = seen._version
            params = self.net(seen)
            if seen._version != version:
                raise RuntimeError(self._changed())
            return params
        tensors = [t for t in (seen, context) if isinstance(t, Tensor)]
        # versions tell a change in place that no layer has announced, where tensors have versions
        watched = all(_has_versions(t) for t in tensors)
        copied = self._writes or (not watched and (self._announced() or not self._known()))
        if copied:
            seen = seen if self._seen_is_new else seen.clone()
            context = context.clone() if isinstance(context, Tensor) else context
        versions = [t._version for t in tensors] if watched and not copied else None
        params = self.net(seen) if context is None else self.net(seen, context)
        if versions is not None and versions != [t._version for t in tensors]:
            raise RuntimeError(self._changed())
        return params

    def _announced(self) -> bool:
        """Whether a layer of the network says that it works in place."""
        return any(getattr(layer, "inplace", False) for layer in self.modules())

    def _known(self) -> bool:
        """Whether the network is made of layers that say so where they do."""
        known = all(type(layer).__module__.startswith(("torch.nn.", "genkernels.")) for layer in self.modules())
        return known and isinstance(self.net, nn.Module)

    def _changed(self) -> str:
        return (
            f"{type(self).__name__}: its network changed what it was given in place, which is part of x or of the "
            "context: let its first operation be out of place"
        )
