"""Whole journeys over real sockets, against the built archive."""

import json
import os
import re
import signal
import ssl
import stat
import subprocess
import time
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from urllib.parse import quote

import jwt
import pytest
from box import Box

BOX = {"serve_public_auth_files": "true", "metrics_allow": "127.0.0.1", "workers": 2}
REFRESH = {"grant_type": "refresh_token"}


class TestMachines:
    def test_a_token_from_set_up_to_revocation(self, box):
        answer = box.token()
        assert answer.status == 200 and answer.json["scope"] == "api:read api:write"
        metadata = box.auth("/.well-known/openid-configuration").json
        keys = jwt.PyJWKClient(f"http://127.0.0.1:{box.auth_port}/jwks.json")
        token = answer.json["access_token"]
        claims = jwt.decode(
            token, keys.get_signing_key_from_jwt(token).key, algorithms=["ES256"], audience="api",
            issuer=metadata["issuer"],
        )
        assert claims["sub"] == "app"
        assert box.auth("/introspect", {"token": token}, client=box.client).json["active"] is True
        assert box.auth("/revoke", {"token": token}, client=box.client).json["success"] is True
        for _ in range(8):  # every worker knows at once
            assert box.auth("/introspect", {"token": token}, client=box.client).json == {"active": False}

    def test_a_new_secret_counts_everywhere_at_once(self, box):
        bearer = box.admin_token()
        made = box.admin("POST", "/clients", json_body={"client_id": "rotating"}, bearer=bearer).json
        client = ("rotating", made["client_secret"])
        for _ in range(4):
            for _ in range(6):
                assert box.auth("/token", {"grant_type": "client_credentials"}, client=client).status == 200
            old, client = (
                client,
                (
                    "rotating",
                    box.admin("POST", "/clients/secret", json_body={"client_id": made["id"]}, bearer=bearer).json[
                        "message"
                    ],
                ),
            )
            for _ in range(4):  # the box bears twenty wrong secrets of one client at once
                assert box.auth("/token", {"grant_type": "client_credentials"}, client=old).status == 401


    def test_a_chosen_secret_goes_through_curl_as_it_is(self, box):
        """RFC 6749 §2.3.1 wants both parts form-encoded; curl -u encodes nothing."""
        secret, bearer = "a+b%c d%20e", box.admin_token()
        chosen = {"client_id": "by/curl+1", "client_secret": secret}
        assert box.admin("POST", "/clients", json_body=chosen, bearer=bearer).status in (200, 201)
        command = ["curl", "-fsS", "-u", "by/curl+1:" + secret, "-d", "grant_type=client_credentials"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{box.auth_port}/token"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and json.loads(done.stdout)["token_type"] == "Bearer", done
        assert box.mad("token", "get", "--client-id", "by/curl+1", MAD_CLIENT_SECRET=secret).returncode == 0


class TestPeople:
    def test_a_login_from_password_to_logout(self, box):
        user = box.new_user("ann")
        answer = box.log_in("ann", scope="openid profile email")
        tokens = answer.json
        assert answer.status == 200 and tokens["id_token"]
        assert box.auth("/userinfo", bearer=tokens["access_token"]).json["sub"] == user["id"]
        again = box.auth("/token", REFRESH | {"refresh_token": tokens["refresh_token"]}, client=box.client)
        assert again.status == 200
        retry = box.auth("/token", REFRESH | {"refresh_token": tokens["refresh_token"]}, client=box.client)
        assert retry.json["refresh_token"] == again.json["refresh_token"], "its answer may have been lost"
        assert box.auth("/me", bearer=again.json["access_token"]).status == 200
        used = box.auth("/token", REFRESH | {"refresh_token": again.json["refresh_token"]}, client=box.client)
        assert used.status == 200
        assert (
            box.auth("/token", REFRESH | {"refresh_token": tokens["refresh_token"]}, client=box.client).json["error"]
            == "invalid_grant"
        )
        assert box.auth("/me", bearer=used.json["access_token"]).status == 401
        assert box.auth("/me", bearer=again.json["access_token"]).status == 401, "the family is dead"
        other = box.log_in("ann").json
        assert box.auth("/logout-all", post=True, bearer=other["access_token"]).status == 200
        assert box.auth("/me", bearer=other["access_token"]).status == 401

    def test_a_lockout_survives_a_restart(self, box):
        box.new_user("bert")
        for _ in range(5):
            assert box.log_in("bert", "wrong wrong").status == 403
        box.stop()
        box.start()
        assert box.log_in("bert").status == 403


class TestMad:
    def test_from_login_to_a_token(self, box):
        done = box.mad("session", "login", "--username", "root", "--password-stdin", input=box.PASSWORD + "\n")
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(os.stat(box.folder / ".mad_token").st_mode) == 0o600
        assert box.mad("session", "status", "--json").returncode == 0
        done = box.mad(
            "user", "create", "--username", "carl", "--user-email", "carl@example.org", "--password-stdin", "--json",
            input="correct horse battery\n",
        )
        assert done.returncode == 0 and json.loads(done.stdout)["username"] == "carl", done.stderr
        assert json.loads(box.mad("user", "get", "--id", "carl", "--json").stdout)["email"] == "carl@example.org"
        assert "carl" in box.mad("user", "list").stdout
        made = json.loads(box.mad("client", "create", "--client-id", "sensor", "--json").stdout)
        done = box.mad("scope", "create", "--name", "sensor:read", "--json")
        assert done.returncode == 0, done.stderr
        assert (
            box.mad("scope", "assign-to-client", "--client-id", "sensor", "--scope-id", "sensor:read").returncode == 0
        )
        first = box.mad("token", "get", "--client-id", "sensor", MAD_CLIENT_SECRET=made["client_secret"])
        assert first.returncode == 0, first.stderr
        claims = jwt.decode(first.stdout.strip(), options={"verify_signature": False})
        assert claims["scope"] == "sensor:read" and claims["sub"] == "sensor"
        assert (
            box.mad("token", "get", "--client-id", "sensor", MAD_CLIENT_SECRET=made["client_secret"]).stdout
            == first.stdout
        ), "cached"
        shown = box.mad("token", "--token", first.stdout.strip())
        assert "sensor:read" in shown.stdout
        changed = box.mad("client", "change-secret", "--id", "sensor", "--json")
        assert changed.returncode == 0, changed.stderr
        assert box.mad("client", "get", "--id", "nobody", "--json").returncode == 1
        assert box.mad("session", "logout").returncode == 0
        assert box.mad("user", "list").returncode == 3

    @pytest.mark.parametrize(
        "noun, name, made",
        [
            ("user", "corp\\ann/x", ("--username", "--user-email", "slash@example.org", "--password-stdin")),
            ("role", "ops/night", ("--name",)), ("permission", "door/open", ("--name",)),
            ("scope", "https://api.example/read", ("--name",)), ("client", "team/a+b%2Fc\\d", ("--client-id",)),
        ],
    )
    def test_a_name_with_a_slash_is_a_name(self, box, noun, name, made):
        """RFC 3986 §2.2: over a real connection, encoded, as one segment."""
        token = box.admin_token()

        def run(verb, *words, **more):
            done = box.mad(noun, verb, *words, "--json", MAD_ADMIN_TOKEN=token, **more)
            assert done.returncode == 0, done
            return json.loads(done.stdout)

        id = run("create", made[0], name, *made[1:], input="correct horse battery\n")["id"]
        assert run("get", "--id", name)["id"] == id
        answer = box.admin("GET", f"/{noun}s/{quote(name, safe='')}", bearer=token)
        assert (answer.status, answer.json["id"]) == (200, id)
        run("delete", "--id", name, "--yes")
        assert box.admin("GET", f"/{noun}s/{id}", bearer=token).status == 404

    def test_auth_takes_no_encoded_slash(self, box):
        assert box.auth("/user/a%2Fb").status == 400

    def test_exit_statuses(self, box):
        assert box.mad("user", "create").returncode == 2
        assert box.mad(
            "session", "login", "--username", "root", "--password-stdin", input="wrong wrong\n"
        ).returncode == 1
        assert (
            box.run("mad", "user", "list", MAD_ADMIN_URL="http://127.0.0.1:9", MAD_ADMIN_TOKEN="a.b.c").returncode == 4
        )


class TestPublicFiles:
    def test_the_example_page_is_served_and_nothing_else(self, box):
        page = box.auth("/login.html")
        assert (
            page.status == 200
            and b"Sign in" in page.body
            and "script-src" not in page.headers["Content-Security-Policy"]
        )
        assert box.auth("/login.js").status == 200 and box.auth("/mad.conf").status == 404


class TestSecrecy:
    def test_nothing_secret_is_in_log_output_or_other_files(self, box):
        box.new_user("eve")
        tokens = [box.token().json["access_token"], box.log_in("eve").json["refresh_token"]]
        box.auth("/token", REFRESH | {"refresh_token": "a-guess-at-a-refresh-token"}, client=box.client)
        secrets = [
            *tokens, box.client[1], box.PASSWORD, "correct horse battery", "a database phrase",
            "a-guess-at-a-refresh-token",
        ]
        for path in box.folder.rglob("*"):
            if path.is_file() and "cache" not in str(path.relative_to(box.folder)):
                content = path.read_bytes()
                for secret in secrets:
                    if secret == "a database phrase" and path.name == "mad.conf":
                        continue
                    assert secret.encode() not in content, path
        assert box.run("options").stdout.count("(set)") == 1

    def test_files_are_private(self, box):
        for path in box.folder.iterdir():
            if path.is_file() and path.name not in ("answers.toml", "output.txt"):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def make_certificate(folder, password=b""):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import pkcs12

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False).sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    (folder / "box.pem").write_bytes(
        pem
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "box.p12").write_bytes(
        pkcs12.serialize_key_and_certificates(
            b"box", key, certificate, None, serialization.BestAvailableEncryption(password)
        )
    )


