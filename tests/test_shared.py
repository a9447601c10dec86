"""Memory that the processes of a server share."""

import os

from appliance.base.shared import Byte, Real, Numbers, Shared


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
