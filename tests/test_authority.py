"""The box's own CA: what it may sign, how its certificate lives, what a crash leaves."""

import contextlib
import dataclasses
import json
import os
import ssl
import stat
import time
import types

import msgspec
import pytest
from box import Box
from conftest import Caller, Clock, die, in_child, made
from cryptography import x509

import microauthd as m
from appliance import authority as authority_room, recovery
from appliance.authority import (
    DAY, find_authority, forbid_found_ca, ipv4_addresses, ipv6_addresses, keep_certificate, machine_names, make_certificate,
    missing_names, needs_work, renew_certificate, replace_authority, wanted_names,
)
from appliance.base import StartupError
from appliance.commands import main
from appliance.base.metrics import Counters
from appliance.base.settings import Options, host_names, issuer_obstacle, load_options
from appliance.base.tls import Pair, context_of, describe_certificate
from appliance.processes import announce, prepare_certificate
from appliance.recovery import back_up, factory_reset, open_idp, restore
from appliance.status import gather_status
from appliance.upkeep import Upkeep

NAMES = ["box.lan", "192.168.7.20", "fd00::20", "localhost", "127.0.0.1", "::1"]
CALLER = m.LOCAL.acting_as("test")


@pytest.fixture
def machine(monkeypatch):
    """A machine of one name and one address of each kind."""
    monkeypatch.setattr(authority_room, "machine_names", lambda: ["box.lan"])
    monkeypatch.setattr(authority_room, "ipv4_addresses", lambda: ["192.168.7.20"])
    monkeypatch.setattr(authority_room, "ipv6_addresses", lambda: ["fd00::20"])


@pytest.fixture
def options(options, tmp_path):
    return dataclasses.replace(
        options, tls="self", auth_ip="::", oidc_issuer="https://box.lan:9040", admin_domain="box.lan",
        db_file=str(tmp_path / "mad.db3"),
    )


@pytest.fixture
def clock():
    return Clock(time.time())  # OpenSSL goes by the machine's


@pytest.fixture
def box(machine, idp):
    keep_certificate(idp)
    return idp


def read(path):
    with open(path, "rb") as file:
        return file.read()


def handshake(content, ca_file, name):
    """Shake hands with a server of this PEM file, as a client that trusts `ca_file` alone and wants `name`."""
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=ca_file).wrap_bio(server_out, server_in, server_hostname=name)
    server = context_of(Pair(content), "", "").wrap_bio(server_in, server_out, server_side=True)
    for _ in range(4):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return client.getpeercert()


class TestNameConstraints:
    """RFC 5280 §4.2.1.10: whoever steals the CA's key can be this box, and nobody else."""

    @pytest.mark.parametrize("name", NAMES)
    def test_every_name_and_address_of_the_box_is_served(self, box, name):
        options = box.options
        assert handshake(read(options.self_made_file), options.ca_file, name)["notAfter"]
        assert find_authority(box.store).names == NAMES

    @pytest.mark.parametrize("name", ["evil.example", "lan", "notbox.lan", "192.168.7.21", "fd00::21", "10.0.0.1"])
    def test_the_stolen_key_signs_for_no_other(self, box, name):
        forged = msgspec.structs.replace(find_authority(box.store), names=[name])
        with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
            handshake(make_certificate(box.seal, forged, box.now()), box.options.ca_file, name)

    def test_the_root_signed_one_intermediate_which_signs_no_other_ca(self, box):
        known = find_authority(box.store)
        root, intermediate = (x509.load_pem_x509_certificate(pem.encode()) for pem in (known.root, known.intermediate))
        intermediate.verify_directly_issued_by(root)
        basic = intermediate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert basic.critical and basic.value == x509.BasicConstraints(True, 0)
        assert intermediate.extensions.get_extension_for_class(x509.NameConstraints).critical
        years = (intermediate.not_valid_after_utc.timestamp() - box.now()) / DAY / 365
        assert years == pytest.approx(10, abs=0.01)

    def test_no_key_of_the_ca_lies_in_a_file(self, box, tmp_path):
        key = box.seal.open(find_authority(box.store).sealed_key, "authority")
        assert key.startswith("-----BEGIN PRIVATE KEY-----")
        for path in tmp_path.iterdir():
            content = read(path)
            assert key.splitlines()[1].encode() not in content, path
            assert content.count(b"PRIVATE KEY-----\n") == (2 if path.name == "tls-self.pem" else 0), path
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.pem")} == {0o600}


