"""The write-ahead log: the mark of what in it was acknowledged, what a start finds damaged, and what it does not."""

import contextlib
import functools
import itertools
import os
import random
import shutil
import struct
from pathlib import Path

import microauthd as m
import msgspec
import pytest
from box import Box
from conftest import PASSWORD, Caller, die, in_child, made, opened, under_way
from appliance.base import StartupError
from appliance.base.database import derive_key
from appliance.base.objects import CreateUser
from appliance.base.store import Store
from appliance.base.wal import HEAD_SIZE, MARK_AT, RESTARTS, Mark, MarkFile, find_damage, read_frames
from appliance.commands import main
from appliance.processes import hold_database, prepare
from appliance.recovery import back_up, describe_log, factory_reset, open_idp, restore

FRAME = 24 + 4096


@functools.cache
def key_of(salt):
    return derive_key("a phrase", salt)  # a tenth of a second: once for all copies


def store_of(folder):
    return Store(str(folder / "mad.db3"), key_of((folder / "mad.db3").read_bytes()[:16]))


def start(folder):
    """What a start finds: the damage it notes, or nothing."""
    store = store_of(folder)
    try:
        store.open()
        return store.meta("log_damaged")
    finally:
        store.close()


def mark_of(folder):
    file = MarkFile(str(folder / "mad.db3"))
    try:
        return file.read()
    finally:
        file.close()


def put_mark(folder, mark):
    file = MarkFile(str(folder / "mad.db3"))
    file.write(mark)
    file.close()


def log_of(folder):
    return folder / "mad.db3-wal"


def flip(path, at, bit=1):
    with open(path, "r+b") as file:
        file.seek(at)
        octet = file.read(1)[0]
        file.seek(at)
        file.write(bytes([octet ^ bit]))


def write(store, name):
    """A commit of several frames that is on the disk."""
    with store.transaction():
        store.put_meta(name, os.urandom(3000).hex())


def batch(store, number):
    """A commit that is not synced, as of machine tokens."""
    store.enqueue((f"{number:032x}", "app", "app", 1, 2), None)
    store.flush()


def killed(folder, work):
    """Run something with the store of a house in a process that is killed: what it acknowledged is in the log alone."""

    def run():
        store = store_of(folder)
        store.open()
        work(store)
        die()

    assert in_child(run)
    return folder


