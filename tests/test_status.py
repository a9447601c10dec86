"""How the box is, and what needs attention: `microauthd status`, GET /status and `mad status` from one source."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import microauthd as m
import msgspec
import pytest
from box import Box
from conftest import DAY, die, in_child, opened
from appliance import status as room
from appliance.base import StartupError
from appliance.commands import main
from appliance.processes import find_server, hold_database
from appliance.recovery import describe_status
from appliance.status import ATTENTION, gather_status

SOUND = {"keys": True, "clock": True, "database": True}


@pytest.fixture
def attention(idp, clock):
    """Gather the status of a box whose database was made just now: {code: item} of what needs attention."""

    def call(checks=SOUND, **changes):
        status = gather_status(idp, 0, checks)
        for name, value in changes.items():
            setattr(status, name, value)
        return {found.code: found for attend in ATTENTION for found in attend(idp, status)}

    idp.store.put_meta("created_at", idp.now())
    return call


class TestWhatNeedsAttention:
    def test_a_sound_box_needs_none(self, attention):
        assert attention() == {}

    @pytest.mark.parametrize("check", ["database", "keys", "answer"])
    def test_a_server_that_cannot_serve_does(self, attention, check):
        assert attention({**SOUND, check: False})["not_ready"].severity == "error"

    def test_a_process_that_is_missing_does_and_a_server_that_is_stopped_does_not(self, attention):
        workers = room.Workers(3, 2)
        assert "2 of 3" in attention(workers=workers, pid=1)["processes_missing"].text
        assert attention(workers=room.Workers(3, 3), pid=1) == attention(workers=workers, pid=None) == {}

    def test_a_damaged_log_does_until_it_is_settled(self, idp, attention):
        idp.store.put_meta("log_damaged", "frame 7")
        assert attention()["log_damaged"].command == "microauthd log status"
        idp.store.settle_log_damage()
        assert attention() == {}

    @pytest.mark.parametrize(
        "state, severity",
        [("guessed", "error"), ("behind", "error"), ("ahead", "error"), ("probation", "warning"), ("right", None)],
    )
    def test_a_clock_that_is_not_believed_does(self, attention, state, severity):
        found = attention(clock=room.ClockObject(state, "2026-12-01T00:00:00Z")).get("clock_wrong")
        assert (found.severity if found else None) == severity

    @pytest.mark.parametrize(
        "free, severity", [(1_000_000, "error"), (60_000_000, "warning"), (263_000_000, "warning"), (265_000_000, None)]
    )
    def test_a_disk_without_room_for_another_copy_does(self, attention, free, severity):
        disk = room.Disk(free, 10**9, database=100_000_000, wal=0, log=0)
        found = attention(disk=disk).get("disk_low")
        assert (found.severity if found else None) == severity

    def test_a_box_without_a_backup_does_after_a_week(self, clock, attention):
        clock.pass_(7 * DAY)
        assert attention() == {}
        clock.pass_(1)
        found = attention()["backup_old"]
        assert "no backup" in found.text and found.since == m.iso(int(clock()) - 1)

    def test_an_upgrade_that_was_interrupted_does(self, idp, attention):
        with open(idp.store.path + ".upgrading", "w"):
            assert attention()["upgrade_unfinished"].command == "microauthd upgrade FILE"

    @pytest.mark.parametrize("seconds, codes", [(2 * 3600 + 3600, set()), (2 * 3600 + 3601, {"backup_old"})])
    def test_a_backup_that_is_two_periods_old_does(self, idp, clock, attention, seconds, codes):
        idp.options = dataclasses.replace(idp.options, backup_every=3600)
        idp.store.put_meta("last_backup", '{"at": %d, "name": "b", "bytes": 1, "kind": "schedule"}' % idp.now())
        clock.pass_(seconds)
        assert attention().keys() == codes

    def test_an_error_stands_before_a_warning(self, idp, clock, attention):
        clock.pass_(8 * DAY)
        status = gather_status(idp, 0, {**SOUND, "database": False})
        assert [found.code for found in status.attention] == ["not_ready", "backup_old"]


    def test_the_manual_knows_every_code(self):
        source, manual = Path(room.__file__).read_text(), (m.HERE / "appliance" / "manual" / "microauthd.md").read_text()
        codes = set(re.findall(r'Attention\(\s*"([a-z_]+)"', source))
        assert len(codes) > 6 and not [code for code in codes if f"| `{code}` |" not in manual]


class TestTheRoute:
    def test_an_administrator_is_told(self, call, idp):
        answer = call("GET", "/status")
        assert answer.status == 200 and answer.json["version"] == m.VERSION, answer
        assert answer.json["issuer"] == idp.options.auth_issuer and answer.json["checks"] == SOUND
        assert answer.json["disk"]["database"] > 0 and answer.json["versions"]["sqlcipher"]

    def test_nobody_else_is(self, admin, idp):
        assert admin.get("/status").status == 401

    def test_the_readiness_keeps_its_form(self, admin):
        assert admin.get("/health/ready").json == {"status": "ok", "checks": SOUND}


class TestAtTheMachine:
    @pytest.fixture
    def run(self, house, capsys, monkeypatch):
        def call(*words, passphrase="a phrase"):
            monkeypatch.setenv("MAD_DB_PASS", passphrase)
            status = main(["status", *words])
            printed = capsys.readouterr()
            return status, printed.out, printed.err

        return call

    def test_a_box_that_does_not_run_has_status_3_and_is_left_as_it_is(self, house, tmp_path, run):
        before = sorted(os.listdir(tmp_path))
        code, out, err = run()
        assert (code, err) == (3, "") and "does not run" in out, (out, err)
        # The lock of the set-up journal is what every command takes.
        assert sorted(set(os.listdir(tmp_path)) - {"mad.conf.setting-up.lock"}) == sorted(
            set(before) - {"mad.conf.setting-up.lock"}
        )

    def test_as_json_it_is_the_object_of_the_route(self, run):
        code, out, _ = run("--json")
        assert code == 3 and msgspec.convert(json.loads(out), room.StatusObject).state == "stopped"

    @pytest.mark.parametrize("case", ["no database", "a wrong passphrase", "no SQLite"])
    def test_what_cannot_be_told_has_status_4(self, house, tmp_path, run, case):
        if case == "no database":
            (tmp_path / "mad.db3").unlink()
        elif case == "no SQLite":
            (tmp_path / "mad.db3").write_bytes(os.urandom(8192))
        code, out, err = run(passphrase="another" if case == "a wrong passphrase" else "a phrase")
        assert (code, out) == (4, "") and "mad.db3" in err

    def test_a_key_that_cannot_be_read_is_said_and_the_rest_is_told(self, house, tmp_path, run):
        (tmp_path / "token.pem").write_text("damaged")
        code, out, _ = run()
        assert code == 3 and "no signing key could be loaded" in out

    def test_a_database_of_an_older_release_is_not_migrated(self, house, run):
        idp = opened(house)
        idp.store.connection.execute("PRAGMA user_version = 11")
        idp.store.close()
        assert run()[0] == 3
        status = describe_status(house, 0, {}, "")
        assert status.state == "stopped"
        with pytest.raises(StartupError):  # so nothing was migrated: a migration would fail, for its tables are there
            opened(house)

    def test_the_lock_of_a_server_is_seen_and_a_look_at_it_keeps_none_from_starting(self, house):
        assert find_server(house.db_file) == 0
        with hold_database(house.db_file):
            assert find_server(house.db_file) == os.getpid()
        with hold_database(house.db_file):
            pass

    def test_a_log_that_a_crash_left_stays(self, house, tmp_path):
        def work():
            idp = opened(house)
            idp.store.put_meta("left", "in the log")
            die()

        assert in_child(work) == signal.SIGKILL
        size = (tmp_path / "mad.db3-wal").stat().st_size
        assert size > 0 and describe_status(house, 0, {}, "").disk.wal == size
        assert (tmp_path / "mad.db3-wal").stat().st_size == size


class TestARunningBox:
    def test_all_three_say_the_same(self, tmp_path):
        with Box(tmp_path / "data", workers="2") as box:
            done = box.run("status", "--json")
            assert done.returncode == 0, done
            told = json.loads(done.stdout)
            bearer = box.admin_token()
            asked = box.admin("GET", "/status", bearer=bearer).json
            asked_by_mad = json.loads(box.mad("status", "--json", MAD_ADMIN_TOKEN=bearer).stdout)
            for status in (told, asked, asked_by_mad):
                assert sorted(status["pids"]) == sorted(box.pids()) and status["pid"] == box.process.pid
                assert status["workers"] == {"expected": 3, "running": 3} and status["state"] == "well"
                for changing in ("now", "disk"):
                    del status[changing]
                del status["clock"]["now"]
            assert told == asked == asked_by_mad
            assert {end["name"]: end["port"] for end in told["endpoints"]} == {
                "auth": box.auth_port, "admin": box.admin_port, "local": 0,
            }
            box.process.send_signal(signal.SIGSTOP)
            try:  # its children answer all the same
                assert box.run("status").returncode == 0
                for pid in box.pids()[1:]:
                    os.kill(pid, signal.SIGSTOP)
                done = box.run("status")
                assert done.returncode == 1 and "does not answer" in done.stdout, done
            finally:
                for pid in reversed(box.pids()):
                    os.kill(pid, signal.SIGCONT)
        assert box.run("status").returncode == 3