class TestLife:
    """90 days, renewed at two thirds of them."""

    def test_a_certificate_that_lasts_is_left_alone(self, box, clock):
        before = read(box.options.self_made_file)
        assert describe_certificate(before).not_after == box.now() + 90 * DAY
        clock.pass_(59 * DAY)
        renew_certificate(box)
        assert read(box.options.self_made_file) == before and not needs_work(box.options, box.store, box.now())

    def test_in_its_last_third_it_is_renewed_by_itself(self, box, clock):
        ca = read(box.options.ca_file)
        clock.pass_(60 * DAY)
        assert needs_work(box.options, box.store, box.now())
        renew_certificate(box)
        content = read(box.options.self_made_file)
        assert describe_certificate(content).not_after == box.now() + 90 * DAY and read(box.options.ca_file) == ca
        assert "certificate.renewed" in box.stream.getvalue()

    def test_while_the_clock_is_not_to_be_believed_it_is_not(self, box, clock):
        before = read(box.options.self_made_file)
        clock.pass_(-1000 * DAY)
        renew_certificate(box)
        assert read(box.options.self_made_file) == before

    @pytest.mark.parametrize("keep", [renew_certificate, prepare_certificate])
    @pytest.mark.parametrize("days, is_kept", [(61, True), (91, False)])
    def test_a_clock_that_is_not_believed_replaces_one_that_has_ended_and_no_other(
        self, box, clock, monkeypatch, keep, days, is_kept
    ):
        before = read(box.options.self_made_file)
        clock.pass_(days * DAY)
        monkeypatch.setattr(type(box), "check_clock", lambda *_: False)
        keep(box)
        assert (read(box.options.self_made_file) == before) == is_kept
        monkeypatch.undo()
        keep(box)
        assert read(box.options.self_made_file) != before, "and once it is believed, in its last third"

    def test_none_outlives_the_ca_and_none_is_made_over_and_over_at_its_end(self, box, clock):
        end = describe_certificate(find_authority(box.store).intermediate.encode()).not_after
        made = 0
        clock.now = end - 100 * DAY
        while clock.now < end + DAY:
            before = read(box.options.self_made_file)
            renew_certificate(box)
            made += read(box.options.self_made_file) != before
            clock.pass_(DAY / 4)
        assert describe_certificate(before).not_after == end and made <= 4

    @pytest.mark.parametrize("name", ["tls-self.pem", "ca.pem"])
    @pytest.mark.parametrize("content", [b"", b"noise", None])
    def test_what_is_damaged_or_gone_is_made_again(self, box, tmp_path, name, content):
        path = tmp_path / name
        path.unlink() if content is None else path.write_bytes(content)
        assert needs_work(box.options, box.store, box.now())
        renew_certificate(box)
        assert handshake(read(box.options.self_made_file), box.options.ca_file, "box.lan")

    def test_a_box_that_does_not_ask_for_it_gets_none(self, machine, make_idp, options, tmp_path):
        renew_certificate(make_idp(dataclasses.replace(options, tls="")))
        assert not (tmp_path / "ca.pem").exists()

    @pytest.mark.parametrize("name", ["ca.pem", "tls-self.pem"])
    def test_a_first_ca_replaces_no_file_of_somebody_else(self, machine, idp, tmp_path, name):
        (tmp_path / name).write_bytes(b"somebody's")
        with pytest.raises(StartupError, match=f"{name} is there already"):
            keep_certificate(idp)
        assert (tmp_path / name).read_bytes() == b"somebody's" and find_authority(idp.store) is None

    def test_another_seal_key_is_a_sentence_and_a_new_ca_the_remedy(self, box, tmp_path):
        box.seal = m.Seal(b"x" * 32)
        with pytest.raises(StartupError, match="certificate new"):
            keep_certificate(box, renew=True)
        replace_authority(box, CALLER)
        assert handshake(read(box.options.self_made_file), box.options.ca_file, "box.lan")


    def test_a_running_box_looks_every_minute(self, box, monkeypatch):
        done, turns = [], iter(range(1 + 180 // Upkeep.INTERVAL))
        monkeypatch.setattr(Upkeep, "attempt", lambda self, work, *words: done.append(work))
        upkeep = Upkeep(box)
        monkeypatch.setattr(upkeep.ending, "wait", lambda seconds: next(turns, None) is None)
        upkeep.run()
        assert done.count(renew_certificate) == 3

    def test_what_keeps_it_from_being_renewed_stops_no_start_while_there_is_one(self, box, clock, monkeypatch):
        def full(path, content):
            raise OSError(28, "No space left on device", path)

        monkeypatch.setattr(authority_room, "write_durably", full)
        prepare_certificate(box)
        assert "certificate.failed" not in box.stream.getvalue(), "nothing is to be written"
        clock.pass_(80 * DAY)
        prepare_certificate(box)
        assert "certificate.failed" in box.stream.getvalue() and "No space left" in box.stream.getvalue()
        os.unlink(box.options.self_made_file)
        with pytest.raises(StartupError, match="tls = self: .*No space left"):
            prepare_certificate(box)


class TestNewAuthority:
    """What came since the CA was made needs a new one, which is said."""

    def test_a_name_or_an_address_that_came_since_is_missing(self, box, monkeypatch):
        known = find_authority(box.store)
        assert missing_names(box.options, known) == []
        monkeypatch.setattr(authority_room, "ipv4_addresses", lambda: ["192.168.7.99"])
        monkeypatch.setattr(authority_room, "machine_names", lambda: ["renamed.lan"])
        assert missing_names(box.options, known) == ["renamed.lan", "192.168.7.99"]
        replace_authority(box, CALLER)
        assert missing_names(box.options, find_authority(box.store)) == []
        assert handshake(read(box.options.self_made_file), box.options.ca_file, "192.168.7.99")

    def test_what_is_gone_is_not(self, box, monkeypatch):
        monkeypatch.setattr(authority_room, "ipv6_addresses", lambda: [])
        assert missing_names(box.options, find_authority(box.store)) == []

    def test_it_needs_attention_and_so_does_a_ca_that_ends(self, box, clock, monkeypatch):
        def attention():
            found = gather_status(box, 0, {}).attention
            return {found.code: found for found in found if found.code in ("certificate_names", "ca_ending")}

        assert attention() == {}
        monkeypatch.setattr(authority_room, "ipv4_addresses", lambda: ["192.168.7.99"])
        (found,) = attention().values()
        assert "192.168.7.99" in found.text and found.command == "microauthd certificate new"
        monkeypatch.undo()
        clock.pass_(3559 * DAY)
        assert "ca_ending" not in attention()
        clock.pass_(2 * DAY)
        assert attention()["ca_ending"].severity == "warning"
        clock.pass_(90 * DAY)
        assert attention()["ca_ending"].severity == "error"

    def test_it_is_audited_with_its_fingerprint(self, box):
        replace_authority(box, CALLER)
        said = box.store.value("SELECT secondary FROM audit WHERE action = 'authority_made' ORDER BY seq DESC LIMIT 1")
        assert said == "sha256=" + describe_certificate(read(box.options.ca_file)).sha256

    @pytest.mark.parametrize("step", range(4))
    @pytest.mark.parametrize("first", [True, False])
    def test_kill_9_at_any_step_leaves_what_the_next_turn_completes(self, machine, make_idp, options, step, first):
        """Before and after each of the two files: the database has the new CA by then, and decides."""
        if not first:
            idp = make_idp(options)
            keep_certificate(idp)
            idp.store.close()
        write, calls = authority_room.write_durably, []

        def write_and_die(path, content):
            calls.append(path)
            if len(calls) * 2 - 2 == step:
                die()
            write(path, content)
            if len(calls) * 2 - 1 == step:
                die()

        def work():
            authority_room.write_durably = write_and_die
            replace_authority(make_idp(options), CALLER)

        assert os.WIFSIGNALED(in_child(work))
        idp = make_idp(options)
        known = find_authority(idp.store)
        assert needs_work(options, idp.store, idp.now()) == (step < 3)
        renew_certificate(idp)
        assert read(options.ca_file) == known.root.encode() and find_authority(idp.store) == known
        assert handshake(read(options.self_made_file), options.ca_file, "box.lan")


class TestBackup:
    """The CA is part of the box: a backup takes it along, and a reset ends it."""

    def test_a_restore_on_an_empty_machine_brings_the_ca_that_clients_trust(self, machine, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = made(tmp_path, tls="self", db_file=str(tmp_path / "mad.db3"))
        root, first = read(options.ca_file), read(options.self_made_file)
        assert handshake(first, options.ca_file, "idp.example")
        back_up(options, "box.backup")
        for path in tmp_path.iterdir():
            if path.name != "box.backup":
                path.unlink()
        restore(options, "box.backup")
        with contextlib.closing((idp := open_idp(options)).store):
            keep_certificate(idp)
        assert read(options.ca_file) == root and read(options.self_made_file) != first
        assert handshake(read(options.self_made_file), options.ca_file, "idp.example")

    def test_a_set_up_that_dies_before_their_files_is_whole_and_the_start_makes_them(self, machine, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(recovery, "make_certificate_files", die)
        assert os.WIFSIGNALED(in_child(lambda: made(tmp_path, tls="self", db_file=str(tmp_path / "mad.db3"))))
        options = load_options({"config": (str(tmp_path / "mad.conf"), "flag")}, {})
        assert not os.path.exists(options.ca_file)
        with contextlib.closing((idp := open_idp(options)).store):
            prepare_certificate(idp)
        assert handshake(read(options.self_made_file), options.ca_file, "idp.example")

    def test_a_reset_overwrites_and_removes_its_files_so_that_a_set_up_can_make_another(self, machine, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = made(tmp_path, tls="self", db_file=str(tmp_path / "mad.db3"))
        with pytest.raises(StartupError, match="ca.pem is there already"):
            forbid_found_ca(options)
        assert {options.ca_file, options.self_made_file} <= set(factory_reset(options))
        assert not list(tmp_path.glob("*.pem"))
        forbid_found_ca(options)

    def test_a_set_up_leaves_files_of_somebody_else_alone(self, machine, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "ca.pem").write_bytes(b"somebody's")
        with pytest.raises(StartupError, match="ca.pem is there already"):
            made(tmp_path, tls="self", db_file=str(tmp_path / "mad.db3"))
        assert not (tmp_path / "mad.db3").exists() and read(tmp_path / "ca.pem") == b"somebody's"


class TestRoot:
    """The root is public: clients fetch it, and compare its fingerprint."""

    @pytest.mark.parametrize("port", ["auth", "admin"])
    def test_it_is_served_to_anyone(self, request, machine, port, idp):
        caller = request.getfixturevalue(port)
        assert caller.get("/.well-known/microauthd/ca.pem").status == 404
        keep_certificate(idp)
        answer = caller.get("/.well-known/microauthd/ca.pem")
        assert answer.headers["content-type"] == "application/x-x509-ca-cert"
        assert answer.body == read(idp.options.ca_file)
        tag = (("If-None-Match", answer.headers["etag"]),)
        assert caller.get("/.well-known/microauthd/ca.pem", headers=tag).status == 304
        replace_authority(idp, CALLER)
        assert caller.get("/.well-known/microauthd/ca.pem", headers=tag).body == read(idp.options.ca_file)

    def test_without_a_ca_of_its_own_there_is_no_such_path(self, make_idp, options):
        app = m.App(make_idp(dataclasses.replace(options, tls="")), m.AUTH)
        assert Caller(app).get("/.well-known/microauthd/ca.pem").status == 404


FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
     |-- 172.17.0.1
        /32 host LOCAL
     +-- 192.168.7.0/24 2 0 2
        |-- 192.168.7.0
           /24 link UNICAST
        |-- 192.168.7.20
           /32 host LOCAL
        |-- 192.168.7.255
           /32 link BROADCAST
Local:
     |-- 192.168.7.20
        /32 host LOCAL
"""
ROUTE = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
eth0 00000000 0107A8C0 0003 0 0 0 00000000 0 0 0
eth0 0007A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0
docker0 00000000 010011AC 0003 0 0 0 00000000 0 0 0
docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0
"""
IF_INET6 = """fe800000000000005054a6fffe000001 02 40 20 80 eth0
20010db8000000000000000000000020 02 40 00 00 eth0
20010db8000000001234567812345678 02 40 00 01 eth0
20010db8000000000000000000000021 02 40 00 20 eth0
fd000000000000000000000000000001 03 40 00 80 docker0
00000000000000000000000000000001 01 80 10 80 lo
"""


class TestNames:
    """What the box is called, read from the machine."""

    def test_addresses_are_those_that_last_and_that_others_reach(self, monkeypatch):
        files = {"/proc/net/fib_trie": FIB_TRIE, "/proc/net/route": ROUTE, "/proc/net/if_inet6": IF_INET6}
        monkeypatch.setattr(authority_room, "read_lines", lambda path: files[path].splitlines())
        assert ipv4_addresses() == ["192.168.7.20"], "not that of a bridge of containers"
        assert ipv6_addresses() == ["2001:db8::20"], "no temporary, deprecated or link-local one"

    def test_without_proc_there_are_none(self, monkeypatch):
        monkeypatch.setattr(authority_room, "read_lines", lambda path: [])
        assert ipv4_addresses() == ipv6_addresses() == []

    @pytest.mark.parametrize(
        "name, names",
        [
            ("Box", ["box", "box.local"]), ("box.lan", ["box.lan", "box.local"]), ("box.local", ["box.local"]),
            ("localhost", []), ("localhost.localdomain", []), ("", []), ("a b", []),
        ],
    )
    def test_the_host_name_and_its_name_in_multicast_dns(self, monkeypatch, name, names):
        monkeypatch.setattr(authority_room.socket, "gethostname", lambda: name)
        assert machine_names() == names

    @pytest.mark.parametrize(
        "changes, names",
        [
            ({}, ["box.lan"]),
            ({"auth_ip": "0.0.0.0"}, ["box.lan", "192.168.7.20"]),
            ({"admin_ip": "::"}, ["box.lan", "192.168.7.20", "fd00::20"]),
            ({"auth_ip": "192.168.7.21"}, ["box.lan", "192.168.7.21"]),
            ({"oidc_issuer": "https://sso.example/auth", "tls_names": "other.lan,10.0.0.9"},
             ["sso.example", "other.lan", "10.0.0.9", "box.lan"]),
            ({"oidc_issuer": "https://[2001:db8::1]:9040"}, ["2001:db8::1", "box.lan"]),
            ({"docker": True, "auth_ip": "0.0.0.0", "auth_domain": "sso.example:8443"}, ["sso.example"]),
        ],
    )  # fmt: skip
    def test_what_the_certificate_is_for(self, machine, changes, names):
        assert wanted_names(Options(tls="self", **changes)) == [*names, "localhost", "127.0.0.1", "::1"]

    def test_names_of_the_option_are_names_and_addresses(self):
        assert host_names(" Box.LAN, 192.168.7.20 [FD00::0020],box.lan ") == "box.lan,192.168.7.20,fd00::20"
        assert host_names("") == ""
        for wrong in ("https://box.lan", "box.lan:9040", "-box", "box..lan", "a" * 64, "*.lan", "10.0.0.0/8", "bücher"):
            with pytest.raises(ValueError, match="host names and IP addresses"):
                host_names(wrong)


class TestIssuer:
    """An issuer at localhost is every machine's own."""

    @pytest.mark.parametrize(
        "changes, is_wrong",
        [
            ({}, False), ({"auth_ip": "192.168.7.20"}, True), ({"auth_ip": "0.0.0.0"}, True), ({"auth_ip": "::"}, True),
            ({"auth_ip": "::", "auth_domain": "box.lan"}, False), ({"auth_ip": "::", "auth_domain": "127.0.0.2:9040"}, True),
            ({"auth_ip": "::", "oidc_issuer": "https://[::1]:9040"}, True), ({"auth_ip": "::1"}, False),
            ({"auth_ip": "::", "oidc_issuer": "https://a.localhost"}, True),
            ({"auth_ip": "::", "oidc_issuer": "https://box.lan"}, False), ({"auth_ip": "0.0.0.0", "docker": True}, False),
        ],
    )
    def test_it_goes_with_an_address_of_loopback(self, changes, is_wrong):
        assert bool(issuer_obstacle(Options(auth_insecure_http=True, **changes))) == is_wrong

    @pytest.mark.parametrize("auth_ip, events", [("0.0.0.0", ["serving", "insecure", "issuer.unreachable"]), ("127.0.0.1", ["serving"])])
    def test_a_start_warns(self, auth_ip, events):
        logged = []
        options = Options(auth_ip=auth_ip, auth_insecure_http=True)
        log = lambda event, *_, **__: logged.append(event)
        startup = types.SimpleNamespace(options=options, local=None, certificates={}, log=log, counters=Counters(), clock=time.time)
        announce(startup)
        assert logged == events

    def test_it_needs_attention(self, make_idp, options):
        wrong = dataclasses.replace(options, tls="", auth_insecure_http=True, oidc_issuer="http://localhost:9040")
        for options, is_wrong in ((wrong, True), (dataclasses.replace(wrong, auth_ip="127.0.0.1"), False)):
            codes = {found.code for found in gather_status(make_idp(options), 0, {}).attention}
            assert ("issuer_unreachable" in codes) == is_wrong


class TestRunning:
    """A box with `tls = self`, from its set-up on."""

    def trusting(self, box):
        box.tls = ssl.create_default_context(cafile=str(box.folder / "ca.pem"))

    def test_it_serves_by_its_ca_and_a_new_one_is_made_beside_it(self, tmp_path):
        box = Box(tmp_path / "data", tls="self", workers="2").set_up()
        first = (box.folder / "ca.pem").read_bytes()
        self.trusting(box)
        with contextlib.ExitStack() as stack:
            stack.callback(box.__exit__)
            box.start()
            for port in (box.auth_port, box.admin_port):
                assert box.call(port, "GET", "/.well-known/microauthd/ca.pem").body == first
            shown = json.loads(box.run("certificate", "show", "--json").stdout)
            assert shown["missing"] == [] and [port["use"] for port in shown["ports"]] == ["auth", "admin"]
            assert shown["ca"]["sha256"] == describe_certificate(first).sha256
            done = box.run("certificate", "new")
            assert done.returncode == 0 and "within ten seconds" in done.stderr, done.stderr
            assert (box.folder / "ca.pem").read_bytes() != first
            self.trusting(box)
            end = time.monotonic() + 60
            while True:  # by both workers, whichever takes a connection
                try:
                    assert {box.auth("/ping").status for _ in range(12)} | {box.admin("GET", "/ping").status} == {200}
                    break
                except ssl.SSLError:
                    assert time.monotonic() < end, box.said()
                    time.sleep(0.2)
            assert box.kill()
            (box.folder / "tls-self.pem").unlink()
            (box.folder / "ca.pem").unlink()
            box.start(wait=False)
            while not (box.folder / "tls-self.pem").exists():
                assert box.process.poll() is None, box.said()
                time.sleep(0.05)
            box.await_ready()  # of the CA that clients trust already

    @pytest.mark.parametrize(
        "words, status, said",
        [
            (("certificate", "new"), 1, "only with tls = self"), (("certificate", "renew"), 1, "only with tls = self"),
            (("certificate", "show"), 0, "both ports speak plain HTTP"), (("certificate", "make"), 2, "certificate show"),
            (("certificate", "new", "--json"), 2, "certificate show"), (("certificate",), 2, "needs one more word"),
        ],
    )
    def test_the_command_says_what_it_cannot_do(self, house, capsys, words, status, said):
        assert main([*words, "--config", house.config_file]) == status
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
