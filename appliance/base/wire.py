"""The two servers: whole requests, limits, deadlines, TLS.

Of cheroot run `HTTPServer.serve()`, the selector and the loop of `ConnectionManager`, and the queue and the threads of
`ThreadPool`. A connection is registered in the selector, or it is in the queue or in the hands of one thread.

The rest is ours, because cheroot reads, parses and sends in a thread of the pool, which a slow client then occupies.
Here the manager's thread accepts, handshakes, reads and parses without blocking; only a whole request takes a thread of
the pool, and what that thread cannot send at once the manager sends. llhttp (httptools) takes the place of cheroot's
reader, and `Connection` refuses what llhttp forgives. Deadlines take the place of cheroot's single time-out. The pool
grows as soon as a handler blocks; cheroot's never grows by itself, and polls for 100 ms when it is told to.
"""

import collections
import contextlib
import email.utils
import errno
import heapq
import io
import ipaddress
import itertools
import os
import queue
import re
import selectors
import socket
import ssl
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import cheroot.connections
import cheroot.workers.threadpool
import cheroot.wsgi
import httptools
import msgspec

from appliance.base.clock import sleep
from appliance.base.headers import security_headers
from appliance.base.peers import networks_of

# == Connections ===============================================================
# Accept, TLS, framing, limits, deadlines, the WSGI call, the response. Knows nothing of tokens.

RECV_SIZE = 16384  # octets read at once: a whole TLS record; it also bounds what one wake can pipeline
LINGER = 2       # seconds a closed connection still reads, so that the client gets the last answer. RFC 9112 §9.6
FRESH = 2        # seconds in which a new connection counts as one whose request is coming
SWEEP = 0.5      # seconds between two looks at the deadlines
BACKLOG = 1024   # connections that wait to be accepted
RETRY_SECONDS = 0.002  # seconds a thread waits after an error of its loop
GATHER_SECONDS = 0.001  # the selector waits at most for the requests of a round to be taken
POSTPONE_SECONDS = 0.01  # an answer waits no longer to go on together with others while more requests are queued
TOGETHER_MAX = 100  # answers that go on together
LEAD_SECONDS = 0.02     # a thread may take for one request before another takes those that are queued
THREADS = 4  # of one port that are kept free for requests
MAX_THREADS = 330  # of one port with those that are blocked: more than wait at the password gate (HashGate)
# The methods we know: where one is not offered, 405 with Allow; CONNECT and the unknown are 501. RFC 9110 §9.1
METHODS = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
}
# Fields whose repetition changes who is asking or what is asked. RFC 9110 §5.3 allows joining only lists, and the
# fields of proxies are lists: each proxy may add a line of its own.
NO_REPEAT = frozenset((
    "HTTP_HOST", "HTTP_AUTHORIZATION", "HTTP_ORIGIN", "HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "CONTENT_TYPE",
    "CONTENT_LENGTH"))
HOST = re.compile(r"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")  # RFC 3986 §3.2.2, no encoding
PATH = re.compile(rb"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]*)+")  # RFC 3986 §3.3, no dot segments
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)", re.DOTALL)
PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
ENCODED_SLASH = re.compile(rb"%2[Ff]")
PROXY_FIELD = re.compile(rb"forwarded|\Avia\Z|\Ax-real-ip\Z", re.IGNORECASE)
UPGRADE = re.compile(rb"\r\nUpgrade:[^\r\n]*", re.IGNORECASE)
# Fields that the server sets, and fields of one connection (RFC 9110 §7.6.1): an application cannot set them.
SERVER_FIELDS = frozenset(
    ("content-length", "date", "server", "connection", "keep-alive", "transfer-encoding", "upgrade", "trailer", "te")
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HTTP_REFUSALS = {  # status: (reason phrase, code, what the client is told)
    400: ("Bad Request", "invalid_request", "The request is not valid HTTP."),
    408: ("Request Timeout", "request_timeout", "The request did not arrive in time."),
    413: ("Content Too Large", "content_too_large", "The request content is too large."),
    414: ("URI Too Long", "uri_too_long", "The request target is too long."),
    417: ("Expectation Failed", "expectation_failed", "The expectation cannot be met."),
    421: ("Misdirected Request", "misdirected_request", "This user is not served on this socket."),
    431: ("Request Header Fields Too Large", "headers_too_large", "The request header is too large."),
    500: ("Internal Server Error", "server_error", "The server failed."),
    501: ("Not Implemented", "not_implemented", "The method or transfer coding is not implemented."),
    505: ("HTTP Version Not Supported", "version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are spoken here."),
}

REFUSAL_HEADERS = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))


class Limits(msgspec.Struct, frozen=True):
    """The limits of one port: sizes in octets, times in seconds."""

    header_bytes: int = 16384  # request line and header fields; 431. RFC 6585 §5
    request_line_bytes: int = 8192  # 414. RFC 9112 §3
    headers: int = 64  # fields, and trailer fields; 431
    body_bytes: int = 65536  # content; 413, before any of it is read when Content-Length tells. RFC 9110 §15.5.14
    request_seconds: float = 15  # a whole request from its first byte; 408. RFC 9110 §15.5.9
    handshake_seconds: float = 10
    idle_seconds: float = 75         # a fifth of it when more than half of all connections are taken
    send_seconds: float = 15         # a whole answer
    connections: int = 4096
    connections_per_peer: int = 1024  # a /64 of IPv6 is one; loopback and trusted proxies speak for many: not counted
    peers_per_site: int = 16  # the peers of a /48 have together what so many of them may have


class HttpRefusal(Exception):
    """A request is refused: `status` for the client, `reason` for the log. The connection is closed after it."""
    def __init__(self, status, reason):
        super().__init__(reason)
        self.status, self.reason = status, reason


def listen(ip: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a bound, listening, non-blocking socket; `::` takes IPv4 as well, as in cheroot. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if ":" in ip:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ip != "::")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by what is accepted
        sock.bind((ip, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def listen_at_machine(folder: str, name: str, mode: int = 0o600) -> socket.socket:
    """Return a listening Unix socket of a folder; what a killed server left there is replaced. unix(7), bind(2)

    Raises OSError: EADDRINUSE if somebody listens there, EEXIST if the name is taken by something else.
    """
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A path has room for 107 octets (sun_path); this one is short whatever the folder is called.
        path = f"/proc/self/fd/{directory}/{name}"
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "there is a file of that name, which is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                if (error := probe.connect_ex(path)) != errno.ECONNREFUSED:
                    error = errno.EADDRINUSE if error in (0, errno.EAGAIN) else error
                    raise OSError(error, os.strerror(error))
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, mode)  # whatever the umask is; until the next line nobody can connect
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)


def peer_user(sock: socket.socket) -> int:
    """Return the uid of the process at the other end of a Unix socket, as the kernel noted it. SO_PEERCRED, unix(7)"""
    size = struct.calcsize("3i")
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]


