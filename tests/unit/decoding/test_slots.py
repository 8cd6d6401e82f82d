"""The slot table: compact rows, minimal moves, integrity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blipstream.decoding.slots import Move, SlotTable


def test_rows_are_given_from_the_front():
    table: SlotTable[str] = SlotTable(3)
    assert [table.append(item) for item in "abc"] == [0, 1, 2]
    assert table.free == 0
    assert table.items == ("a", "b", "c")
    assert table.row_of("b") == 1


def test_the_last_row_moves_into_the_gap():
    table: SlotTable[str] = SlotTable(4)
    for item in "abcd":
        table.append(item)
    assert table.release([1]) == [Move(source=3, target=1)]
    assert table.items == ("a", "d", "c")
    table.check_integrity()


def test_releasing_the_last_row_moves_nothing():
    table: SlotTable[str] = SlotTable(4)
    for item in "abc":
        table.append(item)
    assert table.release([2]) == []
    assert table.items == ("a", "b")


def test_releasing_several_rows_moves_each_survivor_at_most_once():
    table: SlotTable[int] = SlotTable(8)
    for item in range(8):
        table.append(item)
    assert table.release([2, 6, 0]) == [Move(5, 0), Move(7, 2)]
    assert table.items == (5, 1, 7, 3, 4)
    table.check_integrity()


def test_a_full_table_refuses():
    table: SlotTable[str] = SlotTable(1)
    table.append("a")
    with pytest.raises(IndexError, match="all 1 slots are taken"):
        table.append("b")


def test_an_item_holds_one_slot():
    table: SlotTable[str] = SlotTable(2)
    table.append("a")
    with pytest.raises(ValueError, match="already holds slot 0"):
        table.append("a")


def test_a_free_row_cannot_be_released():
    table: SlotTable[str] = SlotTable(2)
    table.append("a")
    with pytest.raises(IndexError, match=r"rows \[1\] cannot be released: rows 0 to 0 are taken"):
        table.release([1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table._items.pop(),
        lambda table: table._items.reverse(),
        lambda table: table._rows.pop("a"),
        lambda table: table._items.append("a"),
        lambda table: table._items.extend("xyz"),
    ],
)
def test_integrity_check_sees_damage(damage):
    table: SlotTable[str] = SlotTable(4)
    table.append("a")
    table.append("b")
    table.check_integrity()
    damage(table)
    with pytest.raises(AssertionError):
        table.check_integrity()


@given(st.integers(1, 6), st.lists(st.one_of(st.none(), st.sets(st.integers(0, 5))), max_size=30))
def test_contents_follow_their_items(capacity, actions):
    """A memory that copies what it is told to copy always holds each item's own contents."""
    table: SlotTable[int] = SlotTable(capacity)
    memory: list[int | None] = [None] * capacity
    for number, action in enumerate(actions):
        if action is None and table.free:
            memory[table.append(number)] = number
        elif action is not None:
            rows = {row for row in action if row < len(table)}
            leaving = {table.items[row] for row in rows}
            before = set(table.items)
            moves = table.release(rows)
            assert len(moves) <= len(rows)
            for move in moves:
                memory[move.target] = memory[move.source]
            assert set(table.items) == before - leaving
        table.check_integrity()
        assert memory[: len(table)] == list(table.items)
