"""Each defence by itself: whichever is taken out, one of these fails. What the other files ask of whole journeys may not miss it."""

import contextlib
import fcntl
import ipaddress
import os
import resource
import threading
import time

import microauthd as m
import pyotp
import pytest
import sqlcipher3
from conftest import PASSWORD, Clock, in_child
from test_recovery import opened
from test_serve import TestTls as Tls
from test_serve import certificate, read_all, run, statuses  # noqa: F401
from test_upkeep import DAY, NOON, YEARS, Machine
from appliance.base import StartupError
from appliance.base.clock import IAT_SKEW, Timekeeper
from appliance.base.database import Unavailable
from appliance.base.store import AuthorizationCode, BrowserSession, LoginTransaction, MAD_ADMIN_ROLE_ID, SLICE, Store
from appliance.base.keys import hold_ring, make_key, read_ring, write_ring
from appliance.base.wire import Limits, tls_context
from appliance.upkeep import purge
from appliance.processes import DESCRIPTORS_KEPT, grant_connections, start_clock
from appliance.recovery import back_up, restore

PEER = m.Origin("192.0.2.1", is_local=False)


def test_all_that_was_done_at_times_that_are_not_yet_is_ended(idp, alice, service):
    store, now, late = idp.store, idp.now(), idp.now() + YEARS
    with store.transaction():
        store.add_browser_session(
            BrowserSession("b", alice.id, "pwd", late, 1000 * late, late, late + 60, None, "", "")
        )
        store.add_code(
            AuthorizationCode(
                "c", "service", alice.id, "s", "https://x", "", "", "", "", "", "pwd", late, 1000 * late, late + 60,
                None, "", 0,
            )
        )
        store.add_login(
            LoginTransaction("l", "b", "service", "password", "null", None, "", 0, 0, late, late + 60, 0, "")
        )
        store.run("UPDATE account SET totp_last_step = :step, revoked_before = :ms", step=late // 30, ms=1000 * late)
        store.run("UPDATE client SET revoked_before = :ms", ms=1000 * late)
        store.put_meta("revoked_before", 1000 * late)
    store.revoke_future_rows(now, 1000 * now, now // 30)
    account = store.find_account(alice.id)
    assert store.find_browser_session("b").revoked_at == now and store.find_code("c") is None
    assert not store.connection.execute("SELECT 1 FROM login_transaction").fetchone()
    assert account.totp_last_step == now // 30
    assert account.revoked_before == 1000 * now
    assert m.find_client(idp, "service").row.revoked_before == 1000 * now
    assert idp.revoked_before == 1000 * now


def tombs(idp, many):
    with idp.store.transaction():
        for number in range(many):
            idp.store.run("INSERT INTO revoked_token VALUES (:jti, 5, 5)", jti=f"{number:032x}")


def test_what_lies_scattered_goes_a_few_rows_at_a_time(idp):
    tombs(idp, 60)
    after, deleted = idp.store.purge_expired("revoked_token", "jti", 10, "", 500)
    assert deleted <= 25 and after
    assert SLICE <= 1000


def test_what_lives_again_when_its_turn_comes_stays(idp, monkeypatch):
    tombs(idp, 3)
    real = idp.store.transaction

    @contextlib.contextmanager
    def meanwhile(*words, **more):
        with real(*words, **more):
            idp.store.connection.execute("UPDATE revoked_token SET expires_at = 9000000000")
            yield

    monkeypatch.setattr(idp.store, "transaction", meanwhile)
    assert idp.store.purge_expired("revoked_token", "jti", 10, "", 500)[1] == 0


def test_a_tombstone_stays_as_long_as_a_clock_may_be_behind(idp, auth, service, machine, clock):
    auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
    clock.pass_(3600 + IAT_SKEW - 1)
    purge(idp, lambda seconds: None)
    assert idp.store.is_revoked(machine["jti"])


def test_who_began_a_purge_of_many_slices_is_known(idp, monkeypatch, clock, service, alice):
    monkeypatch.setattr("microauthd.SLICE", 2)
    clock.pass_(40 * 86400)
    m.audit(idp, m.LOCAL, "test", "now")
    m.purge_audit_log(idp, m.LOCAL, "system", 30)
    assert idp.store.list_audit("audit_purge_begun", 1)


def test_logins_of_all_peers_together_are_bounded():
    throttle = m.Throttle(Clock(1000.0))
    for number in range(1000):
        throttle.begin_login(f"10.{number // 250}.{number % 250}.1")
    with pytest.raises(m.Problem) as caught:
        throttle.begin_login("192.0.2.1")
    assert caught.value.code == "slow_down"


def test_logins_begun_do_not_grow_the_throttle_without_bound():
    clock = Clock(1000.0)
    throttle = m.Throttle(clock, size=50)
    for number in range(500):
        clock.pass_(1)
        throttle.begin_login(f"10.{number // 250}.{number % 250}.1")
    assert len(throttle.buckets) <= 50


def guess(idp, alice, code="000000"):
    with pytest.raises(m.Problem) as caught:
        m.check_second_factor(idp, PEER, alice.id, idp.now_ms() + 1, code)
    return caught.value.code


def test_guesses_of_the_second_step_are_slowed_as_those_of_the_first(idp, alice, give_totp):
    give_totp(idp, idp.store.find_account(alice.id))
    said = [guess(idp, alice) for _ in range(22)]
    assert said[0] == "invalid_grant" and said[-1] == "slow_down", said


def test_a_locked_second_factor_takes_no_recovery_code_and_spends_none(idp, alice, give_totp):
    give_totp(idp, idp.store.find_account(alice.id))
    codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
    for _ in range(m.TOTP_TRIES):
        guess(idp, alice)
    assert guess(idp, alice, codes[0]) == "invalid_grant" and idp.store.count_recovery_codes(alice.id) == 10


def test_who_is_locked_out_between_the_steps_stays_out(idp, alice, give_totp, clock):
    seed = give_totp(idp, idp.store.find_account(alice.id))
    clock.pass_(60)
    idp.store.set_lockout(alice.id, idp.now() + 600, idp.now())
    assert guess(idp, alice, pyotp.TOTP(seed).at(idp.now())) == "invalid_grant"


def test_a_revocation_between_the_steps_spends_nothing(idp, alice, give_totp, clock):
    give_totp(idp, idp.store.find_account(alice.id))
    codes = m.make_recovery_codes(idp, m.LOCAL, alice.id)
    proven = idp.now_ms()
    clock.pass_(1)
    m.end_user(idp, m.LOCAL, "t", alice.id, "x")
    with pytest.raises(m.Problem):
        m.check_second_factor(idp, PEER, alice.id, proven, codes[0])
    assert idp.store.count_recovery_codes(alice.id) == 10


@pytest.mark.parametrize("act", ["access", "refresh", "user"])
def test_what_cannot_be_written_down_is_not_done(idp, auth, service, alice, log_in, monkeypatch, act):
    issued = log_in(alice)

    def fail(*_):
        raise sqlcipher3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(idp.store, "append_audit", fail)
        with contextlib.suppress(Unavailable):
            if act == "user":
                m.end_user(idp, m.LOCAL, "t", alice.id, "user_revoked")
            else:
                auth.post("/revoke", {"token": issued[f"{act}_token"]}, auth=service)
    for name in ("access_token", "refresh_token"):
        assert auth.post("/introspect", {"token": issued[name]}, auth=service).json["active"] is True


def test_after_a_failed_sync_nothing_is_acknowledged_while_a_reader_keeps_the_log(idp, monkeypatch):
    monkeypatch.setattr("appliance.base.database.LOCK_SECONDS", 0.2)
    store = Store(idp.store.path, idp.store.key)
    store.put_meta("x", 1)
    reader = idp.store.connection
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM meta").fetchone()
    store.put_meta("x", 2)
    flags = store.generation.map
    flags[store.generation.UNSYNCED] = 1
    with pytest.raises(Unavailable):
        store.put_meta("x", 3)
    assert flags[store.generation.UNSYNCED] == 1
    reader.execute("ROLLBACK")
    store.put_meta("x", 4)
    assert not flags[store.generation.UNSYNCED] and store.meta("x") == "4"
    store.close()


def test_where_nobody_is_left_to_serve_a_writer_does_not_wait(idp):
    store, entered = idp.store, []

    @contextlib.contextmanager
    def last():
        yield False

    store.blocking = last
    store.write_lock.acquire()
    try:

        def write():
            try:
                store.put_meta("x", 1)
            except Unavailable as problem:
                entered.append(problem.log)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(3)
    finally:
        store.write_lock.release()
    assert entered == ["too many wait to write"]


def test_a_batch_is_not_longer_than_5000(idp):
    for number in range(5001):
        idp.store.enqueue((m.new_jti(number), "service", "", 1, 2), None)
    idp.store.flush()
    assert len(idp.store.queue) == 1 and idp.store.wake.is_set()


def test_a_disk_with_no_room_is_not_ready(idp, monkeypatch):
    idp.store.put_meta("x", 1)
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:4], 1, *real(path)[5:])))
    with pytest.raises(Unavailable):
        idp.store.probe()


