"""Certificates: what is read, what is served, what is taken up while the server runs."""

import contextlib
import dataclasses
import datetime
import os
import re
import signal
import socket
import ssl
import threading
import time

import pytest
from box import Box
from conftest import in_child
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

from appliance.base import tls as tls_room
from appliance.base.metrics import show_metrics
from appliance.base.tls import (
    Pair, PortCertificate, SharedPair, certificate_not_after, certificate_warnings, describe_certificate,
)
from appliance.figures import measure_certificates
from appliance.status import gather_status

DAY = 86400
NOW = 1_900_000_000
PEM, PKCS8, PLAIN = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


def make(name="box.example", start=NOW - DAY, end=NOW + 90 * DAY, key=None):
    """Return a self-signed certificate, and its key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, os.urandom(8).hex())])  # no two of one name
    at = datetime.datetime.fromtimestamp
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(at(start, datetime.UTC)).not_valid_after(at(end, datetime.UTC))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
    return builder.add_extension(x509.BasicConstraints(True, None), True).sign(key, hashes.SHA256()), key


def key_pem(key):
    return key.private_bytes(PEM, PKCS8, PLAIN)


class Files:
    """A certificate and its key in a folder, as a port serves them; with what was logged."""

    def __init__(self, folder, kind="two files"):
        self.folder, self.kind, self.logged = folder, kind, []
        self.cert, self.key = str(folder / "box.pem"), str(folder / "box.key") if kind == "two files" else ""
        self.put(*make())
        self.port = PortCertificate("auth", self.cert, self.key, "phrase" if kind == "PKCS#12" else "")
        self.port.load()
        self.port.context()

    def replace(self, path, content):
        with open(path + ".new", "wb") as file:
            file.write(content)
        os.replace(path + ".new", path)

    def put(self, certificate, key):
        if self.kind == "PKCS#12":
            encryption = serialization.BestAvailableEncryption(b"phrase")
            self.replace(self.cert, pkcs12.serialize_key_and_certificates(b"", key, certificate, None, encryption))
        elif self.kind == "one file":
            self.replace(self.cert, key_pem(key) + certificate.public_bytes(PEM))
        else:
            self.replace(self.cert, certificate.public_bytes(PEM))
            self.replace(self.key, key_pem(key))

    def look(self, times=2, now=NOW):
        for _ in range(times):
            self.port.check_at = 0.0
            self.port.check(now, lambda event, level, **fields: self.logged.append((event, fields)))
        return [event for event, _ in self.logged]


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def serial_of(port):
    return x509.load_pem_x509_certificates(port.pair().certificate)[0].serial_number


class TestTakingUp:
    """A certificate that is renewed needs no restart."""

    @pytest.mark.parametrize("kind", ["two files", "one file", "PKCS#12"])
    def test_files_that_have_changed_are_taken_up(self, tmp_path, kind):
        files = Files(tmp_path, kind)
        assert files.look() == [] and files.port.changed_context() is None
        certificate, key = make("new.example", end=NOW + 60 * DAY)
        files.put(certificate, key)
        assert files.look() == ["certificate.changed"]
        assert files.logged[0][1]["sha256"] == files.port.describe().sha256 and files.port.describe().names == ["new.example"]
        assert serial_of(files.port) == certificate.serial_number
        assert isinstance(files.port.changed_context(), ssl.SSLContext) and files.port.changed_context() is None

    def test_they_are_left_alone_until_they_have_settled(self, files):
        before = serial_of(files.port)
        certificate, key = make()
        files.replace(files.cert, certificate.public_bytes(PEM))
        assert files.look(1) == [], "its key may follow in a moment"
        files.replace(files.key, key_pem(key))
        assert files.look(1) == [] and serial_of(files.port) == before
        assert files.look(1) == ["certificate.changed"] and serial_of(files.port) == certificate.serial_number

    def test_a_reload_does_not_wait(self, files):
        certificate, key = make()
        files.put(certificate, key)
        files.port.check(NOW, lambda *_, **__: None, at_once=True)
        assert serial_of(files.port) == certificate.serial_number

    WRONG = (
        ("another key", "does not belong"), ("no key", "cannot be read"), ("half a certificate", "is damaged"),
        ("no certificate", "cannot be read"), ("ended", "ended at 2030-"), ("not begun", "begins only at 2030-"),
        ("too large", "larger than"),
    )

    @pytest.mark.parametrize("case, why", WRONG, ids=[case for case, _ in WRONG])
    def test_what_does_not_fit_leaves_the_old_one_in_force_and_is_logged_once(self, files, case, why):
        before = files.port.pair()
        certificate, key = make()
        if case == "another key":
            files.put(certificate, make()[1])
        elif case == "half a certificate":
            files.replace(files.cert, certificate.public_bytes(PEM)[:300])
        elif case == "too large":
            files.replace(files.cert, certificate.public_bytes(PEM) + b"#" * (1 << 20))
            files.replace(files.key, key_pem(key))
        elif case.startswith("no "):
            os.unlink(files.key if case == "no key" else files.cert)
        else:
            files.put(*(make(end=NOW - 1) if case == "ended" else make(start=NOW + 1)))
        assert files.look(5) == ["certificate.refused"]
        assert why in str(files.logged[0][1]["reason"]) and files.logged[0][1]["server"] == "auth"
        assert files.port.pair() == before and files.port.changed_context() is None
        assert why in files.port.problem(NOW)
        files.put(certificate, key)
        assert files.look() == ["certificate.refused", "certificate.changed"] and files.port.problem(NOW) == ""

    def test_nothing_in_the_files_stops_the_supervisor(self, files, monkeypatch):
        def fail(*words):
            raise TypeError("of a library")

        monkeypatch.setattr(tls_room, "read_pair", fail)
        files.put(*make())
        assert files.look(3) == ["certificate.refused"]
        monkeypatch.undo()
        assert files.look(2)[-1] == "certificate.changed"

    def test_one_that_begins_later_is_taken_up_when_it_does(self, files):
        certificate, key = make(start=NOW + 100)
        files.put(certificate, key)
        assert files.look() == ["certificate.refused"]
        assert files.look(1, NOW + 101) == ["certificate.refused", "certificate.changed"]

    def test_where_the_old_one_has_ended_too_the_new_one_is_served(self, files):
        certificate, key = make(end=NOW + 91 * DAY)
        files.put(certificate, key)
        files.look(2, NOW + 100 * DAY)
        assert serial_of(files.port) == certificate.serial_number

    def test_an_expired_one_does_not_stop_the_start(self, tmp_path):
        certificate, key = make(end=NOW - 1)
        (tmp_path / "box.pem").write_bytes(certificate.public_bytes(PEM) + key_pem(key))
        port = PortCertificate("auth", str(tmp_path / "box.pem"))
        port.load()
        assert port.describe().not_after == NOW - 1

    def test_a_mode_that_is_put_right_is_noticed(self, files):
        certificate, key = make()
        before = serial_of(files.port)
        files.put(certificate, key)
        os.rename(files.key, files.key + ".away")
        os.mkdir(files.key)  # root reads every file, and no folder
        assert files.look(4) == ["certificate.refused"] and serial_of(files.port) == before
        os.rmdir(files.key)
        os.rename(files.key + ".away", files.key)
        assert files.look(2)[-1] == "certificate.changed"


class TestEveryProcess:
    """One process reads the files, and every process serves what it has checked."""

    def test_a_process_that_begins_later_serves_the_same_whatever_the_files_hold_by_then(self, files):
        certificate, key = make()
        files.put(certificate, key)
        files.look()
        os.unlink(files.cert)
        os.unlink(files.key)

        def serve():
            files.port.context()
            assert serial_of(files.port) == certificate.serial_number

        assert in_child(serve) == 0

    def test_a_process_that_began_before_sees_the_change(self, files):
        reading, writing = os.pipe()

        def serve():
            os.read(reading, 1)
            assert files.port.changed_context() is not None and files.port.changed_context() is None

        child = os.fork()
        if not child:
            status = 1
            try:
                serve()
                status = 0
            finally:
                os._exit(status)
        files.put(*make())
        files.look()
        os.write(writing, b"x")
        assert os.waitpid(child, 0)[1] == 0

    def test_a_pair_that_is_half_written_is_not_read(self):
        shared = SharedPair()
        shared.put(Pair(b"certificate", b"key"))
        assert shared.get() == Pair(b"certificate", b"key")
        shared.octets[3] = 0
        assert shared.get() is None
        shared.put(Pair(b"both in one"))
        assert shared.get() == Pair(b"both in one")


class TestEnd:
    """21, 7 and 1 days before the end of a certificate, once each."""

    def test_it_is_logged_once_for_each_and_once_when_it_has_ended(self, files):
        events = []
        for left in (22, 21, 20, 8, 7, 6, 2, 1, 0.5, 0, -1):
            files.look(2, NOW + (90 - left) * DAY)
            events.append(len(files.logged))
        assert events == [0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
        assert [event for event, _ in files.logged] == ["certificate.ends"] * 3 + ["certificate.ended"]
        assert files.logged[0][1] == {"server": "auth", "file": files.cert, "at": "2030-06-15T17:46:40Z"}

    def test_a_new_one_has_warnings_of_its_own(self, files):
        files.look(1, NOW + 70 * DAY)
        files.put(*make(end=NOW + 91 * DAY))
        assert files.look(2, NOW + 71 * DAY) == ["certificate.ends", "certificate.changed", "certificate.ends"]

    def test_anyone_is_told_in_time_and_of_each_port(self, files):
        certificates = {"auth": files.port}
        assert certificate_not_after(certificates) == {"auth": NOW + 90 * DAY} and certificate_not_after({}) == {}
        assert certificate_warnings(certificates, NOW + 68 * DAY) == []
        assert certificate_warnings(certificates, NOW + 69 * DAY) == ["The certificate of auth ends at 2030-06-15T17:46:40Z."]
        assert certificate_warnings(certificates, NOW + 91 * DAY) == ["The certificate of auth ended at 2030-06-15T17:46:40Z."]

    def test_health_ready_has_the_warning_and_stays_well(self, idp, auth, files, clock):
        assert "warnings" not in auth.get("/health/ready").json
        idp.certificates = {"auth": files.port}
        clock.now = NOW + 89 * DAY
        assert auth.get("/health/ready").json["warnings"] == ["The certificate of auth ends at 2030-06-15T17:46:40Z."]

    def test_what_only_openssl_reads_is_served_without_a_word(self):
        assert describe_certificate(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n") is None


class TestStatus:
    """What of it needs attention, in `microauthd status`, GET /status and `mad status`."""

    def attention(self, idp):
        status = gather_status(idp, 0, {})
        found = {found.code: found for found in status.attention if found.code.startswith("certificate")}
        return status, found

    def test_a_certificate_that_lasts_needs_none(self, idp, files, clock):
        idp.certificates, clock.now = {"auth": files.port}, NOW
        status, found = self.attention(idp)
        assert found == {} and status.admin_certificate is None
        assert status.certificate.not_after == "2030-06-15T17:46:40Z" and status.certificate.names == ["box.example"]
        assert status.certificate.fingerprint == files.port.describe().sha256.replace(":", "").lower()

    @pytest.mark.parametrize("left, severity", [(21, "warning"), (7, "warning"), (1, "error"), (-1, "error")])
    def test_one_that_ends_does(self, idp, files, clock, left, severity):
        idp.certificates, clock.now = {"auth": files.port}, NOW + (90 - left) * DAY
        found = self.attention(idp)[1]["certificate_ending"]
        assert (found.severity, found.since, "auth" in found.text) == (severity, "2030-05-25T17:46:40Z", True)

    def test_metrics_tell_when_it_ends(self, idp, files, clock):
        idp.certificates, clock.now = {"auth": files.port}, NOW
        measure_certificates(idp)
        text = show_metrics(idp.counters.totals())
        (sample,) = re.findall("^microauthd_certificate_not_after_timestamp_seconds.*", text, re.M)
        assert 'server="auth"' in sample and float(sample.split()[-1]) == NOW + 90 * DAY

    def test_files_that_are_not_served_do_and_what_is_served_is_shown(self, idp, files, clock):
        idp.certificates, clock.now = {"auth": files.port}, NOW
        before = self.attention(idp)[0].certificate
        files.put(make()[0], make()[1])
        files.look()
        status, found = self.attention(idp)
        assert status.certificate == before
        assert found["certificate_refused"].severity == "error" and "does not belong" in found["certificate_refused"].text

    @pytest.mark.parametrize("content", [None, b"noise"])
    def test_a_box_that_is_stopped_is_told_by_its_files(self, make_idp, options, files, clock, content):
        clock.now = NOW
        idp = make_idp(dataclasses.replace(options, auth_ssl_cert_file=files.cert, auth_ssl_key_file=files.key))
        status, found = self.attention(idp)
        assert status.certificate.names == ["box.example"] and status.endpoints[0].tls and found == {}
        os.unlink(files.cert)
        if content:
            files.replace(files.cert, content)
        status, found = self.attention(idp)
        assert status.certificate is None and set(found) == {"certificate_refused"}


class Server:
    """A box that speaks TLS on both ports by two files each, and the certificates that clients trust."""

    def __init__(self, folder, workers):
        self.folder, self.trusted = folder, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.put()
        files = {f"{side}_ssl_{kind}_file": folder / f"box.{kind}" for side in ("auth", "admin") for kind in ("cert", "key")}
        self.box = Box(folder / "data", workers=workers, **files)
        self.box.tls = self.trusted

    def put(self, other_key=None):
        """Put a new certificate in place, the key after it. Return its serial number."""
        certificate, key = make("localhost", int(time.time()) - DAY, int(time.time()) + 90 * DAY)
        self.trusted.load_verify_locations(cadata=certificate.public_bytes(PEM).decode())
        for name, content in (("box.cert", certificate.public_bytes(PEM)), ("box.key", key_pem(other_key or key))):
            (self.folder / "new").write_bytes(content)
            os.replace(self.folder / "new", self.folder / name)
        return certificate.serial_number

    def connect(self, port=0):
        sock = socket.create_connection(("127.0.0.1", port or self.box.auth_port), 20)
        return self.trusted.wrap_socket(sock, server_hostname="localhost")

    def served(self):
        """The serial numbers that new connections of both ports see: enough of them to meet every process."""
        numbers = set()
        for port in (self.box.admin_port, *[self.box.auth_port] * 16):
            with self.connect(port) as sock:
                numbers.add(x509.load_der_x509_certificate(sock.getpeercert(True)).serial_number)
        return numbers

    def await_served(self, numbers):
        end = time.monotonic() + 60  # the manual promises ten seconds, of a machine that is free
        while (found := self.served()) != numbers:
            assert time.monotonic() < end, (found, numbers, self.box.said())
            time.sleep(0.1)

    def await_log(self, event):
        end = time.monotonic() + 60
        while event not in self.box.log():
            assert time.monotonic() < end, self.box.said()
            time.sleep(0.1)


def ask(sock):
    """Send a request over a connection that stays, and return the status of its answer."""
    sock.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
    said = b""
    while b"pong" not in said:
        piece = sock.recv(4096)
        if not piece:
            return 0
        said += piece
    return int(said[9:12])


@pytest.fixture(params=["2", "0"])
def server(request, tmp_path):
    server = Server(tmp_path, request.param)
    with server.box:
        yield server


class TestRunning:
    """A box that serves while its certificate changes."""

    def test_it_is_renewed_under_load_and_connections_that_are_open_stay(self, server):
        stop, statuses = threading.Event(), []

        def load():
            while not stop.is_set():
                try:
                    with server.connect() as sock:
                        statuses.extend(ask(sock) for _ in range(5))
                except OSError as error:
                    statuses.append(repr(error))

        with contextlib.ExitStack() as stack:
            living = [stack.enter_context(server.connect()) for _ in range(300)]
            assert {ask(sock) for sock in living} == {200}
            threads = [threading.Thread(target=load, daemon=True) for _ in range(2)]
            for thread in threads:
                thread.start()
            server.await_served({server.put()})
            stop.set()
            for thread in threads:
                thread.join()
            assert {ask(sock) for sock in living} == {200} and set(statuses) == {200}
        assert server.box.log().count("certificate.changed") == 2, "once a port"

    def test_a_pair_that_does_not_fit_is_served_by_none_and_not_by_a_process_that_is_replaced(self, server):
        (old,) = server.served()
        server.put(other_key=ec.generate_private_key(ec.SECP256R1()))
        server.await_log("certificate.refused server=admin")
        for pid in server.box.pids()[1:]:
            os.kill(pid, signal.SIGKILL)
        server.box.await_ready()
        assert server.served() == {old}
        new = server.put()
        server.box.process.send_signal(signal.SIGHUP)
        server.await_served({new})
        assert server.box.stop() == 0
