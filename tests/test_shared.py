"""Memory that the processes of a server share."""

import os

import pytest
from conftest import in_child

from appliance.base.shared import Buckets, Byte, Real, Numbers, Shared


class Example(Shared):
    flag = Byte()
    time = Real()
    beats = Numbers("B", 3)
    counts = Numbers("Q", 2)
    last = Byte()


class TestShared:
    def test_every_field_begins_as_zero_and_keeps_what_only_it_was_given(self):
        shared = Example()
        assert (shared.flag, shared.time, [*shared.beats], [*shared.counts], shared.last) == (0, 0.0, [0] * 3, [0] * 2, 0)
        shared.flag, shared.time, shared.beats[2], shared.counts[1], shared.last = 255, -1.5, 7, 2**64 - 1, 1
        assert (shared.flag, shared.time, [*shared.beats], [*shared.counts], shared.last) == (
            255, -1.5, [0, 0, 7], [0, 2**64 - 1], 1,
        )

    def test_what_a_child_writes_is_seen_here(self):
        shared = Example()
        child = os.fork()
        if child == 0:
            shared.time, shared.counts[0] = 2.5, 9
            os._exit(0)
        os.waitpid(child, 0)
        assert (shared.time, shared.counts[0]) == (2.5, 9)

    def test_two_of_a_kind_share_nothing(self):
        one, other = Example(), Example()
        one.flag = 1
        assert other.flag == 0


class TestBuckets:
    def test_what_one_process_takes_every_process_misses(self):
        buckets = Buckets()
        assert buckets.get(("name", "a"), (20, 5.0)) == (20, 5.0)
        assert in_child(lambda: buckets.put(("name", "a"), 3.5, 7.0)) == 0
        assert buckets.get(("name", "a"), (20, 5.0)) == (3.5, 7.0)
        assert buckets.get(("name", "b"), (20, 5.0)) == (20, 5.0)

    def test_the_least_recently_used_of_a_set_gives_way(self, monkeypatch):
        monkeypatch.setattr(Buckets, "SETS", 1)
        buckets = Buckets()
        for number in range(8):
            buckets.put((number,), number, 100.0 + number)
        buckets.put((0,), -1, 200.0)
        buckets.put(("new",), -2, 201.0)
        found = [buckets.get((key,), (None, 0))[0] for key in (*range(8), "new")]
        assert found == [-1, None, 2, 3, 4, 5, 6, 7, -2]

    @pytest.mark.parametrize("name", ["\udcff", "x" * 100_000, ""])
    def test_any_key_has_a_place(self, name):
        buckets = Buckets()
        buckets.put(("name", name), 1, 2.0)
        assert buckets.get(("name", name), (0, 0)) == (1, 2.0)

    def test_nobody_can_tell_which_keys_share_a_set(self):
        assert Buckets().places(("a",)) != Buckets().places(("a",))