def test_replays_are_bounded(idp):
    idp.replays = {str(number) for number in range(4096)}
    m.note_replay(idp, m.LOCAL, m.Replayed({"jti": "x", "sub": "y", "mad": "auth"}, "revoked"))
    assert len(idp.replays) <= 4096


def test_blocks_are_bounded(run):
    server = run().server
    for number in range(600):
        server._block("200 OK", (("X", str(number)),))
    assert len(server._blocks) <= 256


def test_a_signed_token_that_is_too_long_is_none(rings):
    ring = m.KeyRing(rings[0])
    with pytest.raises(m.Problem):
        ring.verify(ring.mint(ring.access, m.AT_JWT, {"x": "y" * 9000}), m.AT_JWT)


def test_a_ring_without_states_that_lost_a_key_stops_the_start(tmp_path):
    path = tmp_path / "token.pem"
    whole = write_ring([make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)], "")
    path.write_bytes(b"".join(line for line in whole.splitlines(True) if not line.startswith(b"#"))[:-40])
    path.chmod(0o600)
    with pytest.raises(StartupError):
        read_ring(str(path), "")


def test_no_more_connections_than_descriptors():

    def work():
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
        assert grant_connections(1).connections == 512 - DESCRIPTORS_KEPT

    assert in_child(work) == 0