def listen_shared(ip: str, port: int, count: int) -> list[socket.socket]:
    """Return `count` sockets that share a port on which nobody else listens. Raises OSError (EADDRINUSE) otherwise.

    SO_REUSEPORT alone would let any program of the same user in. A socket without it cannot be bound beside one that
    listens, so it goes first, and holds the port until those that share it listen. A client that connects meanwhile is
    reset, where an instant earlier it was refused. socket(7)
    """
    sockets: list[socket.socket] = []
    first = listen(ip, port)
    try:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # Linux checks the holder's flag at each later bind
        while len(sockets) < count:
            sockets.append(listen(ip, port, reuse_port=True))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    finally:
        first.close()
    return sockets


def pause_listening(sock: socket.socket):
    """Stop listening and stay bound: connections are refused until `resume_listening`, and nobody takes the port."""
    # Once only: shutdown() of a socket that does not listen marks it, and every connection that it accepts later
    # would read end-of-file at once.
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        with contextlib.suppress(OSError):
            # With SO_REUSEADDR another program could bind beside a socket that does not listen.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            sock.shutdown(socket.SHUT_RD)


def resume_listening(sock: socket.socket):
    """Listen, or go on: connections of a socket with SO_REUSEADDR do not hinder the next start in TIME_WAIT."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.listen(BACKLOG)


def find_listener(port: int) -> int:
    """Return the pid of a process that listens on a TCP port, the oldest of several, or 0 if it cannot be seen.

    Only processes of the same user show their sockets. proc_pid_net(5), proc_pid_fd(5)
    """
    inodes, ending = set(), f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table) as lines:
            for fields in map(str.split, lines):
                if fields[1].endswith(ending) and fields[3] == "0A":  # TCP_LISTEN
                    inodes.add(f"socket:[{fields[9]}]")
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) if inodes else ():
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor.path) in inodes:
                        return pid
    return 0


def _address(text):
    """Return `text` as an IP address, IPv4 when it is IPv4-mapped IPv6. RFC 4291 §2.5.5.2"""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _in_networks(address, networks):
    return any(address in network for network in networks)


def client_address(remote_addr: str, forwarded_for: str | None, trusted_proxies: tuple) -> str:
    """Return the address a request comes from: through trusted proxies the right-most untrusted hop.

    `forwarded_for` is X-Forwarded-For, hops joined by commas. A malformed hop ends the chain.
    """
    peer = _address(remote_addr)
    for hop in reversed(forwarded_for.split(",")) if forwarded_for else ():
        if not _in_networks(peer, trusted_proxies):
            break
        try:
            peer = _address(hop.strip())
        except ValueError:
            break
    return str(peer)


def _decode_percent(path):
    return PERCENT.sub(lambda match: bytes((int(match[1], 16),)), path)


def _path_info(path, slash=b""):
    """Return an encoded path as PATH_INFO: its octets as latin-1 (PEP 3333). Raises HttpRefusal.

    PATH_INFO cannot tell an encoded slash from one that parts segments. So it is refused, as is a backslash, unless the
    application names a control character, `slash`, that stands for it there; no path has another one. RFC 3986 §2.2.
    """
    if not PATH.fullmatch(path):
        # Refuse, encoded or not, what two parsers could read as two paths: / \ NUL, controls, dot segments.
        whole = _decode_percent(path)
        if (not path.startswith(b"/") or PERCENT.sub(b"", path).count(b"%")
                or (not slash and (whole.count(b"/") != path.count(b"/") or b"\\" in whole))
                or any(octet < 32 or octet == 127 for octet in whole)
                or any(_decode_percent(part) in (b".", b"..") for part in path.split(b"/"))
                or not PATH.fullmatch(PERCENT.sub(b"x", path))):
            raise HttpRefusal(400, "path")
        try:
            whole.decode("utf-8")  # Bottle drops what is not: /users/%ffann would be ann
        except UnicodeDecodeError:
            raise HttpRefusal(400, "path") from None
        path = _decode_percent(ENCODED_SLASH.sub(slash, path)) if slash else whole
    return path.decode("latin-1")


class HeaderKeys(dict):
    """Maps header field names, as received, to environ keys; to "" those that are dropped."""

    def __init__(self, trusted):
        self.trusted = trusted

    def __missing__(self, name):
        key = name.decode("ascii").upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        # X_Forwarded_For is not X-Forwarded-For; Proxy would become the HTTP_PROXY of CGI (httpoxy); X-Forwarded-Host
        # is believed of nobody, and Bottle would prefer it to Host.
        if b"_" in name or key in ("HTTP_PROXY", "HTTP_X_FORWARDED_HOST") or (not self.trusted and (
                key in ("HTTP_FORWARDED", "HTTP_X_REAL_IP") or key.startswith("HTTP_X_FORWARDED"))):
            key = ""
        if len(name) <= 64:
            if len(self) >= 512:  # a client sends names it has made up
                self.clear()
            self[name] = key
        return key


class Connection:
    """One connection and what its octets have become; the callbacks are llhttp's.

    It belongs to the selector, or to the one thread that has taken it from there or from the queue. So it has no lock.
    """
    __slots__ = (
        "server", "limits", "sock", "address", "base", "names", "trusted", "counted", "parser",
        "handshaking", "lingering", "unused", "deadline", "events",  # where it stands, and what it waits for
        "head", "tail", "received", "environ", "target", "body", "length", "left", "size", "count",
        "headed", "chunked", "began",  # the request that is arriving
        "requests", "ended", "refusal", "expecting", "steps", "out", "last",  # what is still to be done
    )

    def __init__(self, server, sock, address, base, names, trusted, counted):
        self.server, self.limits, self.sock, self.address = server, server.limits, sock, address
        self.base, self.names, self.trusted, self.counted = base, names, trusted, counted
        self.parser: Any = httptools.HttpRequestParser(self)  # None once the connection is closed
        self.lingering = self.headed = self.last = self.chunked = self.expecting = self.ended = False
        self.unused = True
        self.handshaking = server.tls is not None
        self.events = selectors.EVENT_READ
        self.requests: collections.deque[tuple[dict, bool]] = collections.deque()
        self.refusal: HttpRefusal | None = None
        self.steps: Generator | None = None  # of the answer to a request that goes on beside others: Server.answer()
        self.out: bytes | memoryview = b""
        self.environ: Any = None  # of the request that is arriving
        self.target, self.received = b"", 0  # received: octets of the part that is being read
        self.head, self.tail = b"", b""  # the header so far; its last octets, which may begin its end

    # -- llhttp's callbacks --

    def on_message_begin(self):
        self.environ = self.base.copy()
        self.target = b""
        self.body: list[bytes] = []
        self.size = self.count = self.length = self.left = self.received = 0
        self.chunked = self.expecting = self.unused = False
        self.began = time.monotonic()

    def on_url(self, piece):
        self.target += piece
        if len(self.target) > self.limits.request_line_bytes - 18:  # "OPTIONS ", " HTTP/1.1" and an edge
            raise HttpRefusal(414, "request target")

    def on_header(self, name, value):
        self.count += 1
        self.size += len(name) + len(value) + 4
        if self.count > self.limits.headers or self.size > self.limits.header_bytes:
            raise HttpRefusal(431, "header size")
        if self.headed:
            return  # A trailer field: discarded. RFC 9110 §6.5.1
        key = self.names[name]
        if key in self.environ:
            if key in NO_REPEAT:
                raise HttpRefusal(400, "repeated header field")
            self.environ[key] += ("; " if key == "HTTP_COOKIE" else ", ") + value.decode("latin-1").rstrip(" \t")
        elif key:
            self.environ[key] = value.decode("latin-1").rstrip(" \t")
        if PROXY_FIELD.search(name):  # believed or not, it shows that the peer speaks for somebody else
            self.environ["microauthd.proxied"] = True

    def on_headers_complete(self):
        environ, target = self.environ, self.target
        token, version = self.parser.get_method(), self.parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise HttpRefusal(505, "version")
        # llhttp takes RTSP/1.0 and ICE/1.0 for HTTP, and more than one space for one.
        if not self.head.startswith(b"%b %b HTTP/%b\r\n" % (token, target, version.encode())):
            raise HttpRefusal(400, "request line")
        method = METHODS.get(token)
        if method is None:
            raise HttpRefusal(501, "method")  # CONNECT too, which llhttp takes for an upgrade
        if self.parser.should_upgrade():
            return  # llhttp stops here: see _ignore_upgrade()
        self.head, self.headed, self.count, self.received = b"", True, 0, 0
        if self.size + len(target) > self.limits.header_bytes:
            raise HttpRefusal(431, "header size")
        environ["REQUEST_METHOD"] = method
        if version == "1.0":
            environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        self._check_target(environ, target, version)
        self._check_framing(environ, version)
        if self.trusted:
            self._believe_proxy(environ)

    def _check_target(self, environ, target, version):
        """RFC 9112 §3.2: exactly one Host, and the target's authority is the same."""
        host = environ.get("HTTP_HOST")
        if (host is None and version == "1.1") or (host is not None and not HOST.fullmatch(host)):
            raise HttpRefusal(400, "Host")
        if b"#" in target:
            raise HttpRefusal(400, "fragment")
        if not target.startswith(b"/"):
            absolute = ABSOLUTE.fullmatch(target)
            if not absolute or host is None or absolute[1].decode("latin-1").lower() != host.lower():
                raise HttpRefusal(400, "request target")
            target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        path, _, query = target.partition(b"?")
        environ["PATH_INFO"] = _path_info(path, self.server.slash)
        environ["QUERY_STRING"] = query.decode("latin-1")

    def _check_framing(self, environ, version):
        """RFC 9112 §6.1: one framing, of which there is no doubt. The application sees decoded content."""
        coding = environ.pop("HTTP_TRANSFER_ENCODING", None)
        length = environ.get("CONTENT_LENGTH")
        if coding is not None:
            if version == "1.0" or length is not None:
                raise HttpRefusal(400, "Transfer-Encoding")
            if coding.lower() != "chunked":
                raise HttpRefusal(501, "Transfer-Encoding")
            self.chunked = True
        if length is not None:
            if not (length.isascii() and length.isdigit()):
                raise HttpRefusal(400, "Content-Length")
            if len(length) > 18 or int(length) > self.limits.body_bytes:
                raise HttpRefusal(413, "content size")
            self.left = int(length)
        expect = environ.pop("HTTP_EXPECT", None)
        if expect is not None and version == "1.1":
            if expect.lower() != "100-continue":
                raise HttpRefusal(417, "Expect")
            self.expecting = self.chunked or self.left > 0

    def _believe_proxy(self, environ):
        forwarded_for = environ.get("HTTP_X_FORWARDED_FOR")
        if forwarded_for:
            peer = client_address(self.address, forwarded_for, self.server.trusted_proxies)
            environ["REMOTE_ADDR"] = environ["microauthd.peer"] = peer
        # The nearest proxy writes last.
        if environ.get("HTTP_X_FORWARDED_PROTO", "").rpartition(",")[2].strip().lower() == "https":
            environ["wsgi.url_scheme"] = "https"

    def on_body(self, piece):
        self.expecting = False  # it does not wait for us. RFC 9110 §10.1.1
        self.body.append(piece)
        if not self.chunked:
            self.left -= len(piece)
            return
        self.length += len(piece)
        if self.length > self.limits.body_bytes:
            raise HttpRefusal(413, "content size")

    def on_message_complete(self):
        if self.parser.should_upgrade():
            return
        environ, body = self.environ, b"".join(self.body)
        environ["wsgi.input"] = io.BytesIO(body)
        if self.chunked:
            environ["CONTENT_LENGTH"] = str(len(body))
        # A trailer can still say `Connection: close`, so keep-alive is asked now.
        self.ended = not self.parser.should_keep_alive()
        self.requests.append((environ, not self.ended))
        self.environ, self.body, self.head, self.expecting, self.received = None, [], b"", False, 0

    # -- octets --

    def feed(self, data):
        """Parse what has come into `requests`, and `refusal` when that is where it ends.

        llhttp does not tell where in its input a message begins, and what it forgives in a request line shows in the
        octets alone. So no input of its own reaches beyond a message, and the first one begins with the request line.
        """
        start, data = len(self.tail), self.tail + data
        since = 0  # where the search for an empty line begins: behind the one before
        while start < len(data) and not self.ended:
            if self.environ is None:
                # RFC 9112 §2.2: an empty line before the request line is forgiven. Two are, no more.
                while start < len(data) and data[start] in b"\r\n":
                    self.head = data[start:start + 1]
                    start, self.received = start + 1, self.received + 1
                    if self.received > 4:
                        self.refusal = HttpRefusal(400, "empty lines")
                        return
                if start == len(data):
                    break
                if self.head == b"\r":
                    self.refusal = HttpRefusal(400, "request line")
                    return
                since, self.head, self.headed = start, b"", False
            if self.headed and not self.chunked:
                since = end = start + self.left
            else:  # A header ends with an empty line, and so does chunked content: with its last chunk or a trailer.
                end = data.find(b"\r\n\r\n", max(since, start - 3)) + 4
                end, since = (end, end) if end > 3 else (len(data), since)
            piece = data[start:end]
            if self.headed:
                self.received += len(piece)
            else:
                self.head += piece
            self._parse(piece)
            if self.refusal is None and self.environ is not None:
                self._check_size()
            if self.refusal is not None:
                return
            start = end
        self.tail = data[max(since, len(data) - 3):]

    def _check_size(self):
        """Bound what has come of a request that is not whole yet, and reaches no callback."""
        if not self.headed:
            if len(self.head) > self.limits.header_bytes:
                self.refusal = HttpRefusal(431, "header size")
            elif self.parser.get_http_version() == "0.9":
                self.refusal = HttpRefusal(505, "version")
        # Sizes, extensions and trailers of chunks.
        elif self.chunked and self.received > 4 * self.limits.body_bytes + RECV_SIZE:
            self.refusal = HttpRefusal(413, "chunks")

    def _parse(self, piece):
        upgrade = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            upgrade = True
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, HttpRefusal):
                self.refusal = HttpRefusal(cause.status, cause.reason)  # without the traceback and what it holds
            elif cause is not None:
                self.server.log("error", server=self.server.name, exc_info=(type(cause), cause, cause.__traceback__))
                self.refusal = HttpRefusal(500, "error")
            elif piece.startswith(b"\x16\x03") and not self.target:
                self.refusal = HttpRefusal(0, "TLS on a plain port")
            else:
                self.refusal = HttpRefusal(505 if str(error) == "Invalid HTTP version" else 400, str(error))
        if upgrade:  # not in the handler above: it would become the context of what is raised next
            self._ignore_upgrade()

    def _ignore_upgrade(self):
        """Parse the header again without its Upgrade fields: a server may ignore an offer. RFC 9110 §7.8

        llhttp skips the content of a request that offers an upgrade, and cannot be told otherwise. The JDK's HttpClient
        and `curl --http2` offer h2c with every request over plain http. The header is whole, and no octet behind it has
        been parsed, so a new parser reads the content by the same framing.
        """
        began = self.began
        self.head, offers = UPGRADE.subn(b"", self.head)
        if not offers:  # llhttp has seen an offer that we do not see
            self.refusal = HttpRefusal(400, "Upgrade")
            return
        self.parser = httptools.HttpRequestParser(self)
        self._parse(self.head)
        self.began = began  # the time limit of a request counts from its first octet

    # -- the socket --

    def advance(self):
        """Do what can be done without blocking and without the application. False: close the connection.

        Called in the manager's thread when the socket is ready, or a deadline has passed.
        """
        try:
            if self.lingering:
                return self._linger()
            if self.handshaking:
                self._handshake()
            while not (self.out or self.requests or self.refusal is not None or self.expecting):
                data = self.sock.recv(RECV_SIZE)
                if not data:
                    return False
                self.feed(data)
                if self.server.tls is None or not self.sock.pending():  # decrypted already: the selector does not tell
                    break
            return self._transmit()
        except (BlockingIOError, ssl.SSLWantReadError):
            return self._wait()
        except ssl.SSLWantWriteError:
            self.events = selectors.EVENT_WRITE
            return True
        except OSError:
            return False  # the peer is gone, or its TLS is broken
        except Exception:
            self.server.log("error", server=self.server.name, exc_info=sys.exc_info())
            return False

    def waiting_since(self) -> float:
        """Return when a registered connection began to wait for what it waits for, in monotonic seconds."""
        limits = self.limits
        if self.environ is not None and not self.out:
            return self.began
        if self.lingering:
            return self.deadline - LINGER
        if self.out:
            return self.deadline - limits.send_seconds
        return self.deadline - (limits.handshake_seconds if self.handshaking else limits.idle_seconds)

    def is_idle(self, now: float) -> bool:
        """Return whether nothing is under way: no request, no answer, and no connection that has just been opened."""
        if self.environ is not None or self.out:
            return False
        return not self.unused or now - self.waiting_since() > FRESH

    def communicate(self):
        """Answer one whole request. False: close the connection. Called by a thread of cheroot's pool."""
        steps = self.server.answer(*self.requests.popleft())
        try:
            next(steps)
        except StopIteration as end:
            return self.send(*end.value)
        self.steps = steps  # put_conn() postpones it
        return True

    def go_on(self):
        """Do the next step of an answer. Raises nothing: others go on after it."""
        steps: Any = self.steps
        try:
            next(steps)
        except StopIteration as end:
            self.out, self.last = end.value
        except BaseException:  # answer() had no memory to tell it: the steps have ended
            self.steps = None

    def finish(self, error: BaseException | None):
        """Send the answer whose steps are done, or that to their `error`. False: close the connection."""
        steps: Any = self.steps
        self.steps = None
        try:
            if self.out:  # it has not waited for the outcome
                return error is None and self.send(self.out, self.last)
            if error and steps:
                steps.throw(error)
            elif steps:
                next(steps)
        except StopIteration as end:
            return self.send(*end.value)
        except BaseException:  # others are finished after it
            self.server.error_log()
        return False

    def send(self, out, last):
        """Send an answer. False: close the connection."""
        try:
            self.out, self.last = out, last
            self.deadline = time.monotonic() + self.limits.send_seconds
            return self._transmit()
        except OSError:
            return False
        except Exception:
            self.server.log("error", server=self.server.name, exc_info=sys.exc_info())
            return False

    def close(self):
        self.server.forget(self)
        self.parser = None  # it refers back to the connection
        with contextlib.suppress(OSError):
            self.sock.close()

    def _transmit(self):
        """Send what is to be sent, as far as it goes. False: close the connection."""
        while True:
            if self.out:
                if not self._send():
                    return True
                if self.last:
                    return self._close_gracefully()
            if self.requests:
                return True
            if self.refusal is not None:
                self.out, self.last = self.server.refuse(self), True
                if not self.out:
                    return False
            elif self.expecting:
                self.out, self.expecting = CONTINUE, False
            else:
                return self._wait()
            self.deadline = time.monotonic() + self.limits.send_seconds

    def _send(self):
        """Send what can be sent without waiting; true when all is."""
        try:
            sent = self.sock.send(self.out)
        except (BlockingIOError, ssl.SSLWantWriteError):
            self.events = selectors.EVENT_WRITE
            return False
        except ssl.SSLWantReadError:
            self.events = selectors.EVENT_READ
            return False
        self.out = memoryview(self.out)[sent:] if sent < len(self.out) else b""
        self.events = selectors.EVENT_WRITE
        return not self.out

    def _wait(self):
        """Wait for the rest of a handshake or a request, or for the next request. False: none may come any more."""
        self.events = selectors.EVENT_READ
        if self.handshaking or self.lingering:
            return True
        draining = self.server.draining
        if self.environ is not None:
            self.deadline = self.began + self.limits.request_seconds
        elif draining or not self.unused:
            now = time.monotonic()
            if draining and now >= draining:
                return False
            self.deadline = now + self.limits.idle_seconds
        if self.server.tls and self.sock.pending():
            self.events = selectors.EVENT_WRITE  # at once: what has been decrypted already the selector does not see
        return True

    def _handshake(self):
        """Go on with the TLS handshake. Raises SSLWantReadError or SSLWantWriteError until it is done."""
        try:
            self.sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                self.handshaking = False
                self._leave_tls()
                self.refusal = HttpRefusal(400, "plain HTTP on a TLS port")
                return
            if not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                self.server.log(
                    "refused", server=self.server.name, peer=self.address, reason=f"TLS handshake: {error.reason}",
                    status=0,
                )
            raise
        self.handshaking = False
        self.deadline = time.monotonic() + self.limits.idle_seconds
        self.base["HTTPS"] = "on"  # as cheroot's adapter names them
        self.base["SSL_CIPHER"], self.base["SSL_PROTOCOL"], _ = self.sock.cipher()

    def _leave_tls(self):
        """Continue on the bare TCP connection."""
        self.sock = socket.socket(fileno=self.sock.detach())
        self.sock.setblocking(False)

    def _close_gracefully(self):
        """Shut down the sending side and read on for a while: closing with unread octets would reset the connection,
        and the client could lose the response. Requests behind the last answer are not processed. RFC 9112 §9.6
        """
        self.requests.clear()
        self.lingering, self.received, self.events = True, 0, selectors.EVENT_READ
        self.deadline = time.monotonic() + LINGER
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()  # sends close_notify, and does not wait for theirs
            self._leave_tls()
        self.sock.shutdown(socket.SHUT_WR)
        return True

    def _linger(self):
        data = self.sock.recv(RECV_SIZE)
        self.received += len(data)
        return bool(data) and self.received < 64 * RECV_SIZE