def write_ten(store):
    for number in range(10):
        write(store, f"late{number}")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A box that was set up; killed with ten commits in its log; killed with four batches and a commit behind them."""
    folder = tmp_path_factory.mktemp("wal")
    with contextlib.chdir(folder):
        for name in ("clean", "killed", "batches"):
            (folder / name).mkdir()
        made(folder / "clean", **{
            f"{name}_file": str(folder / "clean" / file) for name, file in (
                ("db", "mad.db3"), ("seal_key", "seal.key"), ("token_signing_key", "token.pem"),
                ("admin_token_signing_key", "admin_token.pem"),
            )
        })  # fmt: skip
    for name in ("killed", "batches"):
        shutil.copytree(folder / "clean", folder / name, dirs_exist_ok=True)
    killed(folder / "killed", write_ten)

    def batches(store):
        write_ten(store)
        for number in range(4):
            batch(store, number)
        store.mark.note_commit = die  # on its way to the disk: nobody was told
        write(store, "last")

    killed(folder / "batches", batches)
    return folder


@pytest.fixture
def copy(boxes, tmp_path):
    """A copy of one of the boxes, anew with each call."""
    numbers = itertools.count()
    return lambda name="killed": shutil.copytree(boxes / name, tmp_path / str(next(numbers)))


class TestMark:
    def test_it_names_the_last_frame_that_was_acknowledged(self, boxes):
        mark, frames = mark_of(boxes / "killed"), list(read_frames(str(boxes / "killed" / "mad.db3"), 0))
        assert len(frames) > 15 and all(frame.is_valid for frame in frames) and frames[-1].is_commit
        assert (mark.frames, mark.checksum, mark.salt) == (len(frames), frames[-1].checksum, frames[-1].salt)
        assert not mark.may_be_gone and mark.at_ms

    def test_a_batch_is_not_acknowledged_nor_is_an_empty_commit_behind_it(self, copy):
        """Nothing was written, so nothing was synced: after a power cut the batch may be gone."""
        before = mark_of(copy("batches"))
        assert before.seen > before.frames > 0

        def work(store):
            write(store, "first")
            batch(store, 1)
            with store.transaction():
                store.run("UPDATE meta SET value = '' WHERE name = 'nobody'")

        mark = mark_of(killed(copy("clean"), work))
        assert 0 < mark.frames < mark.seen

    def test_it_follows_a_log_that_begins_again(self, copy):
        def work(store):
            write(store, "first")
            store.connection.execute("PRAGMA wal_checkpoint(RESTART)")
            write(store, "second")

        folder = killed(copy("clean"), work)
        mark = mark_of(folder)
        assert mark.salt == log_of(folder).read_bytes()[16:24] and mark.frames and not start(folder)

    def test_one_that_is_damaged_promises_nothing(self, copy):
        folder = copy()
        flip(folder / "mad.db3.lock", MARK_AT + 20)
        assert mark_of(folder) == Mark() and not start(folder)

    def test_a_database_that_was_never_served_has_none(self, tmp_path):
        path = str(tmp_path / "copy.db3")
        store = Store.make(path, "", 1)
        write(store, "x")
        assert store.mark.read() is None
        store.close()
        assert os.listdir(tmp_path) == ["copy.db3"]

    def test_the_pid_of_the_server_and_the_mark_share_the_lock_file(self, copy):
        folder = copy()
        before = mark_of(folder)
        with hold_database(str(folder / "mad.db3")):
            assert mark_of(folder) == before
            with pytest.raises(StartupError, match=f"as process {os.getpid()}: stop it first$"), hold_database(str(folder / "mad.db3")):
                pass

    def test_a_commit_stands_whatever_happens_to_its_mark(self, copy, monkeypatch):
        store = store_of(copy("clean"))
        store.open()

        def fail(*args):
            raise OSError(28, "no space")

        monkeypatch.setattr("appliance.base.wal.os.pwrite", fail)
        store.put_meta("x", "y")
        assert store.meta("x") == "y"
        store.close()


class TestDamage:
    """Every kind of it, on a log that was acknowledged to its end."""

    def test_a_flipped_bit_in_any_frame(self, copy, boxes):
        size, chance = log_of(boxes / "killed").stat().st_size, random.Random(1)
        for at in range(HEAD_SIZE, size, FRAME):
            for place in (0, 5, 9, 17, chance.randrange(24, FRAME)):  # page, size, salt, checksum; the page itself
                folder = copy()
                flip(log_of(folder), at + place, 1 << chance.randrange(8))
                assert "acknowledged" in start(folder), (at, place)

    def test_one_that_is_cut_short(self, copy, boxes):
        size, chance = log_of(boxes / "killed").stat().st_size, random.Random(2)
        for end in range(HEAD_SIZE, size, FRAME):
            for more in (0, chance.randrange(1, FRAME)):
                folder = copy()
                os.truncate(log_of(folder), end + more)
                assert "acknowledged" in start(folder), end

    @pytest.mark.parametrize("gone", [os.unlink, lambda path: os.truncate(path, 0)])
    def test_one_that_is_gone_or_empty(self, copy, gone):
        folder = copy()
        gone(log_of(folder))
        assert "gone or empty" in start(folder)

    def test_an_older_one_of_the_same_box(self, copy):
        folder, older = copy(), killed(copy("clean"), lambda store: write(store, "x"))
        shutil.copy(log_of(older), log_of(folder))
        with contextlib.suppress(StartupError):  # pages of another time may not fit the database: that is refused
            assert "another one" in start(folder)

    def test_a_header_that_is_damaged_is_refused(self, copy):
        for at in range(HEAD_SIZE):
            folder = copy()
            flip(log_of(folder), at)
            with pytest.raises(StartupError, match="write-ahead log"):
                start(folder)

    def test_one_moved_away_as_the_refusal_advises_is_found_gone(self, copy):
        folder = copy()
        log_of(folder).rename(folder / "aside")
        assert "gone" in start(folder)

    def test_a_start_that_is_killed_before_it_has_noted_it_leaves_it_to_the_next(self, copy):
        folder = copy()
        flip(log_of(folder), HEAD_SIZE + 100)

        def work():
            store = store_of(folder)
            store.note_log_damage = die
            store.open()

        assert in_child(work) and start(folder)

    def test_one_that_is_killed_when_it_has_noted_it_leaves_nothing_to_the_next(self, copy):
        folder = copy()
        flip(log_of(folder), HEAD_SIZE + 10 * FRAME + 100)
        killed(folder, lambda store: None)
        assert log_of(folder).exists() and start(folder)
        store = store_of(folder)
        assert len(store.list_audit("log_damaged")) == 1
        store.close()

    def test_it_is_found_once_and_stays_noted(self, copy):
        folder = copy()
        flip(log_of(folder), HEAD_SIZE + 100)
        noted = start(folder)
        epoch = store_of(folder)
        before = epoch.meta("revoked_before")
        epoch.close()
        assert start(folder) == noted
        killed(folder, write_ten)
        assert start(folder) == noted
        epoch = store_of(folder)
        assert epoch.meta("revoked_before") == before
        epoch.close()


class TestNoFalseAlarm:
    """What a crash, a power cut or an operator leaves that did nothing wrong."""

    def test_kill_9(self, copy):
        assert not start(copy())

    def test_a_clean_stop(self, copy):
        folder = copy()
        assert not start(folder) and mark_of(folder).may_be_gone and not log_of(folder).exists()
        assert not start(folder)

    def test_a_kill_while_it_closes(self, copy):
        """After the mark was written and before, and after, the log was removed."""
        folder = copy()
        put_mark(folder, msgspec.structs.replace(mark_of(folder), may_be_gone=True))
        assert not start(folder)
        folder = copy()
        put_mark(folder, msgspec.structs.replace(mark_of(folder), may_be_gone=True))
        shutil.copy(folder / "mad.db3", folder / "x")
        log_of(folder).unlink()
        assert not start(folder)

    def test_what_a_power_cut_does_to_frames_that_were_not_synced(self, copy, boxes):
        """Each is there, torn or not there, whatever stands behind it."""
        mark, size = mark_of(boxes / "batches"), log_of(boxes / "batches").stat().st_size
        first, last = mark.frames, (size - HEAD_SIZE) // FRAME
        assert last - first >= 6
        for lost in itertools.chain.from_iterable(itertools.combinations(range(first, last), n) for n in (1, 2, last - first)):
            folder = copy("batches")
            with open(log_of(folder), "r+b") as file:
                for number in lost:
                    file.seek(HEAD_SIZE + FRAME * number + 512)
                    file.write(bytes(1024))
            assert not start(folder), lost
        for end in range(HEAD_SIZE + FRAME * first, size, 1000):
            folder = copy("batches")
            os.truncate(log_of(folder), end)
            assert not start(folder)

    def test_a_log_that_goes_on_where_a_power_cut_has_torn_it_is_marked_from_there(self, copy):
        folder = copy("batches")
        before = mark_of(folder)
        os.truncate(log_of(folder), HEAD_SIZE + FRAME * before.frames)
        killed(folder, lambda store: store.put_meta("x", "y"))
        assert before.frames < mark_of(folder).frames < before.seen and not start(folder)

    def test_a_mark_that_is_older_than_the_log(self, copy):
        """It is never synced for its own sake."""
        def work(store):
            for number in range(6):
                if number == 3:
                    store.connection.execute("PRAGMA wal_checkpoint(RESTART)")
                write(store, f"x{number}")
                with open(store.path + ".lock", "rb") as file:
                    Path(store.path).with_name(f"mark{number}").write_bytes(file.read())

        folder = killed(copy("clean"), work)
        marks = sorted(folder.glob("mark*"))
        assert len({path.read_bytes() for path in marks}) == 6
        for path in marks:
            again = shutil.copytree(folder, folder.with_name(path.name))
            shutil.copy(path, again / "mad.db3.lock")
            assert not start(again), path.name

    @pytest.mark.parametrize("lock", [None, b"", b"123\n", b"123\n" + bytes(200)])
    def test_an_upgrade_from_a_release_that_marks_nothing(self, copy, lock):
        folder = copy()
        (folder / "mad.db3.lock").unlink()
        if lock is not None:
            (folder / "mad.db3.lock").write_bytes(lock)
        with hold_database(str(folder / "mad.db3")):
            assert not start(folder)
            assert mark_of(folder) and not mark_of(folder).frames

    def test_a_downgrade_and_back(self, copy):
        """A release that knows no mark truncates the lock file when it serves, and removes the log when it stops."""
        folder = copy()
        (folder / "mad.db3.lock").write_bytes(b"123\n")
        log_of(folder).unlink()
        with hold_database(str(folder / "mad.db3")):
            assert not start(folder)

    def test_a_log_begun_anew_after_a_failed_sync(self, copy):
        def emptied(store):
            write_ten(store)
            store.generation.unsynced = 1
            store.check_files_unchanged = die  # the log is empty, and the commit not begun
            store.put_meta("x", "y")

        folder = killed(copy("clean"), emptied)
        assert log_of(folder).stat().st_size == 0 and not start(folder)

        def begun(store):
            write_ten(store)
            store.generation.unsynced = 1
            store.put_meta("x", "y")
            assert log_of(Path(store.path).parent).stat().st_size < 10 * FRAME

        assert not start(killed(copy("clean"), begun))

    def test_several_processes_of_which_the_last_removes_the_log(self, copy):
        folder = copy("clean")
        first, second = store_of(folder), store_of(folder)
        first.open()
        second.open()
        write(second, "a")
        write(first, "b")
        first.close()
        assert mark_of(folder).may_be_gone and log_of(folder).exists()
        write(second, "c")
        assert not mark_of(folder).may_be_gone
        second.close()
        assert not log_of(folder).exists() and not start(folder)

    def test_a_restore_and_a_reset(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        house = made(tmp_path)
        back_up(house, "b")
        killed(tmp_path, write_ten)
        restore(house, "b")
        assert not start(tmp_path)
        killed(tmp_path, write_ten)
        factory_reset(house)
        (tmp_path / "mad.conf").unlink()
        made(tmp_path)
        assert not start(tmp_path)


class TestWithoutMark:
    """The first start of a release that writes one: two commits behind a bad frame were not torn by a power cut."""

    def forget(self, folder):
        (folder / "mad.db3.lock").write_bytes(b"123\n")
        return folder

    def test_two_commits_behind_a_bad_frame_are_damage_and_one_is_not(self, copy, boxes):
        frames = list(read_frames(str(boxes / "killed" / "mad.db3"), 0))
        for number in range(len(frames)):
            behind = sum(frame.is_commit for frame in frames[number + 1 :])
            folder = self.forget(copy())
            flip(log_of(folder), HEAD_SIZE + FRAME * number + 1000)
            assert bool(start(folder)) == (behind >= 2), number

    def test_what_stands_there_of_an_older_log_is_none(self, copy):
        def work(store):
            write_ten(store)
            store.connection.execute("PRAGMA wal_checkpoint(RESTART)")
            write(store, "x")

        folder = self.forget(killed(copy("clean"), work))
        assert log_of(folder).stat().st_size > 10 * FRAME and not start(folder)

    def test_nor_is_one_that_is_gone(self, copy):
        folder = self.forget(copy())
        log_of(folder).unlink()
        assert not start(folder)


class TestFindDamage:
    """The table of a mark against a log whose header is good."""

    @pytest.mark.parametrize(
        "restarts, gone, damaged",
        [
            (0, False, False), (1, False, False), (RESTARTS, False, False), (RESTARTS + 1, False, True),
            (-1, False, True), (-1, True, False), (1 << 31, True, False),
        ],
    )
    def test_a_log_of_another_salt(self, boxes, restarts, gone, damaged):
        path, mark = str(boxes / "killed" / "mad.db3"), mark_of(boxes / "killed")
        (first,) = struct.unpack(">I", mark.salt[:4])
        salt = struct.pack(">I", first - restarts & 0xFFFFFFFF) + mark.salt[4:]
        assert bool(find_damage(path, msgspec.structs.replace(mark, salt=salt, may_be_gone=gone), mark.frames)) == damaged

    @pytest.mark.parametrize("frames, damaged", [(0, True), (-1, True), (1, False)])
    def test_a_log_of_fewer_frames(self, boxes, frames, damaged):
        path, mark = str(boxes / "killed" / "mad.db3"), mark_of(boxes / "killed")
        assert bool(find_damage(path, mark, mark.frames - 1 if frames < 1 else mark.frames)) == damaged
        other = msgspec.structs.replace(mark, checksum=bytes(8))
        assert "another one" in find_damage(path, other, mark.frames)


class TestWhatFollows:
    """As after a restore: everything issued before is dead. It is reported until an operator has settled it."""

    @pytest.fixture
    def house(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        return made(tmp_path)

    def damage(self, house, work=lambda idp: None):
        def run():
            idp = open_idp(house)
            work(idp)
            m.create_user(idp, m.LOCAL.acting_as("t"), CreateUser("late", "late@example.org", PASSWORD))
            die()

        in_child(run)
        flip(house.db_file + "-wal", HEAD_SIZE + 1000)

    def issue(self, idp):
        return m.issue(idp, m.find_client(idp, "app"), m.Granted("api:read", "client_credentials"), m.LOCAL)

    def test_what_was_issued_before_is_dead_and_what_is_issued_now_is_good(self, house):
        idp = opened(house)
        token = self.issue(idp)["access_token"]
        under_way(idp, m.get_user(idp, "root").id)
        idp.store.close()
        self.damage(house)
        idp = opened(house)
        with pytest.raises(m.Problem):
            m.verify_access_token(idp, idp.auth_ring, house.auth_issuer, token)
        fresh = self.issue(idp)["access_token"]
        assert m.verify_access_token(idp, idp.auth_ring, house.auth_issuer, fresh)
        assert not idp.store.find_code("c") and not idp.store.exists("SELECT 1 FROM login_transaction")
        assert idp.store.verify_audit()["valid"]
        rows = idp.store.list_audit("log_damaged")
        assert len(rows) == 1 and "acknowledged" in rows[0].secondary and rows[0].result == "failure"
        idp.store.close()

    def test_the_epoch_is_later_than_the_last_issue_where_the_clock_is_behind(self, house):
        self.damage(house)
        folder = Path(house.db_file).parent
        mark = mark_of(folder)
        later = mark.at_ms + 86_400_000  # no row is so late: what stood in the log is lost
        put_mark(folder, msgspec.structs.replace(mark, at_ms=later))
        store = store_of(folder)
        store.clock = lambda: 1000.0
        store.open()
        assert later < int(store.meta("revoked_before")) < later + 1000
        store.close()

    def test_health_and_log_and_status_say_so_until_it_is_settled(self, house, capsys):
        self.damage(house)
        startup = prepare(house)
        for sock in (*startup.auth_sockets, startup.admin_socket):
            sock.close()
        text = Path("microauthd.log").read_text()
        assert "log.damaged" in text and "acknowledged" in text
        assert "acknowledged" in describe_log(house)
        idp = opened(house)
        for routes in (m.AUTH, m.ADMIN):
            answer = Caller(m.App(idp, routes)).get("/health/ready")
            assert answer.status == 200 and answer.json["warnings"] == [m.LOG_DAMAGED]
        assert main(["log", "status", "--config", "mad.conf"]) == 1
        assert "acknowledged" in capsys.readouterr().out
        assert main(["log", "accept", "--config", "mad.conf"]) == 0
        assert main(["log", "status", "--config", "mad.conf"]) == 0
        idp.readiness = (0.0, {})
        assert "warnings" not in Caller(m.App(idp, m.AUTH)).get("/health/ready").json
        assert len(idp.store.list_audit("log_accepted")) == 1
        assert main(["log", "accept", "--config", "mad.conf"]) == 0
        assert len(idp.store.list_audit("log_accepted")) == 1
        assert main(["log", "what", "--config", "mad.conf"]) == 2
        idp.store.close()

    def test_a_restore_over_it_does_not_say_that_it_knows_what_was_revoked(self, house):
        back_up(house, "b")
        self.damage(house)
        assert restore(house, "b")["knows_revoked"] is False


class TestBoxes:
    """Real processes, killed under load, stopped and started again."""

    @pytest.mark.parametrize("workers", [0, 2])
    def test_none_that_is_honest_is_warned_of_and_one_that_is_damaged_is(self, tmp_path, workers):
        def warned(box):
            return "warnings" in box.call(box.admin_port, "GET", "/health/ready").json

        box = Box(tmp_path / "data", workers=str(workers)).set_up().start()
        try:
            for number in range(3):
                box.new_user(f"late{number}")
                assert box.token().status == 200
            assert box.run("backup", "beside.backup").returncode == 0
            box.new_user("last")
            box.kill()
            box.start()
            assert not warned(box) and box.stop() == 0
            assert mark_of(box.folder).may_be_gone and not log_of(box.folder).exists()
            box.start()
            assert not warned(box)
            token = box.token().json["access_token"]
            box.new_user("revived")
            box.kill()
            flip(log_of(box.folder), HEAD_SIZE + 1000)
            assert box.run("log", "status").returncode == 1
            box.start()
            assert warned(box) and "log.damaged" in box.log()
            assert not box.auth("/introspect", {"token": token}, client=box.client).json["active"]
            assert box.run("log", "accept").returncode == 0
            box.stop()
            box.start()
            assert not warned(box)
        finally:
            if box.process.poll() is None:
                box.kill()