class TestTls:
    def test_both_kinds_of_certificate_and_an_issuer_with_a_path(self, tmp_path):
        make_certificate(tmp_path, b"phrase")
        box = (
            Box(
                tmp_path / "data", auth_ssl_cert_file=tmp_path / "box.p12", auth_ssl_cert_pass="phrase",
                admin_ssl_cert_file=tmp_path / "box.pem", oidc_issuer="https://box.example/auth", workers="1",
            )
            .set_up()
            .start(wait=False)
        )
        try:
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            for _ in range(100):
                try:
                    metadata = json.load(
                        urllib.request.urlopen(
                            f"https://localhost:{box.auth_port}/.well-known/openid-configuration", context=context,
                            timeout=60,
                        )
                    )
                    break
                except OSError:
                    import time

                    time.sleep(0.05)
            assert metadata["token_endpoint"] == "https://box.example/auth/token"
            answer = urllib.request.urlopen(f"https://localhost:{box.admin_port}/ping", context=context, timeout=60)
            assert json.load(answer) == {"message": "pong from admin"} and answer.headers["Strict-Transport-Security"]
            with pytest.raises(OSError):
                urllib.request.urlopen(f"https://localhost:{box.admin_port}/ping", timeout=60)
            done = box.run(
                "mad", "session", "login", "--username", "root", "--password-stdin", "--admin-url",
                f"https://localhost:{box.admin_port}", input=box.PASSWORD + "\n", MAD_CA_FILE=str(tmp_path / "ca.pem"),
            )
            assert done.returncode == 0, done.stderr
        finally:
            box.__exit__()

    def test_a_wrong_passphrase_is_a_sentence(self, tmp_path):
        make_certificate(tmp_path, b"phrase")
        box = Box(tmp_path / "data", auth_ssl_cert_file=tmp_path / "box.p12", auth_ssl_cert_pass="wrong").set_up()
        done = box.run("serve")
        assert (
            done.returncode == 1
            and done.stderr.startswith("microauthd: auth-ssl-cert-file:")
            and done.stderr.count("\n") == 1
        )


