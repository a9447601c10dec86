"""Memory that the processes of a server share."""

import os

import pytest
from conftest import in_child

from appliance.base.shared import Buckets, Byte, ChangeMarks, Real, Numbers, Shared


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


class TestChangeMarks:
    def cells(self, path):
        content = path.read_bytes()
        return [content[at : at + 8] for at in range(ChangeMarks.HEAD, len(content), 8)]

    def changed(self, path, work):
        before = self.cells(path)
        work()
        return [number for number, (one, two) in enumerate(zip(before, self.cells(path), strict=True)) if one != two]

    def test_what_any_process_marks_every_reader_sees(self, tmp_path):
        path = tmp_path / "marks"
        marks = ChangeMarks(str(path), 9040)
        assert path.read_bytes()[:8] == b"madmark1" and path.read_bytes()[16:24] == (9040).to_bytes(8, "big")
        assert path.stat().st_mode & 0o777 == 0o600 and len(self.cells(path)) == 4096
        ChangeMarks(str(tmp_path / "run"), 9040, 0o644)
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o644
        (cell,) = self.changed(path, lambda: in_child(lambda: marks.touch("a key")))
        assert self.changed(path, lambda: marks.touch("a key")) == [cell] != [0]
        assert self.changed(path, marks.touch) == self.changed(path, lambda: marks.touch("")) == [0]
        assert len({number for key in range(99) for number in self.changed(path, lambda: marks.touch(f"{key}"))}) > 90

    def test_each_start_has_a_number_of_its_own_and_a_file_of_its_own(self, tmp_path):
        path = tmp_path / "marks"
        first = ChangeMarks(str(path), 1)
        before = path.read_bytes()
        ChangeMarks(str(path), 1)
        assert path.read_bytes()[8:16] != before[8:16]
        first.touch()
        assert self.cells(path)[0] == bytes(8)

    def test_a_command_marks_the_file_of_its_own_server_alone(self, tmp_path):
        path = tmp_path / "marks"
        ChangeMarks(str(path), 1)
        assert self.changed(path, lambda: ChangeMarks.touch_file(str(path), 2)) == []
        assert self.changed(path, lambda: ChangeMarks.touch_file(str(path), 1)) == [0]
        ChangeMarks.touch_file(str(tmp_path / "missing"), 1)
        (tmp_path / "link").symlink_to(path)
        assert self.changed(path, lambda: ChangeMarks.touch_file(str(tmp_path / "link"), 1)) == []

    def test_without_a_place_for_it_nothing_is_marked_and_nothing_fails(self, tmp_path):
        for path in ("", str(tmp_path / "no" / "folder")):
            ChangeMarks(path, 1).touch("key")