def test_a_handshake_that_drips_is_closed_by_its_deadline(run, certificate):
    one = run(tls=tls_context(str(certificate / "box.pem")), limits=Limits(handshake_seconds=0.6))
    with one.connect() as sock:
        sock.sendall(bytes.fromhex("1603010200010001fc0303"))
        end = time.monotonic() + 3
        with pytest.raises(OSError):
            while time.monotonic() < end:
                sock.sendall(b"\0")
                time.sleep(0.1)


def test_one_that_has_shaken_hands_and_says_nothing_is_closed(run, certificate):
    one = run(tls=tls_context(str(certificate / "box.pem")), limits=Limits(idle_seconds=0.4))
    with Tls.client(None, certificate).wrap_socket(one.connect(4), server_hostname="localhost") as sock:
        sock.settimeout(3)
        assert sock.recv(1) == b""


def test_a_peer_has_so_many_connections_and_gets_them_back(run, monkeypatch):
    monkeypatch.setattr("appliance.base.wire._address", lambda text: ipaddress.ip_address("192.0.2.7"))
    one = run(limits=Limits(connections_per_peer=2))

    def ask(sock):
        with contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: box\r\n\r\n")
            return statuses(sock.recv(65536))

    first, second, third = one.connect(), one.connect(), one.connect()
    assert [ask(first), ask(second)] == [[200], [200]] and ask(third) in ([], None)
    for sock in (first, second, third):
        sock.close()
    time.sleep(0.3)
    with one.connect() as again:
        assert ask(again) == [200]


