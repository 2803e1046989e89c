"""Scheduling edges between instructions: those that no schedule can meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from nkisim.errors import NkiError, Site, call_site


class Issued:
    """An instruction that was issued, by its name or number.

    `key` is equal for all trips of a loop through the same instruction.
    """

    __slots__ = ("_handle", "key", "position", "scope")

    def __init__(self, handle: str | int, position: int, scope: tuple[int, ...], key: tuple[int, ...]) -> None:
        self._handle = handle
        self.position = position
        self.scope = scope
        self.key = key

    @property
    def label(self) -> str:
        """The name or number as messages show it."""
        return str(self._handle)


@dataclass(frozen=True)
class _Edge:
    consumer: Issued
    producer: Issued
    what: str
    source: str
    site: Site

    def refuse(self, rule: str, received: str, allowed: str) -> NoReturn:
        raise NkiError(
            self.what, "producers", rule, received=received, allowed=allowed, source=self.source, site=self.site
        )


class Ordering:
    """Names of the instructions of a core, and the edges between them."""

    def __init__(self) -> None:
        self.names: dict[str, Issued] = {}
        self.ambiguous: set[str] = set()
        self._edges: dict[tuple[tuple[int, ...], tuple[int, ...]], _Edge] = {}
        self._backward = False

    def name(self, name: str, issued: Issued) -> None:
        """An instruction with a name was issued."""
        before = self.names.get(name)
        if before is not None and before.key != issued.key:
            self.ambiguous.add(name)
        self.names[name] = issued

    def add(self, consumer: Issued, producer: Issued, what: str, source: str) -> None:
        """Order `consumer` after `producer`; refuse what cannot be met whatever else is ordered."""
        edge = _Edge(consumer, producer, what, source, call_site())
        if consumer.key == producer.key:
            edge.refuse("edge from an instruction to itself", repr(consumer.label), "another instruction")
        # The compiler may reorder what does not depend on each other, on one engine too, so an edge against
        # program order is no mistake; only a circle needs one.
        self._backward = self._backward or consumer.position < producer.position
        self._edges.setdefault((consumer.key, producer.key), edge)

    def check(self) -> None:
        """Refuse edges that wait for each other in a circle."""
        if not self._backward:
            return
        nodes = {i.key: i for edge in self._edges.values() for i in (edge.consumer, edge.producer)}
        after: dict[tuple[int, ...], list[tuple[int, ...]]] = {key: [] for key in nodes}
        for consumer, producer in self._edges:
            after[producer].append(consumer)
        circle = _circle(after)
        if circle:
            steps = set(pairwise(circle))
            edge = next(e for (c, p), e in self._edges.items() if (p, c) in steps)
            received = " before ".join(repr(nodes[key].label) for key in circle)
            edge.refuse("circle of scheduling edges", received, "edges that some order of the instructions meets")


def _circle(after: dict[tuple[int, ...], list[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Nodes of a circle, its first one again at the end; empty if there is none."""
    done: set[tuple[int, ...]] = set()
    for root in after:
        path: list[tuple[int, ...]] = []
        on_path: set[tuple[int, ...]] = set()
        stack = [(root, iter([root]))]
        while stack:
            step = next(stack[-1][1], None)
            if step is None:
                stack.pop()
                if path and stack:
                    done.add(path[-1])
                    on_path.discard(path.pop())
            elif step in on_path:
                return [*path[path.index(step) :], step]
            elif step not in done:
                path.append(step)
                on_path.add(step)
                stack.append((step, iter(after[step])))
    return []
