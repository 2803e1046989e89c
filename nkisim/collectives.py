"""The `nki.collectives` module: names of the collective operations, none of which is simulated.

They move data between chips, and a launch of the simulator is one logical core; AWS's simulator leaves
them out too. Scripts that import the module run as long as no kernel calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from nkisim.objects import NKIObject


class ReplicaGroup(NKIObject):
    """Groups of ranks that take part in a collective operation; kept, not used."""

    def __init__(self, replica_groups: Any = None, **kwargs: Any) -> None:
        super().__init__(replica_groups=replica_groups, **kwargs)


def _missing(name: str) -> Callable[..., NoReturn]:
    def operation(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"nki.collectives.{name}: the simulator runs one logical core, it has no collectives")

    operation.__name__ = operation.__qualname__ = name
    operation.__doc__ = "Not simulated: raises NotImplementedError."
    return operation


all_reduce = _missing("all_reduce")
all_gather = _missing("all_gather")
all_gather_v = _missing("all_gather_v")
reduce_scatter = _missing("reduce_scatter")
all_to_all = _missing("all_to_all")
all_to_all_v = _missing("all_to_all_v")
collective_permute = _missing("collective_permute")
collective_permute_implicit = _missing("collective_permute_implicit")
collective_permute_implicit_reduce = _missing("collective_permute_implicit_reduce")
collective_permute_implicit_current_processing_rank_id = _missing(
    "collective_permute_implicit_current_processing_rank_id"
)
rank_id = _missing("rank_id")
