"""Wait until both ports of a starting server serve, get a token with `mad token get`, verify it and print it.

usage: show_token.py FOLDER PID ARCHIVE

It verifies the token as any resource server can: with PyJWT, and the issuer's published metadata and keys.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jwt

START_TIMEOUT = 20  # seconds until both ports must serve


def get_json(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
        return json.load(answer)


def is_running(pid):
    try:
        # The server is a child of the calling shell, and is a zombie when it has exited.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main(folder, pid, archive):
    """Return a message if it fails, otherwise None."""
    microauthd = [sys.executable, "-I", archive]
    rows = json.loads(
        subprocess.run([*microauthd, "options", "--json"], cwd=folder, check=True, capture_output=True).stdout
    )
    options = {name: row["value"] for name, row in rows.items()}
    base_url = {}
    for server in ("auth", "admin"):
        scheme = "https" if options[f"{server}-ssl-cert-file"] else "http"
        base_url[server] = f"{scheme}://127.0.0.1:{options[f'{server}-port']}"
    started_at, is_announced = time.monotonic(), False
    for url in (base_url["auth"] + "/health/ready", base_url["admin"] + "/health"):
        while True:
            try:
                get_json(url)
                break
            except OSError as error:
                if not is_running(pid):
                    return "the server has ended"
                if time.monotonic() - started_at > START_TIMEOUT:
                    return f"the server does not answer: {error}"
            if time.monotonic() - started_at > 2 and not is_announced:
                is_announced = True
                print("waiting for the server ...", file=sys.stderr)
            time.sleep(0.03)
    print(f"both ports serve after {time.monotonic() - started_at:.2f} s", file=sys.stderr)
    credentials = Path(folder, "demo.env")
    if not credentials.exists():
        print("For a token: MAD_CLIENT_SECRET=... mad token get --client-id CLIENT", file=sys.stderr)
        return None
    environment = dict(line.split("=", 1) for line in credentials.read_text().splitlines())
    fetched = subprocess.run(
        [*microauthd, "mad", "token", "get", "--auth-url", base_url["auth"]], cwd=folder, env=os.environ | environment,
        stdout=subprocess.PIPE, text=True,
    )
    if fetched.returncode:
        return "mad token get failed"
    token = fetched.stdout.strip()
    metadata = get_json(base_url["auth"] + "/.well-known/oauth-authorization-server")
    keys = jwt.PyJWKSet.from_dict(get_json(base_url["auth"] + "/jwks.json"))
    header = jwt.get_unverified_header(token)
    unverified = jwt.decode(token, options={"verify_signature": False})
    claims = jwt.decode(
        token, keys[header["kid"]].key, algorithms=[header["alg"]], issuer=metadata["issuer"],
        audience=unverified["aud"], options={"require": ["exp", "iat", "sub", "jti"]},
    )
    print("header  " + json.dumps(header))
    print("claims  " + json.dumps(claims, indent=2).replace("\n", "\n        "))
    print(f"verified by PyJWT against {metadata['jwks_uri']}\n")
    print("Try next, in another terminal:")
    print(f"  cd {os.path.abspath(folder)}; alias microauthd='{sys.executable} -I {archive}'")
    print(f"  microauthd mad session login --admin-url {base_url['admin']}")
    print("  microauthd mad user create --username ann --user-email ann@example.org --password-stdin")
    print("  microauthd mad client create --client-id sensor")
    return None


if __name__ == "__main__":
    problem = main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    if problem:
        sys.exit(f"build/run: {problem}")
