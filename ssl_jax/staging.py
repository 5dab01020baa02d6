"""Copies of a state's arrays, for whoever reads them while training goes on and overwrites the originals.

Arrays of an accelerator need none: they are copied to the host anyway. On a CPU the host's view of an array is the
array itself. While somebody holds it, a step that was given the array for its results cannot use it: it takes fresh
memory instead, page by page, which costs more than the step itself. A copy into memory that is there already is done
at the speed of that memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

PyTree = Any


class Staging:
    """Memory for one copy of a tree's arrays, kept from one use to the next."""

    def __init__(self) -> None:
        """Takes no memory yet."""
        self._copies: list[Any] = []

    def copy(self, tree: PyTree) -> PyTree:
        """The tree with copies of what lies in the host's memory as JAX arrays; all other leaves are themselves.

        Nobody may read the copies that the call before has given any more: theirs is the memory.
        """
        import jax

        leaves, structure = jax.tree.flatten(tree)
        places = [number for number, leaf in enumerate(leaves) if _is_on_host(leaf)]
        originals = [leaves[number] for number in places]
        if len(originals) != len(self._copies) or not all(map(_fits, self._copies, originals)):
            self._copies = [original.copy() for original in originals]
        copies, self._copies = self._copies, []
        self._copies = _overwritten(copies, originals)
        for number, copied in zip(places, self._copies, strict=True):
            leaves[number] = copied
        return jax.tree.unflatten(structure, leaves)

    def clear(self) -> None:
        """Gives the memory back."""
        self._copies = []


def _is_on_host(leaf: Any) -> bool:
    import jax

    return isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.sharding.device_set)


def _fits(copy: Any, original: Any) -> bool:
    """Whether one can be overwritten by the other; the same layout may be spelled in several ways."""
    return (copy.shape, copy.dtype) == (original.shape, original.dtype) and copy.sharding.is_equivalent_to(
        original.sharding, original.ndim
    )


def _overwritten(copies: Sequence[Any], originals: Sequence[Any]) -> list[Any]:
    return _program()(copies, originals)


@functools.cache
def _program() -> Any:
    """Made when it is first needed: importing this module does not import JAX."""
    import jax
    import jax.numpy as jnp

    # The copies are given away for the results, which is all that they are there for.
    return jax.jit(lambda _, originals: [jnp.copy(one) for one in originals], donate_argnums=0, keep_unused=True)