class WorkerThread(cheroot.workers.threadpool.WorkerThread):
    """A thread of cheroot's pool that survives what its loop raises, of memory most likely."""

    def __init__(self, server, name):
        super().__init__(server)
        self.name, self.daemon = name, True
        self.leads = False

    def run(self):
        with contextlib.suppress(Exception):  # what needs it tries again
            self.server.prepare_thread()
        while True:
            try:
                self._process_connections_until_interrupted()
                return self.server.requests.release_lead(self)
            except BaseException as error:
                if not isinstance(error, MemoryError):
                    self.server.log("error", server=self.server.name, exc_info=sys.exc_info())
                sleep(RETRY_SECONDS)


class ThreadPool(cheroot.workers.threadpool.ThreadPool):
    """cheroot's pool, grown whenever handlers block, so that `min` threads are free for other requests.

    cheroot's own grow() polls for 100 ms until a thread runs, and nothing calls it.

    Answers that would go on beside others are postponed until no request is queued, and go on in one thread: flat
    combining. They come to share a commit so, and no thread is put to sleep and woken for each of them.
    """

    def __init__(self, server, min, max):
        super().__init__(server, min, max)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self.get = self._take             # cheroot's threads call it
        self._lead = threading.Lock()     # held by the thread that takes requests
        self._leader: WorkerThread | None = None
        self._taken_at = 0.0
        self._drained = threading.Lock()  # released when the queue has become empty
        self._lock = threading.Lock()
        self._postponed: collections.deque[Connection] = collections.deque()  # their answers wait to go on together
        self._postponed_at = 0.0          # when the first of them did
        self._combining = threading.Lock()  # held by the thread that lets them go on
        self._waiting = set()             # blocked threads
        self._blocked_most = 0            # the most of them at once since the last sweep
        self._called = threading.Event()  # threads are missing, or there was a sweep
        self._sweeps = 0                  # since the last beat
        self._numbers = itertools.count()
        self._ended = False

    def start(self):
        self.grow()
        self._grower = threading.Thread(target=self._run, name=f"{self.server.name}-pool", daemon=True)
        self._grower.start()

    def _take(self):
        """Return the next connection with a whole request.

        One thread takes requests until it blocks, then another: running at once they would only wait for the GIL.
        """
        me: Any = threading.current_thread()
        while True:
            if not me.leads:
                self._take_lead(me)
            if self._queue.empty():
                with contextlib.suppress(RuntimeError):  # nobody waits for it
                    self._drained.release()
            if not self._is_due() or not self._combine():
                break
        conn = self._queue.get()
        self._taken_at = time.monotonic()
        if conn is cheroot.workers.threadpool._SHUTDOWNREQUEST:
            self._combine()
        return conn

    def _take_lead(self, me):
        """Wait for the lead. Meanwhile let postponed answers go on: whoever has the lead may wait for a request."""
        while not self._lead.acquire(blocking=False):
            if self._is_due() and self._combine():
                continue
            if self._lead.acquire(timeout=POSTPONE_SECONDS if self._postponed else -1):
                break
        me.leads, self._leader = True, me

    def _is_due(self):
        """Return whether postponed answers are to go on now."""
        is_overdue = time.monotonic() - self._postponed_at > POSTPONE_SECONDS
        return bool(self._postponed) and (is_overdue or self._queue.empty())

    def postpone(self, conn):
        """Have an answer go on together with others that wait for that."""
        if not self._postponed:
            self._postponed_at = time.monotonic()
        self._postponed.append(conn)

    def _combine(self):
        """Let all postponed answers go on, unless another thread does. Return whether this one did."""
        did = False
        # Looked at again after the release: another thread may have postponed one meanwhile and seen the lock held.
        while self._postponed and self._combining.acquire(blocking=False):
            try:
                self.server.finish_together(self._postponed)
            finally:
                self._combining.release()
            did = True
        return did

    def release_lead(self, thread):
        """Let another thread take requests."""
        with self._lock:
            if thread.leads:
                thread.leads = False
                self._lead.release()

    def is_behind(self):
        """Return whether requests are queued. One that takes long does not hold up the others: it loses the lead."""
        if self._queue.empty() and not self._postponed:
            return False
        if time.monotonic() - self._taken_at > LEAD_SECONDS and self._leader:
            self.release_lead(self._leader)
        return True

    def has_queued_requests(self):
        return not self._queue.empty()

    def hand_over(self, conns):
        """Queue what a round of the selector has found, and wait until it is taken, or for a moment."""
        self._drained.acquire(blocking=False)
        for conn in conns:
            self._queue.put(conn)
        self._drained.acquire(timeout=GATHER_SECONDS)

    def sweep(self):
        """Have the pool trimmed and the process reported alive. Called by the manager's thread at every sweep."""
        self._sweeps += 1
        self._called.set()

    @contextlib.contextmanager
    def blocking(self):
        """Mark this thread as blocked: others are started if too few are left free.

        Yields False if every thread but the one it waits for would be blocked. Has no effect in a thread of another
        pool, or in one that is marked already.
        """
        me = threading.current_thread()
        if not isinstance(me, WorkerThread) or me.server is not self.server or me in self._waiting:
            yield True
            return
        self.release_lead(me)
        with self._lock:
            self._waiting.add(me)
            self._blocked_most = max(self._blocked_most, len(self._waiting))
            free, room = self._free(), self.max - len(self._threads)
        if free < self.min and room > 0:
            self._called.set()
        try:
            # The holder of the write lock is not marked. Several threads may block before the next one has started.
            yield free + min(room, self.min) > 1
        finally:
            with self._lock:
                self._waiting.discard(me)

    def _free(self):
        return len(self._threads) - len(self._pending_shutdowns) - len(self._waiting)

    def grow(self, amount=None):
        """Start threads while too few are free.

        Done in a thread of its own and without the lock: Thread.start() waits forever for a thread that has no memory
        to begin. The beats stop then, and the supervisor replaces the process.
        """
        while True:
            with self._lock:
                self._clear_dead_threads()
                if self._ended or self._free() >= self.min or len(self._threads) >= self.max:
                    return
            try:
                thread = WorkerThread(self.server, f"{self.server.name}-{next(self._numbers)}")
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the system has no more of them
                self.server.log("error", server=self.server.name, reason=error, threads=len(self._threads))
                return
            with self._lock:
                self._threads.append(thread)

    def _run(self):
        while not self._ended:
            self._called.wait()
            self._called.clear()
            try:
                self.grow()
                if self._sweeps:
                    self._sweeps = 0
                    # As many as have just been blocked at once will be again: those that write in groups all are, and
                    # all are free when their group is on the disk.
                    most, self._blocked_most = self._blocked_most, len(self._waiting)
                    self.shrink(len(self._threads) - self.min - most)
                    self.server.beat()
            except Exception:
                self.server.log("error", server=self.server.name, exc_info=sys.exc_info())

    def stop(self, timeout=5):
        """End the threads; true when all have ended in time."""
        end = time.monotonic() + max(0.1, timeout)
        self._ended = True
        self._called.set()
        threads = [self._grower, *self._threads]
        for _ in threads:
            self._queue.put(cheroot.workers.threadpool._SHUTDOWNREQUEST)
        for thread in threads:
            with contextlib.suppress(RuntimeError):  # one that never began
                thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


