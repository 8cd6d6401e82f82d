"""Which sequence holds which row of the KV cache: compact, so that a step needs no gather."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Move:
    """The contents of row ``source`` must be copied over row ``target``."""

    source: int
    target: int


class SlotTable(Generic[T]):
    """Rows ``0 .. capacity - 1``, of which the running items always hold the first n.

    The table keeps the books alone; whoever calls :meth:`release` copies the rows that moved.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: list[T] = []
        self._rows: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> Sequence[T]:
        """The running items; the index is the row. A copy: it does not follow later changes."""
        return tuple(self._items)

    @property
    def free(self) -> int:
        """Rows that nobody holds; they come after the running ones."""
        return self.capacity - len(self._items)

    def row_of(self, item: T) -> int:
        """Row that a running item holds."""
        return self._rows[item]

    def append(self, item: T) -> int:
        """Give the first free row to an item and return that row."""
        if not self.free:
            raise IndexError(f"all {self.capacity} slots are taken")
        if item in self._rows:
            raise ValueError(f"the item already holds slot {self._rows[item]}")
        row = len(self._items)
        self._items.append(item)
        self._rows[item] = row
        return row

    def release(self, rows: Collection[int]) -> list[Move]:
        """Free the given rows; survivors from the end take those that lie before the new end, each at most once."""
        leaving = set(rows)
        if not leaving <= set(range(len(self._items))):
            raise IndexError(f"rows {sorted(leaving)} cannot be released: rows 0 to {len(self._items) - 1} are taken")
        end = len(self._items) - len(leaving)
        holes = sorted(row for row in leaving if row < end)
        movers = [row for row in range(end, len(self._items)) if row not in leaving]
        moves = [Move(source, target) for source, target in zip(movers, holes, strict=True)]
        for row in leaving:
            del self._rows[self._items[row]]
        for move in moves:
            item = self._items[move.source]
            self._items[move.target] = item
            self._rows[item] = move.target
        del self._items[end:]
        return moves

    def check_integrity(self) -> None:
        """Raise :class:`AssertionError` unless every running item holds exactly one row, and the rows are compact."""
        if len(self._items) > self.capacity:
            raise AssertionError(f"{len(self._items)} items hold {self.capacity} slots")
        if self._rows != {item: row for row, item in enumerate(self._items)}:
            raise AssertionError(f"rows by item {self._rows} and items by row {self._items} disagree")
        if len(self._rows) != len(self._items):
            raise AssertionError(f"{len(self._items)} rows are held by {len(self._rows)} items")
