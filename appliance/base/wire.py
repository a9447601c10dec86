"""The two servers: whole requests, limits, deadlines, TLS."""

import collections
import contextlib
import email.utils
import errno
import io
import ipaddress
import itertools
import os
import re
import select
import socket
import ssl
import sys
import threading
import time

import cheroot.wsgi
import httptools
import msgspec
from cryptography.hazmat.primitives import serialization

from appliance.base.clock import sleep

# == Connections ===============================================================
# Accept, TLS, framing, limits, deadlines, the WSGI call, the answer. Knows nothing of tokens.
# cheroot gives the server its shape; llhttp parses; the rules llhttp leaves open stand in Connection.

RECV_SIZE = 16384  # octets read at once: a whole TLS record; it also bounds what one wake can pipeline
LINGER = 2       # seconds a closed connection still reads, so that the client gets the last answer. RFC 9112 §9.6
SWEEP = 0.5      # seconds between two looks at the deadlines
BACKLOG = 1024   # connections that wait to be accepted
LEADER_MAX_SECONDS = 0.002  # seconds a thread may stay with one request before another polls in its place
# The methods we know: where one is not offered, 405 with Allow; CONNECT and the unknown are 501. RFC 9110 §9.1
METHODS = {
    name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
}
# Fields whose repetition changes who is asking or what is asked. RFC 9110 §5.3 allows joining only lists.
NO_REPEAT = frozenset((
    "HTTP_HOST", "HTTP_AUTHORIZATION", "HTTP_ORIGIN", "HTTP_FORWARDED", "HTTP_X_FORWARDED_PROTO",
    "HTTP_X_FORWARDED_HOST", "HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "CONTENT_TYPE", "CONTENT_LENGTH"))
HOST = re.compile(r"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")  # RFC 3986 §3.2.2, no encoding
PATH = re.compile(rb"(?:/(?!\.\.?(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]*)+")  # RFC 3986 §3.3, no dot segments
ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)", re.DOTALL)
PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")
# What the server says itself, and the fields of one connection (RFC 9110 §7.6.1): an application cannot set them.
SERVER_FIELDS = frozenset(
    ("content-length", "date", "server", "connection", "keep-alive", "transfer-encoding", "upgrade", "trailer", "te")
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REFUSALS = {  # status: (reason phrase, code, what the client is told)
    400: ("Bad Request", "invalid_request", "The request is not valid HTTP."),
    408: ("Request Timeout", "request_timeout", "The request did not arrive in time."),
    413: ("Content Too Large", "content_too_large", "The request content is too large."),
    414: ("URI Too Long", "uri_too_long", "The request target is too long."),
    417: ("Expectation Failed", "expectation_failed", "The expectation cannot be met."),
    431: ("Request Header Fields Too Large", "headers_too_large", "The request header is too large."),
    500: ("Internal Server Error", "server_error", "The server failed."),
    501: ("Not Implemented", "not_implemented", "The method or transfer coding is not implemented."),
    505: ("HTTP Version Not Supported", "version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are spoken here."),
}


class Limits(msgspec.Struct, frozen=True):
    """What one port grants its clients: sizes in octets, times in seconds."""

    header_bytes: int = 16384  # request line and header fields; 431. RFC 6585 §5
    request_line_bytes: int = 8192  # 414. RFC 9112 §3
    headers: int = 64  # fields, and trailer fields; 431
    body_bytes: int = 65536  # content; 413, before any of it is read when Content-Length tells. RFC 9110 §15.5.14
    request_seconds: float = 15  # a whole request from its first byte; 408. RFC 9110 §15.5.9
    handshake_seconds: float = 10
    idle_seconds: float = 75         # a fifth of it when more than half of all connections are taken
    send_seconds: float = 15         # a whole answer
    connections: int = 4096
    connections_per_peer: int = 1024  # not counted for loopback and trusted proxies, which speak for many


class HttpRefusal(Exception):
    """A request is not served: `status` for the client, `reason` for the log. Its connection ends with it."""
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


def tls_context(cert_file: str, key_file: str | None = None, password: str | None = None) -> ssl.SSLContext:
    """Return a server context for TLS 1.2 and later.

    `cert_file` is PEM (the chain, perhaps with its key) or PKCS#12, told apart by content.
    Raises ValueError with a sentence for the operator. RFC 9325 §3.1, §4.2.
    """
    for name in filter(None, (cert_file, key_file)):
        try:
            with open(name, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"The TLS file {name} cannot be read: {error.strerror}.") from None
        if name == cert_file:
            certificate = content
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2: forward secrecy and AEAD only
    context.set_alpn_protocols(["http/1.1"])
    secret = password or ""  # never None: OpenSSL would ask the terminal
    try:
        if b"-----BEGIN " in certificate:
            context.load_cert_chain(cert_file, key_file, lambda: secret)
        else:
            _load_pkcs12(context, certificate, secret)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"The TLS key does not belong to the certificate {cert_file}.") from None
        if (
            error.reason == "NO_START_LINE"
            or (error.reason is None
            and not key_file
            and b"PRIVATE KEY-----" not in certificate)
        ):
            raise ValueError(
                f"The TLS file {key_file or cert_file} has no private key or no certificate in it."
            ) from None
        raise ValueError(
            f"The TLS key of {cert_file} cannot be opened: the passphrase is wrong or missing, or the file is damaged."
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The TLS file {cert_file} cannot be used: it is neither PEM nor PKCS#12, or its passphrase is wrong."
        ) from error
    return context


def _load_pkcs12(context, content, password):
    from cryptography.hazmat.primitives.serialization import (
        pkcs12,
    )  # seldom needed, and it has its share of the start-up

    key, certificate, chain = pkcs12.load_key_and_certificates(content, password.encode() or None)
    if key is None or certificate is None:
        raise ValueError("no key or no certificate")
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem += b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (certificate, *chain))
    # Memory, never the disk: the ssl module loads from files only.
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _address(text):
    """Return `text` as an IP address, IPv4 when it is one in IPv6 clothes."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _among(address, networks):
    return any(address in network for network in networks)


def client_address(remote_addr: str, forwarded_for: str | None, trusted_proxies: tuple) -> str:
    """Return the address a request comes from: through trusted proxies the right-most untrusted hop.

    `forwarded_for` is X-Forwarded-For, hops joined by commas. What is malformed proves nothing: the last trusted hop.
    """
    peer = _address(remote_addr)
    for hop in reversed(forwarded_for.split(",")) if forwarded_for else ():
        if not _among(peer, trusted_proxies):
            break
        try:
            peer = _address(hop.strip())
        except ValueError:
            break
    return str(peer)


def _path_info(path):
    """Return an encoded path as PATH_INFO: its octets as latin-1 (PEP 3333). Raises Refused."""
    if not PATH.fullmatch(path):
        # Encoded or not, what two parsers could read as two paths is no path: / \ NUL, controls, dot segments.
        whole = PERCENT.sub(lambda match: bytes((int(match[1], 16),)), path)
        if (not path.startswith(b"/") or PERCENT.sub(b"", path).count(b"%") or whole.count(b"/") != path.count(b"/")
                or b"\\" in whole or any(octet < 32 or octet == 127 for octet in whole)
                or any(part in (b".", b"..") for part in whole.split(b"/"))
                or not PATH.fullmatch(PERCENT.sub(b"x", path))):
            raise HttpRefusal(400, "path")
        try:
            whole.decode("utf-8")  # Bottle drops what is not: /users/%ffann would be ann
        except UnicodeDecodeError:
            raise HttpRefusal(400, "path") from None
        path = whole
    return path.decode("latin-1")


class Names(dict):
    """Header field names as they came → environ keys, "" for those that are dropped."""
    FORWARDED = frozenset((b"forwarded", b"x-forwarded-proto", b"x-forwarded-host"))

    def __init__(self, trusted):
        self.trusted = trusted

    def __missing__(self, name):
        key = name.decode("ascii").upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = "HTTP_" + key
        # X_Forwarded_For is not X-Forwarded-For; Proxy would become the HTTP_PROXY of CGI (httpoxy).
        if b"_" in name or key == "HTTP_PROXY" or (not self.trusted and (
                key in ("HTTP_FORWARDED", "HTTP_X_REAL_IP") or key.startswith("HTTP_X_FORWARDED"))):
            key = ""
        if len(name) <= 64:
            if len(self) >= 512:  # somebody is making names up
                self.clear()
            self[name] = key
        return key


class Connection:
    """One connection and what its octets have become; the callbacks are llhttp's.

    Its lock is held by whoever handles it: a polling thread, or the sweep. No field is touched without.
    """
    __slots__ = (
        "server", "limits", "lock", "sock", "fd", "address", "base", "names", "trusted", "counted", "parser",
        "handshaking", "lingering", "fresh",
        "deadline",  # where it stands
        "head", "tail", "wire", "environ", "target", "body", "length", "left", "size", "count",
        "dropped",  # the request that is arriving
        "headed", "chunked", "expecting", "began", "requests", "ended", "refusal", "out", "last",
    )  # what is still to be done, in this order

    def __init__(self, server, sock, address, base, names, trusted, counted):
        self.server, self.limits, self.lock = server, server.limits, threading.Lock()
        self.sock, self.fd, self.address = sock, sock.fileno(), address
        self.base, self.names, self.trusted, self.counted = base, names, trusted, counted
        self.parser = httptools.HttpRequestParser(self)
        self.lingering = self.headed = self.last = self.chunked = self.expecting = self.ended = False
        self.fresh = True
        self.handshaking = server.tls is not None
        self.requests, self.refusal, self.out = collections.deque(), None, b""
        self.environ, self.target, self.wire = None, b"", 0  # wire: octets of the part being read
        self.head, self.tail = b"", b""  # the header so far; its last octets, which may begin its end

    # -- llhttp's callbacks --

    def on_message_begin(self):
        self.environ = self.base.copy()
        self.target, self.body, self.dropped = b"", [], ()
        self.size = self.count = self.length = self.left = self.wire = 0
        self.chunked = self.expecting = self.fresh = False
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
            if key.startswith(("HTTP_X_FORWARDED", "HTTP_FORWARDED")):
                self.environ["microauthd.proxied"] = True
        elif b"forwarded" in name.lower():
            # Not believed, but a sign that the peer is a proxy: then it is not the person at the machine.
            self.environ["microauthd.proxied"] = True
            if name.lower() not in Names.FORWARDED:
                return
            if name.lower() in self.dropped:
                raise HttpRefusal(400, "repeated header field")
            self.dropped += (name.lower(),)

    def on_headers_complete(self):  # noqa: C901 - every refusal of the framing, in the order in which it is checked
        environ, target, parser, limits = self.environ, self.target, self.parser, self.limits
        self.headed, self.count, self.wire = True, 0, 0
        token, version = parser.get_method(), parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise HttpRefusal(505, "version")
        # llhttp takes RTSP/1.0 and ICE/1.0 for HTTP, and more than one space for one.
        if not self.head.startswith(b"%b %b HTTP/%b\r\n" % (token, target, version.encode())):
            raise HttpRefusal(400, "request line")
        self.head = b""
        method = METHODS.get(token)
        if method is None:
            raise HttpRefusal(501, "method")
        if self.size + len(target) > limits.header_bytes:
            raise HttpRefusal(431, "header size")

        # RFC 9112 §3.2: exactly one Host, and the target's authority is the same.
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
        environ["REQUEST_METHOD"] = method
        environ["PATH_INFO"] = _path_info(path)
        environ["QUERY_STRING"] = query.decode("latin-1")
        if version == "1.0":
            environ["SERVER_PROTOCOL"] = "HTTP/1.0"

        # RFC 9112 §6.1: one framing, of which there is no doubt. The application sees decoded content.
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
            if len(length) > 18 or int(length) > limits.body_bytes:
                raise HttpRefusal(413, "content size")
            self.left = int(length)
        content = self.chunked or self.left > 0
        # Upgrade may be ignored (RFC 9110 §7.8), but llhttp stops at one and would not read its content.
        if content and parser.should_upgrade():
            raise HttpRefusal(400, "Upgrade with content")
        expect = environ.pop("HTTP_EXPECT", None)
        if expect is not None and version == "1.1":
            if expect.lower() != "100-continue":
                raise HttpRefusal(417, "Expect")
            self.expecting = content
        if self.trusted:
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
        environ, body = self.environ, b"".join(self.body)
        environ["wsgi.input"] = io.BytesIO(body)
        if self.chunked:
            environ["CONTENT_LENGTH"] = str(len(body))
        # A trailer can still say `Connection: close`, so keep-alive is asked now.
        self.ended = self.parser.should_upgrade() or not self.parser.should_keep_alive()
        self.requests.append((environ, not self.ended))
        self.environ, self.body, self.head, self.expecting, self.wire = None, (), b"", False, 0

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
                    start, self.wire = start + 1, self.wire + 1
                    if self.wire > 4:
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
                self.wire += len(piece)
            else:
                self.head += piece
            self._parse(piece)
            if self.refusal is None and self.environ is not None:
                self._weigh()
            if self.refusal is not None:
                return
            start = end
        self.tail = data[max(since, len(data) - 3):]

    def _weigh(self):
        """Bound what has come of a request that is not whole yet, and reaches no callback."""
        if not self.headed:
            if len(self.head) > self.limits.header_bytes:
                self.refusal = HttpRefusal(431, "header size")
            elif self.parser.get_http_version() == "0.9":
                self.refusal = HttpRefusal(505, "version")
        # Sizes, extensions and trailers of chunks.
        elif self.chunked and self.wire > 4 * self.limits.body_bytes + RECV_SIZE:
            self.refusal = HttpRefusal(413, "chunks")

    def _parse(self, piece):
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            pass  # the request is whole, and the last one: what follows it is not HTTP
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

    def send(self):
        """Send what can be sent without waiting; true when all is. Raises SSLWantReadError and OSError."""
        try:
            sent = self.sock.send(self.out)
        except (BlockingIOError, ssl.SSLWantWriteError):
            return False
        self.out = memoryview(self.out)[sent:] if sent < len(self.out) else b""
        return not self.out


class Server(cheroot.wsgi.Server):
    """One port. The sockets may be made before a fork and handed in already bound and listening.

    Its threads share one epoll, and take turns: one, the leader, polls and handles; the second watches, and takes the
    lead when the leader stays with one request longer than PATIENCE or says that it waits (`blocking()`). The others
    stand behind the second. Threads that all poll at once are slower by half: they pass the GIL around at every system
    call.
    """

    def __init__(self, name, sockets, app, *, limits=Limits(), tls=None, trusted_proxies=(), log=None,
                 threads=4, max_threads=68):
        super().__init__(sockets[0].getsockname()[:2], app, numthreads=threads, max=max_threads)
        self.name, self.sockets, self.limits, self.tls = name, tuple(sockets), limits, tls
        self.trusted_proxies, self.threads, self.max_threads = tuple(trusted_proxies), threads, max_threads
        self.log = log or (lambda event, **fields: None)
        self.beat = lambda: None  # called at every sweep
        self._names = {trusted: Names(trusted) for trusted in (False, True)}
        self._date = (0, "")
        self._blocks = {}                   # headers: their lines
        self._lock = threading.Lock()       # guards the counts of threads, the lead and the peers
        self._second = threading.Lock()     # held by the thread that watches the leader
        self._accepting = threading.RLock()  # a listener is not closed while somebody accepts from it
        self._running = self._turn = 0
        self._waiting = set()               # threads
        self._call = threading.Event()      # wakes the sweep before its time: threads are wanted, or the end has come
        self._leader = None
        self._pool = set()
        self._open, self._peers = {}, collections.Counter()  # fd: Connection; address: number of connections
        self._listeners = {}
        self._crowd = [0, ""]  # connections turned away since the last line about it, the last of their peers
        self._ended = self._draining = False

    # -- life --

    def start(self):
        """Start the threads and return. To be called after the last fork."""
        if not hasattr(select, "epoll"):
            return self._start_cheroot()
        ip, port = self.sockets[0].getsockname()[:2]
        self._base = {
            "SCRIPT_NAME": "", "SERVER_NAME": ip, "SERVER_PORT": str(port), "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "https" if self.tls else "http", "wsgi.errors": sys.stderr,
            "wsgi.multithread": True, "wsgi.multiprocess": True, "wsgi.run_once": False, "wsgi.input_terminated": True,
            "microauthd.server": self.name, "microauthd.server_object": self}
        self._request_id = (os.urandom(4).hex() + "%08x").__mod__
        self._number = itertools.count(1).__next__
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        for sock in self.sockets:
            sock.setblocking(False)
            sock.listen(BACKLOG)  # again, where it did not while nobody served it
            self._listeners[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLIN | select.EPOLLONESHOT)
        self.ready = True
        self._start_time = time.time()
        self._swept = time.monotonic()
        self._hire()
        self._sweeper = threading.Thread(target=self._sweep_on, name=f"{self.name}-sweep", daemon=True)
        self._sweeper.start()

    def stop(self, seconds: float = 4) -> bool:
        """Stop accepting, close idle connections, finish what has begun to arrive; true when all of it ended in time.
        """
        if not self.ready:
            return True
        if not hasattr(select, "epoll"):
            self.shutdown_timeout = seconds
            super().stop()
            return True
        end = time.monotonic() + seconds
        with self._accepting:
            for fd, sock in list(self._listeners.items()):
                self._accept(fd, 4096)  # who has connected already is served: closing would reset them
                with contextlib.suppress(OSError):
                    self._epoll.unregister(sock)
                sock.close()
            self._listeners.clear()
        # A client that keeps its connection may be about to use it: it gets a moment, and a last answer.
        self._draining = time.monotonic() + min(0.5, seconds / 2)
        while self._open and time.monotonic() < end:
            self._sweep()
            sleep(0.02)
        self.ready = False
        ended = not self._open
        for connection in list(self._open.values()):
            if connection.lock.acquire(blocking=False):
                self._close(connection)
                connection.lock.release()
        self._ended = True
        self._call.set()
        os.eventfd_write(self._wake, 1)
        for thread in [self._sweeper, *self._pool]:
            with contextlib.suppress(RuntimeError):  # one that never began
                thread.join(max(0.1, end - time.monotonic()))
            ended = ended and not thread.is_alive()
        if not any(thread.is_alive() for thread in self._pool):
            self._epoll.close()
            os.close(self._wake)
        return ended

    def _start_cheroot(self):
        """Development only, where there is no epoll: cheroot's own loop, with none of the promises above."""
        if self.tls:
            import cheroot.ssl.builtin

            self.ssl_adapter = cheroot.ssl.builtin.BuiltinSSLAdapter.__new__(cheroot.ssl.builtin.BuiltinSSLAdapter)
            self.ssl_adapter.context, self.ssl_adapter._server_env = self.tls, {}
        self.prepare()
        threading.Thread(target=self.serve, name=self.name, daemon=True).start()

    def bind(self, family, type, proto=0):
        """Take the socket that was handed in. Called by cheroot's prepare()."""
        self.socket = self.sockets[0]
        return self.socket

    # -- threads --

    def _hire(self):
        """Start threads while too few are left free.

        Holding nothing, and from the sweep: Thread.start() waits for ever for one that has no memory to begin. The
        sweep
        does not go on then, which the supervisor sees.
        """
        while True:
            with self._lock:
                if (
                    self._ended
                    or self._running - len(self._waiting) >= self.threads
                    or self._running >= self.max_threads
                ):
                    return
                thread = threading.Thread(target=self._work, name=f"{self.name}-{self._running}", daemon=True)
                self._running += 1
                self._pool.add(thread)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:  # the system has no more of them
                with self._lock:
                    self._running -= 1
                    self._pool.discard(thread)
                self.log("error", server=self.name, reason=error, threads=self._running)
                return

    @contextlib.contextmanager
    def blocking(self):
        """Entered by a handler that is about to wait: another thread polls, a new one if too few are left free.

        Gives whether there is one besides whoever it waits for. Means nothing to a thread that is not ours, or waits
        already.
        """
        me = threading.current_thread()
        if me not in self._pool or me in self._waiting:
            yield True
            return
        with self._lock:
            self._waiting.add(me)
            others = self._running - len(self._waiting)
            short = others < self.threads and self._running < self.max_threads
            if self._leader is me:
                self._leader = None  # the second finds the lead free at the next event
        if short:
            self._call.set()
        try:
            yield others + short > 1  # the one that holds the turn to write is not among those that say that they wait
        finally:
            with self._lock:
                self._waiting.discard(me)

    def _work(self):
        me = threading.current_thread()
        try:
            while not self._ended:
                try:
                    self._stand_by(me)
                    self._lead(me)
                except (
                    Exception
                ) as error:  # one that ended for it, of memory most likely, would be missing when there is some again
                    if not isinstance(error, MemoryError):
                        self.log("error", server=self.name, exc_info=sys.exc_info())
                    sleep(LEADER_MAX_SECONDS)
                with self._lock:
                    if self._leader is me:
                        self._leader = None
                    if self._running - len(self._waiting) > self.threads:
                        break  # hired while others waited, and they are back
        finally:
            with self._lock:
                self._running -= 1
                self._pool.discard(me)
                if self._leader is me:
                    self._leader = None

    def _stand_by(self, me):
        """Return when it is this thread's turn to lead."""
        with self._second:
            events = select.poll()
            events.register(self._epoll.fileno(), select.POLLIN)
            while not self._ended:
                if self._leader is not None:
                    # Nobody takes the events of a leader that is busy; an idle server wakes nobody.
                    events.poll()
                    turn = self._turn
                    sleep(LEADER_MAX_SECONDS)
                    if self._leader is not None and self._turn != turn:
                        continue
                with self._lock:
                    self._leader = me
                return

    def _lead(self, me):
        """Poll and handle until another thread has the lead."""
        poll, connections = self._epoll.poll, self._open
        while self._leader is me:
            for fd, _ in poll(-1, 1):
                self._turn += 1
                connection = connections.get(fd)
                if connection is not None:
                    with connection.lock:
                        if connection.fd == fd:  # not closed while we waited for the lock
                            self._move(connection)
                elif fd == self._wake:
                    return
                else:
                    self._accept(fd)
                self._turn += 1

    # -- connections: accept, arm, close --

    def _accept(self, fd, most=64):
        with self._accepting:
            listener = self._listeners.get(fd)
            if listener is None:
                return
            for _ in range(most):
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        # Nothing left to accept with. The listener stays disarmed until the next sweep, and does not
                        # spin.
                        self._crowd = [self._crowd[0] + 1, ""]
                        return
                    continue  # that connection's own trouble
                self._admit(sock, address)
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def _admit(self, sock, address):
        ip = _address(address[0])
        peer = str(ip)
        trusted = bool(self.trusted_proxies) and _among(ip, self.trusted_proxies)
        counted = not (ip.is_loopback or trusted)
        if len(self._open) >= self.limits.connections or (
                counted and self._peers[peer] >= self.limits.connections_per_peer):
            self._crowd = [self._crowd[0] + 1, peer]
            sock.close()
            return
        connection = None
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True
                )
            base = {**self._base, "REMOTE_ADDR": peer, "REMOTE_PORT": str(address[1]), "microauthd.peer": peer}
            connection = Connection(self, sock, peer, base, self._names[trusted], trusted, counted)
            limits = self.limits
            connection.deadline = time.monotonic() + (limits.handshake_seconds if self.tls else limits.idle_seconds)
            with self._lock:
                self._peers[peer] += counted
            self._open[connection.fd] = connection
            self._epoll.register(connection.fd, select.EPOLLIN | select.EPOLLONESHOT)
        except Exception as error:  # gone before it was here, or there is nothing to make one of
            if connection is not None:
                self._close(connection)
            sock.close()
            if not isinstance(error, (OSError, MemoryError)):
                self.log("error", server=self.name, exc_info=sys.exc_info())

    def _close(self, connection):
        # Its lock is held. Out of the table before the descriptor is free for the next connection.
        fd, connection.fd = connection.fd, -1
        if self._open.pop(fd, None) is not None and connection.counted:
            with self._lock:
                self._peers[connection.address] -= 1
                if self._peers[connection.address] <= 0:
                    del self._peers[connection.address]
        connection.parser = None  # it refers back to the connection
        with contextlib.suppress(OSError):
            connection.sock.close()

    def _move(self, connection):
        """Handle a connection and arm it for what it waits for, or close it. Its lock is held."""
        try:
            events = self._handle(connection)
            if events:
                # Armed before the lock is free: whoever wakes by this waits for the lock, and no event is lost.
                self._epoll.modify(connection.fd, events | select.EPOLLONESHOT)
                return
        except OSError:
            pass  # the peer is gone, or its TLS is broken
        except Exception:
            self.log("error", server=self.name, exc_info=sys.exc_info())
        self._close(connection)

    # -- connections: what is to be done --

    def _handle(self, connection):  # noqa: C901 - what may fail at each step of a request
        """Take a connection as far as it goes without waiting. Return the events it waits for, 0 when it is done."""
        if connection.lingering:
            return self._linger(connection)
        try:
            if connection.handshaking:
                self._shake_hands(connection)
            if not (connection.out or connection.requests or connection.refusal is not None or connection.expecting):
                data = connection.sock.recv(RECV_SIZE)
                if not data:
                    return 0
                connection.feed(data)
        except (BlockingIOError, ssl.SSLWantReadError):
            return self._rest(connection)
        except ssl.SSLWantWriteError:
            return select.EPOLLOUT
        if not connection.out:
            if connection.requests:
                environ, keep = connection.requests.popleft()
                connection.out, connection.last = self._answer(environ, keep)
            elif connection.refusal is not None:
                connection.out = self._refuse(connection)
                connection.last = True
                if not connection.out:
                    return 0
            elif connection.expecting:
                connection.out, connection.expecting = CONTINUE, False
            else:
                return self._rest(connection)
            connection.deadline = time.monotonic() + self.limits.send_seconds
        try:
            if not connection.send():
                return select.EPOLLOUT
        except ssl.SSLWantReadError:
            return select.EPOLLIN
        if connection.last:
            return self._part(connection)
        if connection.requests or connection.refusal is not None or connection.expecting:
            return select.EPOLLOUT  # at once, but others come first
        return self._rest(connection)

    def _rest(self, connection):
        """Wait for the rest of a handshake or a request, or for the next request."""
        if connection.handshaking:
            return select.EPOLLIN
        if connection.environ is not None:
            connection.deadline = connection.began + self.limits.request_seconds
        elif not connection.fresh or self._draining:
            now = time.monotonic()
            if self._draining and now >= self._draining:
                return 0
            connection.deadline = now + self.limits.idle_seconds
        if self.tls and connection.sock.pending():
            return select.EPOLLOUT  # decrypted already: the socket will not tell
        return select.EPOLLIN

    def _shake_hands(self, connection):
        """Go on with the TLS handshake. Raises SSLWantReadError or SSLWantWriteError until it is done."""
        try:
            connection.sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            if error.reason == "HTTP_REQUEST":
                connection.handshaking = False
                self._bare(connection)
                connection.refusal = HttpRefusal(400, "plain HTTP on a TLS port")
                return
            if not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                self.log(
                    "refused", server=self.name, peer=connection.address, reason=f"TLS handshake: {error.reason}",
                    status=0,
                )
            raise
        connection.handshaking = False
        connection.deadline = time.monotonic() + self.limits.idle_seconds
        connection.base["HTTPS"] = "on"  # as cheroot's adapter names them
        connection.base["SSL_CIPHER"], connection.base["SSL_PROTOCOL"], _ = connection.sock.cipher()

    def _bare(self, connection):
        """Leave TLS: what is sent and read from here on is on the TCP connection."""
        connection.sock = socket.socket(fileno=connection.sock.detach())
        connection.sock.setblocking(False)

    def _part(self, connection):
        """Say goodbye and read on for a while: unread octets would make a reset of it, and eat the answer.

        RFC 9112 §9.6
        """
        connection.lingering, connection.wire = True, 0
        connection.deadline = time.monotonic() + LINGER
        if isinstance(connection.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                connection.sock.unwrap()  # sends close_notify, and does not wait for theirs
            self._bare(connection)
        connection.sock.shutdown(socket.SHUT_WR)
        return select.EPOLLIN

    def _linger(self, connection):
        try:
            data = connection.sock.recv(RECV_SIZE)
        except BlockingIOError:
            return select.EPOLLIN
        connection.wire += len(data)
        return select.EPOLLIN if data and connection.wire < 64 * RECV_SIZE else 0

    # -- answers --

    def _now(self):
        """Return the value of Date. RFC 9110 §6.6.1"""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, email.utils.formatdate(now, usegmt=True))
        return self._date[1]

    def _answer(self, environ, keep):
        """Call the application. Return the whole response as octets, and whether it is the connection's last."""
        started, parts = [], []

        def start_response(status, headers, exc_info=None):
            started[:] = status, headers
            return parts.append

        environ["microauthd.request_id"] = self._request_id(self._number())
        try:
            result = self.wsgi_app(environ, start_response)
            try:
                parts.extend(result)
            finally:
                if hasattr(result, "close"):
                    result.close()
            keep = keep and not self._draining  # asked after the call, which may have taken its time
            return self._write(environ, keep, *started, b"".join(parts)), not keep
        except BaseException:  # a thread of ours must survive whatever an application raises
            self.log("error", server=self.name, request_id=environ["microauthd.request_id"], exc_info=sys.exc_info())
            _, code, message = REFUSALS[500]
            body = b'{"success":false,"message":"%b","error":"%b"}' % (message.encode(), code.encode())
            headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
            return self._write(environ, keep, "500 Internal Server Error", headers, body), not keep

    def _write(self, environ, keep, status, headers, body):
        head_only = environ["REQUEST_METHOD"] == "HEAD"
        length = len(body)
        own = [(name, value) for name, value in headers if name != "Content-Length"]
        if head_only:
            length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        fields = self._blocks.get((status, *own)) or self._block(status, tuple(own))
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

    def _refuse(self, connection):
        """Log a refusal. Return its response, empty for a peer that does not speak HTTP."""
        status, reason = connection.refusal.status, connection.refusal.reason
        environ = connection.environ
        peer = connection.address if environ is None else environ["microauthd.peer"]
        self.log("refused", server=self.name, peer=peer, reason=reason, status=status)
        if status not in REFUSALS:
            return b""
        phrase, code, message = REFUSALS[status]
        body = f'{{"success":false,"message":"{message}","error":"{code}"}}'
        return (f"HTTP/1.1 {status} {phrase}\r\nDate: {self._now()}\r\nContent-Type: application/json\r\n"
                f"Cache-Control: no-store\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()

    # -- deadlines --

    def _sweep_on(self):
        said = 0
        while not self._ended:
            self.beat()
            self._call.wait(SWEEP)
            self._call.clear()
            try:
                self._hire()
                if time.monotonic() - self._swept < SWEEP / 2:
                    continue
                self._sweep()
                # All of them, every time: whatever kept one from being armed again, it is over or comes again.
                for fd in list(self._listeners):
                    self._accept(fd)
                if self._crowd[0] and time.monotonic() - said >= 1:
                    (count, peer), self._crowd, said = self._crowd, [0, ""], time.monotonic()
                    self.log(
                        "refused", server=self.name, peer=peer, reason="too many connections", status=0, count=count
                    )
            except Exception:
                self.log("error", server=self.name, exc_info=sys.exc_info())

    def _sweep(self):
        """End what is past its deadline. A connection somebody is handling is left alone: it is alive."""
        now = time.monotonic()
        lost, self._swept = now - self._swept - 4 * SWEEP, now
        if lost > 0:  # we were stopped, or the machine slept: nobody could be heard meanwhile
            for connection in list(self._open.values()):
                if connection.lock.acquire(blocking=False):
                    connection.deadline += lost
                    if connection.environ is not None:
                        connection.began += lost
                    connection.lock.release()
        crowded = len(self._open) > self.limits.connections // 2
        for connection in list(self._open.values()):
            idle = connection.environ is None and not (connection.out or connection.requests or connection.handshaking)
            late = now > connection.deadline - (
                0.8 * self.limits.idle_seconds if crowded and idle and not connection.lingering else 0
            )
            if not (late or (idle and 0 < self._draining <= now)) or not connection.lock.acquire(blocking=False):
                continue
            try:
                if connection.fd < 0:
                    continue
                if not late:
                    # It closes when it is read once more and nothing is there.
                    self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLONESHOT)
                elif connection.environ is None or connection.out or connection.requests or connection.lingering:
                    self._close(connection)
                else:
                    connection.refusal = HttpRefusal(408, "time")
                    self._move(connection)
            finally:
                connection.lock.release()
