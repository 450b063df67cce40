"""Outputs that are cheaper to make again in the backward pass than to keep until then: of a norm, of a gate.

What they are made from is kept anyway. A layer that would keep such an output for its own backward pass asks `remade`,
and keeps what it says instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Make = Callable[..., Tensor]


class Again:
    """Makes an output once for all layers that will ask for it."""

    def __init__(self, make: Make) -> None:
        self._make, self._askers = make, 0
        self._there: Tensor | None = None

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        """The output, in the bits that it had. The last one to take it leaves nothing behind."""
        there = self._there
        if there is None:
            with torch.no_grad():
                there = self._make(*sources)
        self._askers -= 1
        self._there = there if self._askers > 0 else None
        return there

    def expect(self) -> None:
        """One more layer will take it."""
        self._askers += 1


class Mark:
    """What an output carries: how it is made again, and from what. A copy of the output elsewhere has none."""

    def __init__(self, again: Again, sources: tuple[Tensor, ...]) -> None:
        self.again, self.sources = again, sources

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def remakes(out: Tensor, make: Make, *sources: Tensor) -> Tensor:
    """`out`, marked as what `make` makes of `sources`, which it must not hold itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out.remade = Mark(Again(make), sources)  # type: ignore[attr-defined]
    return out


def remade(x: Tensor) -> tuple[Again | None, tuple[Tensor, ...]]:
    """How to make `x` again and from what, if it is marked: the one goes into a layer's context, the others among what
    it saves for the backward pass."""
    mark: Mark | None = getattr(x, "remade", None)
    if mark is None:
        return None, ()
    mark.again.expect()
    return mark.again, mark.sources