def test_where_many_are_connected_the_idle_go_sooner(run):
    one = run(limits=Limits(connections=8, idle_seconds=5))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(one.connect(4)) for _ in range(5)]
        began = time.monotonic()
        assert read_all(socks[0]) == b"" and time.monotonic() - began < 3


def test_a_refused_sender_is_cut_off_after_a_megabyte(run):
    one = run()
    with one.connect(3) as sock:
        sock.sendall(b"GET /\r\n\r\n BAD\r\n\r\n")
        sent, began = 0, time.monotonic()
        with contextlib.suppress(OSError):
            while sent < 50_000_000:
                sent += sock.send(bytes(65536))
        assert sent < 20_000_000, sent


def test_no_more_threads_than_allowed(run):
    one = run(threads=2, max_threads=4)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(one.connect()) for _ in range(12)]
        for sock in waiting:
            sock.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
        time.sleep(0.4)
        assert one.server._running <= 4
        one.app.go.set()
        assert all(statuses(read_all(sock)) == [200] for sock in waiting)


def test_without_more_threads_those_that_are_go_on(run, monkeypatch):
    one = run(threads=2, max_threads=8)
    real = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start",
        lambda self: (
            (_ for _ in ()).throw(RuntimeError("can't start new thread"))
            if self.name.startswith("auth")
            else real(self)
        ),
    )
    with one.connect() as waiting:
        waiting.sendall(b"GET /wait HTTP/1.1\r\nHost: box\r\nConnection: close\r\n\r\n")
        time.sleep(0.2)
        assert b" 200 " in one.get()
        one.app.go.set()
        assert statuses(read_all(waiting)) == [200]


def under_way(idp, user):
    now = idp.now()
    idp.store.add_code(
        AuthorizationCode(
            "c", "app", user, "s", "https://x", "", "", "", "", "", "pwd", now, 1000 * now, now + 60, None, "", 0
        )
    )
    idp.store.add_login(LoginTransaction("l", "b", "app", "password", "null", None, "", 0, 0, now, now + 60, 0, ""))


def left(idp):
    return [
        idp.store.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("authorization_code", "login_transaction")
    ]


def test_a_start_that_has_to_guess_the_time_forgets_what_was_under_way(idp, alice, service, monkeypatch):
    under_way(idp, alice.id)
    idp.store.put_meta("clock", idp.now())
    monkeypatch.setattr(Timekeeper.__init__, "__defaults__", (lambda: 1000.0, None, None))
    assert start_clock(idp.store, idp.log).state == "guessed" and left(idp) == [0, 0]


def test_logins_of_a_peer_that_holds_half_the_gate_are_told_to_come_back(idp, alice):
    gate = idp.hasher.gate
    gate.taken, gate.of["192.0.2.1"] = gate.places // 2, 1
    with pytest.raises(m.Problem) as caught:
        m.authenticate_user(idp, m.Origin("192.0.2.1", is_local=False), "alice", PASSWORD)
    assert caught.value.code == "slow_down"
    assert m.authenticate_user(idp, m.Origin("192.0.2.2", is_local=False), "alice", PASSWORD)


def test_a_restore_forgets_what_was_under_way(house, tmp_path):
    idp = opened(house)
    under_way(idp, m.get_user(idp, "root").id)
    idp.store.close()
    back_up(house, str(tmp_path / "b"))
    restore(house, str(tmp_path / "b"))
    idp = opened(house)
    assert left(idp) == [0, 0]
    idp.store.close()


def test_the_epoch_of_a_restore_on_a_new_machine_is_later_than_what_the_backup_knows(house, tmp_path):
    idp = opened(house)
    idp.store.put_meta("revoked_before", 9_000_000_000_000)
    idp.store.close()
    back_up(house, str(tmp_path / "b"))
    os.unlink(house.db_file)
    restore(house, str(tmp_path / "b"))
    idp = opened(house)
    assert idp.revoked_before > 9_000_000_000_000
    idp.store.close()