class TestCommands:
    def test_version_options_selftest(self, box):
        assert box.run("version").stdout.startswith("microauthd ")
        assert json.loads(box.run("options", "--json").stdout)["auth-port"]["value"] == box.auth_port
        done = box.run("selftest")
        assert done.returncode == 0 and "FAIL" not in done.stdout, done.stdout

    def test_a_folder_without_a_set_up_says_what_to_do(self, tmp_path):
        done = Box(tmp_path).run("serve")
        assert done.returncode == 1 and "setup" in done.stderr and os.listdir(tmp_path) == []



class TestBesideTheBox:
    """mad in the folder of a box that serves, without any address"""

    def test_a_token_that_was_revoked_here_is_never_handed_out_again(self, box):
        box.mad("session", "login", "--username", "root", "--password-stdin", input=box.PASSWORD + "\n")
        bearer = box.admin_token()
        made = box.admin("POST", "/clients", json_body={"client_id": "meter", "scopes": []}, bearer=bearer).json

        def get(*words):
            done = box.run(
                "mad", "token", "get", *words, MAD_CLIENT_ID="meter", MAD_CLIENT_SECRET=made["client_secret"]
            )
            assert done.returncode == 0 and done.stderr == "", done
            return done.stdout.strip()

        token = get()
        assert get() == token
        assert box.auth("/revoke", {"token": token}, client=("meter", made["client_secret"])).status == 200
        second = get()
        assert second != token and get() == second
        assert box.admin("POST", f"/clients/{made['id']}/revoke", bearer=bearer).status == 200
        third = get()
        assert third not in (token, second) and get() == third
        assert box.auth("/introspect", {"token": third}, client=box.client).status == 200
        assert get("--fresh") != third