class ConnectionManager(cheroot.connections.ConnectionManager):
    """cheroot's selector and its loop, in one thread, which accepts, reads and parses without blocking."""

    def __init__(self, server):
        super().__init__(server)
        self._poll, self._selector.select = self._selector.select, self._select
        self.gathered = []  # connections with a whole request, of this round
        self.swept = time.monotonic()
        # How many since the last line about it, the last peer, when that line was.
        self._turned_away: list[Any] = [0, "", 0.0]
        self._listening = True
        self._woken, self._wake = os.pipe()
        self._selector.register(self._woken, selectors.EVENT_READ, self)

    def _select(self, timeout=None):
        # All requests of a round are handed over at once, and the GIL is left to the thread that takes them. Otherwise
        # it and this thread pass the GIL to and fro at each system call, and one process issues half as many tokens.
        if self.gathered:
            self.server.requests.hand_over(self.gathered)
            self.gathered.clear()
        ready = self._poll(LEAD_SECONDS if self.server.requests.is_behind() else timeout)
        # New connections last. Others give way to them, and an event of one of those would meet its closed socket, or
        # the new connection that has the descriptor by then.
        return sorted(ready, key=lambda event: event[1] is self.server)

    def run(self, expiration_interval):
        """Serve until woken. Called by cheroot's serve() again and again while the server is ready."""
        self._stop_requested = False
        if self.server.draining:
            self._expire(0)
        super().run(expiration_interval)

    def wake(self):
        """Have the manager's thread sweep now, not in half a second, while the server is draining."""
        os.write(self._wake, b"\0")

    def woken(self):
        # Not in the midst of the events of a round: the sweep may close a connection that is still among them.
        os.read(self._woken, 64)
        self._selector.register(self._woken, selectors.EVENT_READ, self)
        self._stop_requested = True

    def close(self):
        """Close the connections that are registered, and the pipe."""
        self._selector.unregister(self._woken)
        os.close(self._woken)
        os.close(self._wake)
        super().close()

    def put(self, conn):
        """Have a connection answered that has a whole request, or wait for what it waits for."""
        if conn.requests and not conn.out:
            self.server.requests.put(conn)
        else:
            self._selector.register(conn.sock, conn.events, conn)

    def turn_away(self, peer):
        self._turned_away[:2] = self._turned_away[0] + 1, peer

    def close_oldest(self, count: int, source="") -> int:
        """Close up to `count` connections, of `source` if given, that wait for their client. Return how many it were.

        Each is one of whoever has most of them then, so that a crowd crowds out itself: first those that are idle, then
        those that send a request or take an answer slowly, and of both the oldest.
        """
        crowds, now = collections.defaultdict(list), time.monotonic()

        def whose(conn):
            return conn.counted[0 if source else -1] if conn.counted else conn.address

        for number, (_, conn) in enumerate(list(self._selector.connections)):
            if conn is not self.server and conn is not self and (not source or source in conn.counted):
                crowds[whose(conn)].append((not conn.is_idle(now), conn.waiting_since(), number, conn))
        sizes = collections.Counter(map(whose, list(self.server.open)))  # also those that threads are answering
        chosen = heapq.nsmallest(count, (
            (index - sizes[name], *entry) for name, crowd in crowds.items() for index, entry in enumerate(sorted(crowd))
        ))
        for *_, conn in chosen:
            self._selector.unregister(conn.sock)
            conn.close()
        for are_slow in (False, True) if not source else ():
            closed = [conn.address for _, is_slow, _, _, conn in chosen if is_slow is are_slow]
            if closed:
                self.server.log(
                    "refused", server=self.server.name, peer=closed[-1], status=0, count=len(closed),
                    reason=f"{'slow' if are_slow else 'idle'} connections gave way to new ones",
                )
        return len(chosen)

    def _from_server_socket(self, server_socket, most=64):
        """Accept what has come. Nothing is handed to cheroot: each waits for its first octets in the selector."""
        for _ in range(most if self._listening else 0):  # cheroot may hand over an event from before
            try:
                sock, address = server_socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # Nothing left to accept with: the listener is left alone until the next sweep, and does not spin.
                    self._selector.unregister(server_socket)
                    self._listening = False
                    self.turn_away("")
                    return
                continue  # that connection's own trouble
            self.server.register_connection(sock, address)

    def _expire(self, threshold):
        """End what is past its deadline. A connection that a thread is answering is not registered, and has none."""
        server, now, limits = self.server, time.monotonic(), self.server.limits
        lost, self.swept = now - self.swept - 4 * SWEEP, now
        waiting = [conn for _, conn in list(self._selector.connections) if conn is not server and conn is not self]
        if lost > 0:  # we were stopped, or the machine slept: nobody could be heard meanwhile
            for conn in waiting:
                conn.deadline += lost
                if conn.environ is not None:
                    conn.began += lost
        shorter = 0.8 * limits.idle_seconds if len(server.open) > limits.connections // 2 else 0
        for conn in waiting:
            idle = conn.environ is None and not (conn.out or conn.handshaking or conn.lingering)
            late = now > conn.deadline - (shorter if idle else 0)
            if not late and not (idle and 0 < server.draining <= now):
                continue
            self._selector.unregister(conn.sock)
            if late and (conn.environ is None or conn.out or conn.lingering):
                conn.close()
                continue
            if late:
                conn.refusal = HttpRefusal(408, "time")
            server.process_conn(conn)
        self._update_listener()
        server.requests.sweep()
        count, peer, logged_at = self._turned_away
        if count and now - logged_at >= 1:
            self._turned_away = [0, "", now]
            server.log("refused", server=server.name, peer=peer, reason="too many connections", status=0, count=count)

    def _update_listener(self):
        listener = self.server.socket
        if listener is None:
            return
        if self.server.draining:
            self._from_server_socket(listener, 4096)  # who has connected is served: closing would reset them
            if self._listening:
                self._selector.unregister(listener)
            self.server.socket, self._listening = None, False
            listener.close()
        elif not self._listening:
            self._selector.register(listener, selectors.EVENT_READ, self.server)
            self._listening = True