def test_a_restore_waits_for_who_changes_a_ring(house, tmp_path):
    back_up(house, str(tmp_path / "b"))
    with hold_ring(house.token_signing_key_file):
        thread = threading.Thread(target=restore, args=(house, str(tmp_path / "b")))
        thread.start()
        thread.join(1.5)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()


def test_the_millisecond_of_the_epoch_of_the_server_is_dead(auth, service, alice, log_in, change):
    issued = log_in(alice)
    change("UPDATE meta SET value = :ms WHERE name = 'revoked_before'", ms=str(m.jti_ms(issued["jti"])))
    assert auth.get("/me", bearer=issued["access_token"]).status == 401
    assert (
        auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": issued["refresh_token"]}, auth=service
        ).status
        == 400
    )


def test_the_millisecond_of_the_epoch_of_a_client_ends_its_logins(auth, service, alice, log_in, change):
    issued = log_in(alice)
    change("UPDATE client SET revoked_before = :ms", ms=m.jti_ms(issued["jti"]))
    assert (
        auth.post(
            "/token", {"grant_type": "refresh_token", "refresh_token": issued["refresh_token"]}, auth=service
        ).status
        == 400
    )


def test_a_code_of_the_millisecond_of_an_epoch_is_dead(idp, auth, service, alice, change):
    for number, gap in ((0, 1), (1, 0)):
        ms, now = idp.now_ms(), idp.now()
        idp.store.add_code(
            AuthorizationCode(
                m.sha256(f"code{number}"), "service", alice.id, f"s{number}", "https://x", "", "", "", "", "", "pwd",
                now, ms, now + 60, None, "", 0,
            )
        )
        change("UPDATE client SET revoked_before = :ms", ms=ms - gap)
        answer = auth.post(
            "/token", {"grant_type": "authorization_code", "code": f"code{number}", "redirect_uri": "https://x"},
            auth=service,
        )
        assert answer.status == (200 if gap else 400), answer


def test_the_epoch_of_role_holders_grows_too(idp, root):
    epochs = []
    for _ in range(2):
        idp.store.revoke_role_holders(MAD_ADMIN_ROLE_ID, idp.now(), idp.now_ms())
        epochs.append(idp.store.find_account(root.id).revoked_before)
    assert epochs[0] < epochs[1]


def test_a_session_of_the_millisecond_of_a_revocation_is_shown_as_dead(idp, alice, log_in, change):
    jti = log_in(alice)["jti"]
    change("UPDATE account SET revoked_before = :ms", ms=m.jti_ms(jti))
    assert m.is_session_dead(idp.store.find_session(jti))


def test_writers_of_all_processes_wait_for_their_turn(idp):
    idp.store.take_turns()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        fcntl.lockf(os.open(idp.store.path + ".lock", os.O_RDWR), fcntl.LOCK_EX)
        os.write(writing, b"x")
        time.sleep(0.6)
        os._exit(0)
    os.read(reading, 1)
    began = time.monotonic()
    idp.store.put_meta("x", 1)
    took = time.monotonic() - began
    os.waitpid(pid, 0)
    assert took > 0.4


def test_a_row_that_waits_in_another_process_is_waited_for(idp, make_idp):
    other, jti = make_idp(idp.options), m.new_jti(idp.now_ms())
    other.store.enqueue((jti, "service", "", idp.now(), idp.now() + 60), None)
    threading.Timer(0.01, other.store.flush).start()
    assert m.get_session(idp, jti).id == jti


def test_after_a_sleep_time_falls_back_no_more_than_for_a_minute():
    box = Machine(NOON)
    box.wall -= 3600
    box.pass_(1)
    before = box.now
    box.boot, box.wall = box.boot + 3600, box.wall + 3600
    box.keeper.look()
    assert box.now - before >= 3600 - 31


def test_a_clock_in_probation_that_goes_back_too_far_is_not_followed():
    box = Machine(NOON)
    box.wall += YEARS
    box.pass_(700)
    assert box.keeper.state == "probation"
    box.wall -= YEARS + 30 * DAY
    assert not box.pass_(10) and box.now > NOON + YEARS and box.keeper.state == "behind"