def scrape(box, headers=()):
    request = urllib.request.Request(f"http://127.0.0.1:{box.admin_port}/metrics", headers=dict(headers))
    with urllib.request.urlopen(request) as response:
        return response.read().decode()


def read_metric(text, name):
    return sum(float(value) for value in re.findall(rf"(?m)^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text))


class TestMetrics:
    """GET /metrics of a box with several processes"""

    def test_every_process_counts_and_its_successor_goes_on(self, box):
        before = read_metric(scrape(box), "microauthd_tokens_issued_total")
        for _ in range(30):
            assert box.token().status == 200
        after = scrape(box)
        assert read_metric(after, "microauthd_tokens_issued_total") == before + 30
        assert read_metric(after, "microauthd_workers_alive") == read_metric(after, "microauthd_workers_configured") == 3
        for worker in box.pids()[1:]:  # ADMIN, which answers, is one of them
            os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                found = scrape(box)
                restarts, alive = (
                    read_metric(found, f"microauthd_{name}") for name in ("worker_restarts_total", "workers_alive")
                )
                if restarts == alive == 3 and box.auth("/health").status == 200:
                    break
            except OSError:
                time.sleep(0.1)
        found = scrape(box)
        assert read_metric(found, "microauthd_tokens_issued_total") == before + 30
        assert read_metric(found, "microauthd_worker_restarts_total") == 3
        for name in ("database_size_bytes", "start_timestamp_seconds", "http_request_duration_seconds_count", "disk_free_bytes"):
            assert read_metric(found, f"microauthd_{name}") > 0, name
        assert 'microauthd_clock_state{state="right"} 1\n' in found

    @pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "x-forwarded-for"])
    def test_whoever_speaks_for_others_is_no_address(self, box, name):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            scrape(box, {name: "127.0.0.1"})

    def test_what_no_route_saw_counts_too(self, box):
        before = read_metric(scrape(box), "microauthd_http_refusals_total")
        with pytest.raises(urllib.error.HTTPError, match="431"):
            scrape(box, {"X": "y" * 20_000})
        assert read_metric(scrape(box), "microauthd_http_refusals_total") == before + 1
