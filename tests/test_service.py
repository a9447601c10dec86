"""The service: sockets that are handed in, readiness and watchdog, the journal, installation."""

import ast
import contextlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from box import PROGRAM, ROOT, Box
from appliance.base import StartupError
from appliance.base.settings import Options
from appliance.processes import Supervisor, take_sockets, use_addresses


def listener(family=socket.AF_INET, kind=socket.SOCK_STREAM, address=("127.0.0.1", 0), listening=True):
    sock = socket.socket(family, kind)
    sock.bind(address)
    if listening:
        sock.listen()
    return sock


def as_service(sockets, names, *command, **more):
    """Start a command as a service manager does: it has these sockets as descriptors from 3 on, and their names."""
    # bash passes descriptors on under other numbers, and its process becomes the command's.
    moves = " ".join(f"{number}<&{sock.fileno()}" for number, sock in enumerate(sockets, 3))
    script = f'export LISTEN_PID=$$ LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names}; exec "$@" {moves}'
    return subprocess.Popen(
        ["bash", "-c", script, "bash", *map(str, command)], pass_fds=[sock.fileno() for sock in sockets], **more
    )


TAKE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from appliance.base import StartupError
from appliance.processes import take_sockets
os.environ |= {"LISTEN_PID": sys.argv[2]} if sys.argv[2] else {}
try:
    print({side: sock.getsockname() for side, sock in take_sockets().items()})
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
except StartupError as refusal:
    print(repr(str(refusal)))
"""


def taken(sockets, names, pid=""):
    """What take_sockets() finds, as {side: address}, or its refusal."""
    process = as_service(sockets, names, sys.executable, "-c", TAKE, ROOT, pid, stdout=subprocess.PIPE, text=True)
    return ast.literal_eval(process.communicate(timeout=30)[0])


class TestSocketsHandedIn:
    """sd_listen_fds(3): the service manager listens, so that ports below 1024 need no rights."""

    def test_they_are_taken_by_their_names(self, tmp_path):
        auth, admin = listener(), listener()
        local = listener(socket.AF_UNIX, address=str(tmp_path / "admin.sock"))
        for names in ("auth:admin:admin", "microauthd-auth.socket:microauthd-admin.socket:microauthd-admin.socket"):
            assert taken([auth, admin, local], names) == {
                "auth": auth.getsockname(), "admin": admin.getsockname(), "local": str(tmp_path / "admin.sock"),
            }
        assert taken([admin], "admin") == {"admin": admin.getsockname()}

    def test_those_of_another_process_are_left_alone(self):
        assert taken([listener()], "auth", pid="1") == {}

    @pytest.mark.parametrize(
        "sockets, names",
        [
            (lambda path: [listener()], "metrics"), (lambda path: [listener()], ""),
            (lambda path: [listener(), listener()], "auth:auth"), (lambda path: [listener(), listener()], "auth"),
            (lambda path: [listener(kind=socket.SOCK_DGRAM, listening=False)], "auth"),
            (lambda path: [listener(listening=False)], "admin"),
            (lambda path: [listener(socket.AF_UNIX, address=path)], "auth"),
        ],
        ids=["unknown name", "no name", "twice", "one name missing", "datagrams", "not listening", "AUTH on a Unix socket"],
    )  # fmt: skip
    def test_one_that_nobody_would_serve_is_refused(self, tmp_path, sockets, names):
        assert "LISTEN_FDS: descriptor" in taken(sockets(str(tmp_path / "sock")), names)

    def test_the_address_counts_as_one_of_mad_conf_does(self):
        anywhere = listener(address=("0.0.0.0", 0))
        with pytest.raises(StartupError, match="auth-ip 0.0.0.0 is not loopback"):
            use_addresses(Options(), {"auth": anywhere})
        options = use_addresses(Options(auth_insecure_http=True), {"auth": anywhere})
        assert (options.auth_ip, options.auth_port) == anywhere.getsockname()
        assert "service manager" in options.origins["auth-port"] and options.admin_port == Options().admin_port

    @pytest.mark.parametrize("is_handed", [True, False])
    def test_it_goes_on_listening_while_no_worker_can_start(self, is_handed):
        auth, admin = listener(), listener()
        handed = frozenset([auth] if is_handed else [])
        startup = SimpleNamespace(auth_sockets=[auth], admin_socket=admin, handed=handed)
        supervisor = Supervisor(startup)
        for _ in range(11):
            supervisor.schedule_restart(0)
        assert auth.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == is_handed

    @pytest.mark.parametrize("workers", ["2", "0"])
    def test_every_worker_serves_it_and_the_next_start_answers_what_came_between(self, tmp_path, workers):
        auth, admin = listener(), listener()
        box = Box(tmp_path / "data", workers=workers).set_up()
        box.auth_port, box.admin_port = auth.getsockname()[1], admin.getsockname()[1]

        def start():
            box.output = open(box.folder / "output.txt", "ab")
            box.process = as_service(
                [auth, admin], "auth:admin", *PROGRAM, "serve", cwd=box.folder, env=box.environ, stdout=box.output,
                stderr=box.output, start_new_session=True,
            )

        with contextlib.closing(auth), contextlib.closing(admin):
            start()
            try:
                box.await_ready()
                assert box.token().status == 200 and f"auth=127.0.0.1:{box.auth_port}" in box.log()
                assert box.stop() == 0
                between = socket.create_connection(auth.getsockname())
                between.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                start()
                box.await_ready()
                assert between.makefile("rb").read().startswith(b"HTTP/1.1 200")
                assert box.stop() == 0
            finally:
                box.__exit__()