class Server(cheroot.wsgi.Server):
    """One port. The socket may be made before a fork and handed in already bound and listening.

    cheroot's selector loop finds what is ready, and its pool of threads answers; ours is what lies between.
    """

    expiration_interval = SWEEP

    def __init__(self, name, sockets, app, *, limits=Limits(), tls=None, trusted_proxies=(), log=None,
                 threads=THREADS, max_threads=MAX_THREADS, slash=b"", users=frozenset()):
        is_unix = sockets[0].family == socket.AF_UNIX
        address = ("localhost", 0) if is_unix else sockets[0].getsockname()[:2]
        super().__init__(address, app, numthreads=threads, max=max_threads)
        self.name, self.socket, self.limits, self.tls = name, sockets[0], limits, tls
        self.is_unix, self.users = is_unix, users  # uids that a Unix socket serves
        self.trusted_proxies, self.slash = tuple(trusted_proxies), slash
        self.log = log or (lambda event, **fields: None)
        self.requests = ThreadPool(self, threads, max_threads)
        self.beat = lambda: None  # called at every sweep
        # Set by the process. Runs functions; returns for each None when what it has done is on the disk, or why not.
        self.run_together: Callable = lambda works: [work() for work in works]
        self.prepare_thread: Callable = lambda: None  # called by each thread of the pool before it takes requests
        self._names = {trusted: HeaderKeys(trusted) for trusted in (False, True)}
        self._date = (0, "")
        self._blocks = {}  # headers: their lines
        self.open = set()  # connections
        self._lock = threading.Lock()  # guards the count of connections
        self._peers: collections.Counter[str] = collections.Counter()  # address: number of connections
        self.draining = 0.0

    # -- life --

    def start(self):
        """Start the threads and return. To be called after the last fork."""
        self.prepare()
        self._manager_thread = threading.Thread(target=self.serve, name=f"{self.name}-manager", daemon=True)
        self._manager_thread.start()

    def prepare(self):
        """Make what cheroot's prepare() makes, on the socket that was handed in."""
        ip, port = self.bind_addr
        self._base = {
            "SCRIPT_NAME": "", "SERVER_NAME": ip, "SERVER_PORT": str(port), "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "https" if self.tls else "http", "wsgi.errors": sys.stderr,
            "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False, "wsgi.input_terminated": True,
            "microauthd.server": self.name, "microauthd.server_object": self}
        self._request_id = (os.urandom(4).hex() + "%08x").__mod__
        self._number = itertools.count(1).__next__
        self.socket.setblocking(False)
        resume_listening(self.socket)  # it was paused if nobody could serve it
        self._connections = ConnectionManager(self)
        self.ready = True
        self._start_time = time.time()
        self.requests.start()
        self.requests.sweep()  # the first beat: what hangs from now on is replaced soon

    def stop(self, seconds: float = 4) -> bool:
        """Stop accepting, close idle connections, answer what has begun to arrive. True: all of it ended in time."""
        if not self.ready:
            return True
        end, manager = time.monotonic() + seconds, self._connections
        # A client may be about to use a kept connection: it has half a second for a last request.
        self.draining = time.monotonic() + min(0.5, seconds / 2)
        while (self.open or self.socket) and time.monotonic() < end:
            manager.wake()
            sleep(0.02)
        ended = not self.open
        self.ready = False
        manager.wake()
        self._manager_thread.join(max(0.1, end - time.monotonic()))
        ended = self.requests.stop(end - time.monotonic()) and ended and not self._manager_thread.is_alive()
        if not self._manager_thread.is_alive():
            manager.close()
        return ended

    def error_log(self, msg="", level=20, traceback=False):
        """Log what cheroot reports."""
        error = sys.exception()
        if not isinstance(error, MemoryError):
            self.log("error", server=self.name, **({"exc_info": sys.exc_info()} if error else {"reason": msg}))

    def _serve_unservicable(self):
        """Do nothing: the queue has no limit, so no connection is refused because it is full."""

    def blocking(self):
        """See ThreadPool.blocking()."""
        return self.requests.blocking()

    # -- connections --

    def _identify(self, sock, address) -> tuple[str, bool, tuple[str, ...], dict]:
        """Return who has connected: its name, whether it is a trusted proxy, what it counts for, its environ keys."""
        if self.is_unix:
            uid = peer_user(sock)
            return f"unix:uid={uid}", False, (), {"microauthd.uid": uid}
        ip = _address(address[0])
        trusted = bool(self.trusted_proxies) and _in_networks(ip, self.trusted_proxies)
        counted = () if ip.is_loopback or trusted else networks_of(ip)
        return str(ip), trusted, counted, {"REMOTE_PORT": str(address[1])}

    def register_connection(self, sock, address):
        """Take a connection that was accepted, or turn it away."""
        connection = None
        try:
            limits = self.limits
            peer, trusted, counted, named = self._identify(sock, address)
            if not self._has_room(counted):
                self._connections.turn_away(peer)
                sock.close()
                return
            sock.setblocking(False)
            if not self.is_unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
                )
            base = {**self._base, "REMOTE_ADDR": peer, "microauthd.peer": peer, "microauthd.socket": peer, **named}
            connection = Connection(self, sock, peer, base, self._names[trusted], trusted, counted)
            if self.is_unix and named["microauthd.uid"] not in self.users:
                # Nothing was worked on, so the client may go elsewhere. RFC 9110 §15.5.20
                connection.refusal = HttpRefusal(421, "a user that is not served on this socket")
                connection.events = selectors.EVENT_WRITE
            connection.deadline = time.monotonic() + (limits.handshake_seconds if self.tls else limits.idle_seconds)
            self.open.add(connection)
            with self._lock:
                self._peers.update(counted)
            self._connections.put(connection)
        except Exception as error:  # the peer has gone, or there is no memory
            if connection is not None:
                connection.close()
            sock.close()
            if not isinstance(error, (OSError, MemoryError)):
                self.log("error", server=self.name, exc_info=sys.exc_info())

    def _has_room(self, counted: tuple[str, ...]) -> bool:
        """Return whether another connection may be taken; the oldest idle ones give way to it."""
        limits = self.limits
        # Some at once, because looking for them takes a while, and whoever opens so many opens more.
        for key, peers in zip(counted, (1, limits.peers_per_site), strict=False):
            most = peers * limits.connections_per_peer
            if self._peers[key] >= most and not self._connections.close_oldest(1 + most // 64, key):
                return False
        if len(self.open) < limits.connections:
            return True
        return self._connections.close_oldest(1 + limits.connections // 64) > 0

    def forget(self, connection):
        """Remove a connection from the counts."""
        if connection not in self.open:
            return
        self.open.discard(connection)
        with self._lock:
            for counted in connection.counted:
                self._peers[counted] -= 1
                if self._peers[counted] <= 0:
                    del self._peers[counted]

    def process_conn(self, conn):
        """Take a connection that is ready as far as it goes, and keep it or close it. Called by cheroot's loop."""
        if conn is self._connections:
            conn.woken()
        elif not conn.advance():
            conn.close()
        elif conn.requests and not conn.out:
            self._connections.gathered.append(conn)
        else:
            self.put_conn(conn)

    def put_conn(self, conn):
        """Give a connection back to the selector, or to the pool. Called by cheroot's threads."""
        try:
            if conn.steps is not None:
                return self.requests.postpone(conn)  # from here on another thread may have it
            super().put_conn(conn)
        except Exception as error:
            conn.close()
            if not isinstance(error, (OSError, MemoryError)):
                self.log("error", server=self.name, exc_info=sys.exc_info())

    # -- answers --

    def _now(self):
        """Return the value of Date. RFC 9110 §6.6.1"""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]

    def answer(self, environ, keep):
        """Call the application. Return the whole response as octets, and whether it is the connection's last.

        This is a generator, which yields when the application gives an empty part before its status: it would rather
        go on beside others that do the like, as PEP 3333 lets it. See finish_together().
        """
        started: list[Any] = []
        parts: list[bytes] = []

        def start_response(status, headers, exc_info=None):
            started[:] = status, headers
            return parts.append

        environ["microauthd.request_id"] = self._request_id(self._number())
        try:
            result = self.wsgi_app(environ, start_response)
            try:
                rest = iter(result)
                part = next(rest, None)
                while part is not None:
                    if not part and not started:
                        try:
                            yield
                        except Exception as error:
                            part = rest.throw(error)
                            continue
                    parts.append(part)
                    part = next(rest, None)
            finally:
                if hasattr(result, "close"):
                    result.close()
            keep = keep and not self.draining  # asked after the call, which may have taken its time
            status, headers = started
            return self._write(environ, keep, status, headers, b"".join(parts)), not keep
        except GeneratorExit:
            raise
        except BaseException:  # a thread must survive whatever an application raises
            self.log("error", server=self.name, request_id=environ["microauthd.request_id"], exc_info=sys.exc_info())
            _, code, message = HTTP_REFUSALS[500]
            named = message.encode(), code.encode(), environ["microauthd.request_id"].encode()
            body = b'{"success":false,"message":"%b","error":"%b","request_id":"%b"}' % named
            headers = [*security_headers(scheme=environ["wsgi.url_scheme"]), *REFUSAL_HEADERS]
            return self._write(environ, keep, "500 Internal Server Error", headers, body), not keep

    def finish_together(self, postponed):
        """Let the answers of postponed connections go on, and send all when what they have done is on the disk."""
        taken: list[Connection] = []

        def steps():
            while postponed and len(taken) < TOGETHER_MAX:
                taken.append(postponed[0])  # first, because there may be no memory for it
                postponed.popleft()
                yield taken[-1].go_on

        try:
            outcomes = self.run_together(steps())
        except BaseException as error:  # whatever it is, each is told
            outcomes = itertools.repeat(error, len(taken))  # no list: there may be no memory for one
        for conn, outcome in zip(taken, outcomes, strict=True):
            if conn.finish(outcome):
                self.put_conn(conn)
            else:
                conn.close()

    def _write(self, environ, keep, status, headers, body):
        head_only = environ["REQUEST_METHOD"] == "HEAD"
        length = len(body)
        kept = [(name, value) for name, value in headers if name != "Content-Length"]
        if head_only:
            length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        fields = self._blocks.get((status, *kept)) or self._block(status, tuple(kept))
        if not keep:
            fields += "Connection: close\r\n"
        elif environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            fields += "Connection: keep-alive\r\n"
        code = status[:3]
        if code == "204" or code == "304":  # RFC 9110 §8.6
            body = b""
        else:
            fields += f"Content-Length: {length}\r\n"
            if head_only:
                body = b""
        # Not a field of the application: the blocks of those are remembered because they repeat, and this one does not.
        fields += f"X-Request-Id: {environ['microauthd.request_id']}\r\n"
        return f"{fields}Date: {self._now()}\r\n\r\n".encode("latin-1") + body

    def _block(self, status, headers):
        """Return the status line and the fields of an answer, checked; remembered, because they repeat."""
        if status[:3] < "200":
            raise ValueError("an application cannot give an interim response")
        lines = [f"{name}: {value}\r\n" for name, value in headers if name.lower() not in SERVER_FIELDS]
        fields = "".join(lines)
        # A field is one line, or it is two fields. RFC 9110 §5.5
        if not (fields.count("\r") == fields.count("\n") == len(lines)) or "\0" in fields or not status.isprintable():
            raise ValueError("a response header has a line break in it")
        if len(self._blocks) >= 256:  # some are made up of what the request says
            self._blocks = {}
        block = self._blocks[(status, *headers)] = f"HTTP/1.1 {status}\r\n{fields}"
        return block

    def refuse(self, connection):
        """Log a refusal. Return its response, empty for a peer that does not speak HTTP."""
        status, reason = connection.refusal.status, connection.refusal.reason
        environ = connection.environ
        peer = connection.address if environ is None else environ["microauthd.peer"]
        self.log("refused", server=self.name, peer=peer, reason=reason, status=status)
        if status not in HTTP_REFUSALS:
            return b""
        phrase, code, message = HTTP_REFUSALS[status]
        body = f'{{"success":false,"message":"{message}","error":"{code}"}}'
        scheme = ("https" if self.tls else "http") if environ is None else environ["wsgi.url_scheme"]
        fields = "".join(f"{name}: {value}\r\n" for name, value in (*security_headers(scheme=scheme), *REFUSAL_HEADERS))
        return (f"HTTP/1.1 {status} {phrase}\r\nDate: {self._now()}\r\n{fields}"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()
