"""ADMIN, noun by noun: what each change does, what it ends, and what is refused."""

import re

import jwt
import microauthd as m
import msgspec
import pyotp
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from appliance.base.settings import Options
from appliance.base.store import MAD_ADMIN_ROLE_ID, SEEDED_SCOPES
from appliance.upkeep import note_configuration

OTHER = "another battery staple"


@pytest.fixture
def actions(idp):
    """The actions of the newest audit rows, newest first."""
    return lambda count=1: [row.action for row in idp.store.list_audit(limit=count)]


def status_of(auth, token):
    return auth.get("/me", bearer=token).status


class TestToken:
    def test_its_claims(self, idp, admin, root):
        answer = admin.post("/token", {"username": "Root", "password": PASSWORD}).json
        claims = jwt.decode(answer["access_token"], options={"verify_signature": False})
        assert jwt.get_unverified_header(answer["access_token"])["kid"] == idp.admin_ring.access.kid
        assert (
            claims["sub"] == root.id
            and claims["iss"] == claims["aud"] == "https://localhost:9041"
            and claims["mad"] == "admin"
            and claims["jti"] == answer["jti"]
        )
        assert (
            "client_id" not in claims
            and claims["role"] == [MAD_ADMIN_ROLE_ID]
            and claims["exp"] - claims["iat"] == answer["expires_in"] == 3600
        )
        assert None not in answer.values() and "refresh_token" not in answer

    def test_who_has_no_address_has_no_claim_of_one(self, idp, admin, root, change):
        """As an administrator whom `admin recover` made."""
        change("UPDATE account SET email = '' WHERE id = :id", id=root.id)
        token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        assert not {"email", "email_verified"} & set(jwt.decode(token, options={"verify_signature": False}))
        assert admin.get("/users", bearer=token).status == 200

    def test_it_means_nothing_on_auth(self, auth, service, admin_token):
        for path in ("/me", "/userinfo", "/me/sessions"):
            assert auth.get(path, bearer=admin_token).status == 401
        assert auth.post("/introspect", {"token": admin_token}, auth=service).body == b'{"active":false}'

    def test_a_token_of_auth_with_every_claim_of_admin_is_none(self, idp, admin, admin_token):
        claims = jwt.decode(admin_token, options={"verify_signature": False})
        assert admin.get("/users", bearer=idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims)).status == 401

    def test_a_token_of_admin_that_says_auth_is_none(self, idp, admin, admin_token):
        claims = jwt.decode(admin_token, options={"verify_signature": False})
        for other in ({"mad": "auth", "client_id": "x"}, {"iss": idp.options.auth_issuer}, {"sub": "nobody"}):
            assert (
                admin.get("/users", bearer=idp.admin_ring.mint(idp.admin_ring.access, m.AT_JWT, claims | other)).status
                == 401
            )

    @pytest.mark.parametrize("form", [{}, {"username": "root"}, {"password": "x"}, {"username": "", "password": ""}])
    def test_what_is_missing_is_invalid_request(self, admin, root, form):
        assert (admin.post("/token", form).status, admin.post("/token", form).json["error"]) == (400, "invalid_request")

    def test_what_has_no_value_is_as_if_omitted(self, admin, root, admin_token):
        form = {"username": "root", "password": PASSWORD, "totp": "", "totp_code": "", "client_id": "", "scope": ""}
        assert admin.post("/token", form).status == 200
        assert admin.post("/logout", {"access_token": ""}).status == 401
        assert admin.post("/logout", {"access_token": ""}, bearer=admin_token).status == 200

    @pytest.mark.parametrize("name", ["username", "password", "totp", "client_id"])
    def test_a_repeated_member_that_is_read_is_refused(self, idp, admin, root, name):
        form = [("username", "root"), ("password", PASSWORD), ("resource", "a"), ("resource", "b")]
        assert admin.post("/token", form).status == 200
        before = idp.store.list_audit(limit=1)[0].seq
        answer = admin.post("/token", [*form, (name, "x"), (name, "y")])
        assert (answer.status, answer.json["error"]) == (400, "invalid_request")
        assert idp.store.list_audit(limit=1)[0].seq == before, "nobody was authenticated"

    def test_a_repeated_member_of_a_form_is_refused_where_it_is_read(self, admin, admin_token):
        token = [("token", admin_token)]
        assert admin.post("/revoke", token * 2, bearer=admin_token).json["errors"] == {"token": "is there twice"}
        assert admin.post("/revoke", [*token, ("y", "1"), ("y", "2")], bearer=admin_token).status == 200

    def test_an_empty_text_in_json_is_a_value(self, admin, alice, admin_token):
        for member in ({"username": ""}, {"email": ""}):
            answer = admin("PUT", "/users/alice", bearer=admin_token, json_body=member)
            assert (answer.status, list(answer.json["errors"])) == (400, list(member))

    def test_a_client_id_of_any_length_is_for_the_record_only(self, idp, admin, root):
        assert admin.post("/token", {"username": "root", "password": PASSWORD, "client_id": "x" * 50_000}).status == 200
        row = idp.store.list_audit("admin_token_issued")[0]
        assert len(row.target) <= 255 and row.ip_address == "192.0.2.7"

    def test_who_was_ended_between_password_and_token_gets_none(self, idp, admin, root, clock, monkeypatch):
        authenticate = m.authenticate_user

        def slowly(*words, **more):
            found = authenticate(*words, **more)
            clock.pass_(1)
            m.revoke_user(idp, m.LOCAL.acting_as("test"), root.id, "reset")
            clock.pass_(1)
            return found

        monkeypatch.setattr(m, "authenticate_user", slowly)
        assert admin.post("/token", {"username": "root", "password": PASSWORD}).status == 403

    @pytest.mark.parametrize("revocation", [True, False])
    def test_logout_ends_this_login_and_no_other(self, make_idp, root, revocation):
        idp = make_idp(Options(**CHEAP, enable_token_revocation=revocation, admin_domain="localhost"))
        admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp))
        one, other = (
            admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"] for _ in range(2)
        )
        assert admin.post("/logout", bearer=one).json["success"] is True
        assert admin.get("/users", bearer=one).status == 401 and admin.get("/users", bearer=other).status == 200


class TestHost:
    """A page that rebinds its name to us gets nothing."""

    @pytest.mark.parametrize(
        "host, status",
        [
            ("localhost:9041", 200), ("127.0.0.1", 200), ("[::1]:9041", 200), ("LOCALHOST", 200), ("localhost.", 200),
            ("evil.example", 421), ("", 421), ("localhost.evil.example:9041", 421), ("evil.example:localhost", 421),
            ("localhost@evil.example", 421), ("[::1].evil.example", 421), ("127.0.0.1.nip.io", 421),
            ("2130706433", 421), ("0", 421),
        ],
    )
    def test_it_answers_only_to_its_own_names(self, admin, root, host, status):
        caller = Caller(admin.app, host)
        assert caller.get("/ping").status == status
        login = caller.post("/token", {"username": "root", "password": PASSWORD})
        assert login.status == status and (status == 200 or login.json["error"] == "misdirected_request")

    def test_its_own_name_is_an_option(self, make_idp):
        idp = make_idp(Options(**CHEAP, admin_domain="box.example:8443", admin_ip="192.0.2.1"))
        app = m.guard_admin(m.App(idp, m.ADMIN), idp)
        assert [
            Caller(app, host).get("/ping").status
            for host in ("box.example", "box.example:8443", "192.0.2.1:9041", "other.example")
        ] == [200, 200, 200, 421]


    @pytest.mark.parametrize(
        "host, status",
        [
            ("localhost:9041", 200), ("127.0.0.1:9041", 200), ("[::1]:9041", 200), ("localhost", 200), ("[::1]", 200),
            ("box.example", 200), ("box.example:443", 200), ("localhost:9042", 421), ("127.0.0.1:80", 421),
            ("[::1]:9042", 421), ("evil.example", 421),
        ],
    )
    def test_on_the_unix_socket_the_port_tells_which_box_is_meant(self, make_idp, host, status):
        idp = make_idp(Options(**CHEAP, admin_domain="box.example"))
        app = m.guard_admin(m.App(idp, m.ADMIN), idp)
        named = {"microauthd.peer": "unix:uid=0", "REMOTE_ADDR": "unix:uid=0", "microauthd.uid": 0}
        assert Caller(lambda environ, start: app(environ | named, start), host).get("/ping").status == status
        assert Caller(app, host).get("/ping").status == (421 if host == "evil.example" else 200)


NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
FRAME = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
OWN_ORIGIN = {"Origin": "http://localhost:9041"}


class TestPagesOfOtherOrigins:
    """Fetch Metadata §2, Fetch Standard §3.2"""

    @pytest.mark.parametrize(
        "headers, status",
        [
            ({}, 200), (OWN_ORIGIN, 200), ({"Origin": "https://localhost:9041"}, 200),
            (OWN_ORIGIN | {"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
            ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Origin": "HTTP://LOCALHOST:9041"}, 200),
            ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "Cross-Site"}, 403), ({"Sec-Fetch-Site": "of-tomorrow"}, 403),
            (OWN_ORIGIN | {"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": "cross-site"} | NAVIGATION, 403),
            ({"Origin": "http://localhost:9040"}, 403), ({"Origin": "http://localhost"}, 403),
            ({"Origin": "https://localhost"}, 403), ({"Origin": "http://127.0.0.1:9041"}, 403),
            ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": ""}, 403),
            ({"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"}, 403),
            ({"Origin": "http://localhost:9041.evil.example"}, 403),
        ],
    )
    def test_what_changes_anything_comes_from_a_program_or_from_here(self, admin, root, headers, status):
        login = admin.post("/token", {"username": "root", "password": PASSWORD}, headers=headers.items())
        assert login.status == status and (status == 200 or login.json["error"] == "access_denied")

    @pytest.mark.parametrize(
        "headers, status",
        [
            ({}, 200), ({"Origin": "https://evil.example"}, 200), ({"Sec-Fetch-Site": "same-origin"}, 200),
            ({"Sec-Fetch-Site": "none"} | NAVIGATION, 200), ({"Sec-Fetch-Site": "cross-site"} | NAVIGATION, 200),
            ({"Sec-Fetch-Site": "same-site"} | NAVIGATION, 200),
            ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
            ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
            ({"Sec-Fetch-Site": "cross-site"} | FRAME, 403),
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_link_from_elsewhere_works(self, admin, method, headers, status):
        assert admin(method, "/ping", headers=headers.items()).status == status

    def test_nothing_is_worked_on_before_it_is_refused(self, idp, admin, root):
        answer = admin.post(
            "/token", {"username": "root", "password": "wrong wrong"}, headers=[("Sec-Fetch-Site", "same-site")]
        )
        assert answer.status == 403 and idp.store.find_account(root.id).failed_logins == 0
        assert "Sec-Fetch-Site is same-site" in idp.stream.getvalue()

    @pytest.mark.parametrize(
        "origin, host, status",
        [
            ("https://box.example", "box.example", 200), ("https://box.example:8443", "box.example:8443", 200),
            ("https://box.example:8443", "localhost:9041", 200),  # of a proxy that sends on another Host
            ("http://box.example", "localhost:9041", 403), ("https://other.example", "box.example", 403),
        ],
    )
    def test_a_proxy_that_ends_tls_need_not_be_known(self, make_idp, new_user, origin, host, status):
        idp = make_idp(Options(**CHEAP, admin_domain="box.example:8443"))
        new_user("root", admin=True)
        admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp), host)
        body = {"username": "root", "password": PASSWORD}
        assert admin.post("/token", body, headers=[("Origin", origin)]).status == status


class TestUsers:
    def test_one_is_made_as_asked_and_no_more(self, idp, call):
        """Members that are not for the caller to set do nothing."""
        body = {
            "username": "Bob", "email": "Bob@Example.org", "password": PASSWORD, "id": "mine", "is_active": False,
            "is_admin": True, "role": [MAD_ADMIN_ROLE_ID], "roles": ["MadAdmin"], "totp_enabled": True,
            "password_hash": "x", "lockout_until": 1, "created_at": 1, "totp_sealed": "x",
            "scopes": ["admin:provision_users"], "revoked_before": 1,
        }
        made = call("POST", "/users", body)
        assert made.status == 200 and made.json == call("GET", f"/users/{made.json['id']}").json
        assert set(made.json) == {
            "id", "username", "email", "created_at", "lockout_until", "is_active", "email_verified", "totp_enabled",
            "last_login_at", "is_admin", "roles", "totp_locked_until", "lockout_reason", "lockout_by",
            "recovery_codes_left",
        }
        assert (made.json["roles"], made.json["is_admin"]) == ([], False)
        assert (
            made.json["username"], made.json["email"], made.json["is_active"], made.json["email_verified"],
            made.json["totp_enabled"], made.json["lockout_until"],
        ) == ("bob", "bob@example.org", True, False, False, None)
        account = idp.store.find_account(made.json["id"])
        assert (
            account.created_at == idp.now()
            and account.revoked_before == 0
            and account.password_hash.startswith("$argon2id$")
        )
        assert not m.is_admin(idp, account.id) and idp.store.list_scopes_of_user(account.id) == []

    def test_the_names_of_the_bindings_are_known(self, call):
        made = call("POST", "/users", {"USERNAME": "bob", "user_email": "bob@example.org", "User_Password": PASSWORD})
        assert made.status == 200

    @pytest.mark.parametrize(
        "body, members",
        [
            ({"email": "a@b", "password": PASSWORD}, ["username"]), ({"username": 5}, ["username"]),
            ({"username": "x", "email": ["a"]}, ["email"]),
            ({"username": "new", "email": "a@b", "password": "short"}, ["password"]),
            ({"username": "", "email": "", "password": ""}, ["username", "email", "password"]),
        ],
    )
    def test_what_is_refused_names_each_member(self, call, body, members):
        answer = call("POST", "/users", body)
        assert (answer.status, answer.json["error"], list(answer.json["errors"])) == (400, "invalid_request", members)

    def test_a_taken_name_is_a_conflict(self, call, root):
        answer = call("POST", "/users", {"username": "ROOT", "email": "x@example.org", "password": PASSWORD})
        assert (answer.status, answer.json["error"]) == (409, "conflict")

    def test_they_are_found_by_id_and_name(self, call, alice):
        for key in (alice.id, "alice", "ALICE"):
            assert call("GET", f"/users/{key}").json["id"] == alice.id
        assert call("GET", "/users/id-by-name/Alice").json == {"result": alice.id}

    def test_they_are_listed_by_name_in_pages(self, call, new_user, root, change):
        for name in ("carl", "bert", "idle"):
            new_user(name)
        change("UPDATE account SET is_active = 0 WHERE username = 'idle'")
        answer = call("GET", "/users")
        assert [user["username"] for user in answer.json] == ["bert", "carl", "root"] and answer.headers[
            "x-total-count"
        ] == "3"
        page = call("GET", "/users?limit=1&offset=1")
        assert [user["username"] for user in page.json] == ["carl"] and page.headers["x-total-count"] == "3"
        assert [user["username"] for user in call("GET", "/users?q=BER").json] == ["bert"]

    @pytest.mark.parametrize("q", ["%25", "_", "%5C", "'", "%22", "%27%20OR%201=1--", "ber%25"])
    def test_a_search_is_for_letters(self, call, new_user, q):
        new_user("bert")
        answer = call("GET", f"/users?q={q}")
        assert answer.status == 200 and answer.json == []

    def test_an_address_may_be_known_to_be_theirs_at_once(self, idp, call):
        body = {"username": "bob", "email": "bob@example.org", "password": PASSWORD, "email_verified": True}
        made = call("POST", "/users", body)
        assert made.json["email_verified"] is True and call("GET", "/users/bob").json["email_verified"] is True
        assert [row["action"] for row in call("GET", "/audit-logs").json][:2] == ["user_email_verified", "user_created"]
        nobody = call("POST", "/users", body | {"username": "eve", "email": "", "user_email": None})
        assert nobody.status == 400 and list(nobody.json["errors"]) == ["email_verified"]
        refused = call("POST", "/users", body | {"username": "eve", "email_verified": "yes"})
        assert refused.status == 400 and list(refused.json["errors"]) == ["email_verified"]

    def test_a_put_changes_what_is_sent_and_nothing_else(self, call, alice):
        call("POST", "/users/alice/verify-email")
        changed = call(
            "PUT", f"/users/{alice.id}",
            {
                "email": "New@Example.org", "id": "other", "created_at": "2000-01-01T00:00:00Z", "totp_enabled": True,
                "password": OTHER, "nonsense": 1,
            },
        )
        assert (
            changed.status == 200
            and changed.json["email"] == "new@example.org"
            and changed.json["username"] == "alice"
            and changed.json["is_active"] is True
        )
        assert changed.json["email_verified"] is False, (
            "the old address was verified, not this one" and changed.json["totp_enabled"] is False
        )
        assert call("PUT", "/users/alice", {"email_verified": True}).json["email_verified"] is True
        assert call("PUT", "/users/alice", {}).json["email"] == "new@example.org"

    def test_what_it_got_can_be_sent_back(self, call, auth, log_in, alice):
        """As the original's mad does. Nothing is ended by it."""
        token = log_in(alice)["access_token"]
        shown = call("GET", "/users/alice").json
        assert call("PUT", "/users/alice", shown).json == shown and status_of(auth, token) == 200

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"username": ""}, "username"), ({"username": None}, "username"), ({"email": ""}, "email"),
            ({"email": "nonsense"}, "email"), ({"is_active": "yes"}, "is_active"), ({"email": 5}, "email"),
            ({"lockout_until": "soon"}, "lockout_until"), ({"lockout_until": "2001-01-01T00:00:00Z"}, "lockout_until"),
            ({"username": MAD_ADMIN_ROLE_ID}, "username"),
        ],
    )
    def test_a_refused_put_names_the_member_and_changes_nothing(self, call, alice, body, member):
        before = call("GET", "/users/alice").json
        answer = call("PUT", "/users/alice", body | ({"username": "renamed"} if member != "username" else {}))
        assert (answer.status, list(answer.json["errors"])) == (400, [member]) and call(
            "GET", "/users/alice"
        ).json == before

    def test_a_taken_name_or_address_is_a_conflict(self, call, alice, new_user):
        new_user("bob")
        assert [
            call("PUT", "/users/alice", body).status for body in ({"username": "BOB"}, {"email": "bob@example.org"})
        ] == [409, 409]

    @pytest.mark.parametrize(
        "change",
        [
            lambda call: call("POST", "/users/deactivate/alice"),
            lambda call: call("PUT", "/users/alice", {"is_active": False}), lambda call: call("DELETE", "/users/alice"),
            lambda call: call("POST", "/users/alice/reset", {"new_password": OTHER}),
            lambda call: call("POST", "/users/alice/set-lockout", {"lockout_until": "9999-12-31T23:59:59Z"}),
            lambda call: call("POST", "/users/alice/revoke"),
        ],
        ids=["deactivate", "put", "delete", "reset", "lockout", "revoke"],
    )
    def test_what_takes_a_right_away_ends_everything_at_once(self, idp, call, auth, service, log_in, alice, change):
        answer = log_in(alice)
        assert change(call).status == 200
        assert status_of(auth, answer["access_token"]) == 401
        assert auth.post("/introspect", {"token": answer["access_token"]}, auth=service).json == {"active": False}
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": answer["refresh_token"]}, auth=service
            ).status
            == 400
        )

    def test_a_reset_password_counts_and_the_old_one_does_not(self, call, auth, service, alice, log_in):
        log_in(alice)  # remembered in memory
        assert call("POST", "/users/alice/reset", {"password": OTHER}).json["success"] is True
        login = {"grant_type": "password", "username": "alice"}
        assert [auth.post("/token", login | {"password": word}, auth=service).status for word in (PASSWORD, OTHER)] == [
            403, 200,
        ]
        refused = call("POST", "/users/alice/reset", {"new_password": "short"})
        assert (refused.status, list(refused.json["errors"])) == (400, ["new_password"]) and call(
            "POST", "/users/nobody/reset", {"new_password": OTHER}
        ).status == 404

    def test_deactivated_and_back(self, call, auth, service, alice, actions):
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert call("POST", "/users/alice/activate").json["error"] == "unchanged"
        assert call("POST", "/users/deactivate/alice").status == 200 and actions() == ["user_deactivated"]
        assert (
            call("POST", "/users/deactivate/alice").status == 400
            and auth.post("/token", login, auth=service).status == 403
        )
        assert [user["username"] for user in call("GET", "/users?is_active=false").json] == [
            "alice"
        ] and "alice" not in call("GET", "/users").body.decode()
        assert len(call("GET", "/users?is_active=all").json) == 2
        assert (
            call("POST", "/users/alice/activate").status == 200
            and auth.post("/token", login, auth=service).status == 200
        )

    @pytest.mark.parametrize(
        "until, shown",
        [
            ("2040-05-06T07:08:09Z", "2040-05-06T07:08:09Z"), ("2040-05-06T07:08:09", "2040-05-06T07:08:09Z"),
            ("2040-05-06T07:08:09.1234567Z", "2040-05-06T07:08:09Z"),
            ("2040-05-06T09:08:09+02:00", "2040-05-06T07:08:09Z"),
            ("9999-12-31T23:59:59.9999999Z", "9999-12-31T23:59:59Z"), (2220160089, "2040-05-09T07:08:09Z"),
        ],
    )
    def test_a_lockout_is_set_enforced_and_cleared(self, call, auth, service, alice, until, shown):
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert call("POST", "/users/alice/set-lockout", {"lockout_until": until}).status == 200
        assert (
            call("GET", "/users/alice").json["lockout_until"] == shown
            and auth.post("/token", login, auth=service).status == 403
        )
        assert call("POST", "/users/alice/set-lockout", {"lockout_until": None}).json["message"] == "Lockout cleared."
        assert (
            call("GET", "/users/alice").json["lockout_until"] is None
            and auth.post("/token", login, auth=service).status == 200
        )

    @pytest.mark.parametrize(
        "path, body",
        [
            ("set-lockout", {"lockout_until": "0001-01-01T00:00:00"}), ("set-lockout", {"lockout_until": None}),
            ("clear-lockout", None),
        ],
    )
    def test_a_lockout_by_wrong_passwords_is_cleared_too(self, call, auth, service, alice, path, body):
        login = {"grant_type": "password", "username": "alice"}
        for _ in range(5):
            auth.post("/token", login | {"password": "wrong password"}, auth=service)
        assert auth.post("/token", login | {"password": PASSWORD}, auth=service).status == 403
        assert (
            call("POST", f"/users/alice/{path}", body).status == 200
            and auth.post("/token", login | {"password": PASSWORD}, auth=service).status == 200
        )

    @pytest.mark.parametrize(
        "body",
        [
            {"lockout_until": "yesterday"}, {"lockout_until": "2001-01-01T00:00:00Z"}, {"lockout_until": True},
            {"lockout_until": -5}, {},
        ],
    )
    def test_a_bad_time_is_refused(self, call, alice, body):
        answer = call("POST", "/users/alice/set-lockout", body)
        assert (answer.status, list(answer.json["errors"])) == (400, ["lockout_until"])

    def test_an_unknown_user_is_not_found(self, call):
        calls = [
            ("GET", "/users/nobody", None), ("PUT", "/users/nobody", {}), ("DELETE", "/users/nobody", None),
            ("POST", "/users/nobody/activate", None), ("POST", "/users/deactivate/nobody", None),
            ("POST", "/users/nobody/verify-email", None), ("POST", "/users/nobody/reset", {"new_password": OTHER}),
            ("POST", "/users/nobody/set-lockout", {"lockout_until": None}), ("POST", "/users/nobody/revoke", None),
            ("GET", "/users/nobody/roles?all=false", None), ("GET", "/users/id-by-name/nobody", None),
        ]
        assert {call(*words).status for words in calls} == {404}
        assert (
            "x-not-found" not in call("GET", "/users/nobody").headers
            and call("GET", "/nowhere").headers["x-not-found"] == "route"
        )

    def test_verify_password(self, call, alice, give_totp, idp, clock):
        for body in (
            {"user_id": alice.id, "password": PASSWORD}, {"username": "Alice", "password": PASSWORD},
            {"user_id": "alice", "password": PASSWORD},
        ):
            assert call("POST", "/users/verify-password", body).json == {
                "valid": True, "user_id": alice.id, "email": "alice@example.org", "totp_required": False,
            }
        assert [
            call("POST", "/users/verify-password", body).status
            for body in (
                {"user_id": alice.id, "password": "wrong"}, {"username": "nobody", "password": PASSWORD},
                {"password": PASSWORD},
            )
        ] == [403, 403, 400]
        seed = give_totp(idp, idp.store.find_account(alice.id))
        clock.pass_(60)
        assert (
            call("POST", "/users/verify-password", {"user_id": alice.id, "password": PASSWORD}).json["totp_required"]
            is True
        )
        assert (
            call("POST", "/users/verify-password", {"user_id": alice.id, "password": PASSWORD, "totp": "000000"}).status
            == 403
        )
        assert (
            call(
                "POST", "/users/verify-password",
                {"user_id": alice.id, "password": PASSWORD, "totp": pyotp.TOTP(seed).at(idp.now())},
            ).status
            == 200
        )
        assert (
            call("POST", "/users/deactivate/alice").status == 200
            and call("POST", "/users/verify-password", {"user_id": alice.id, "password": PASSWORD}).status == 403
        )

    def test_wrong_guesses_by_verify_password_lock(self, call, auth, service, alice):
        for _ in range(5):
            call("POST", "/users/verify-password", {"user_id": alice.id, "password": "wrong password"})
        assert (
            call("GET", "/users/alice").json["lockout_until"]
            and auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service
            ).status
            == 403
        )


class TestClients:
    def test_one_is_made_as_asked_and_no_more(self, idp, call, scopes):
        made = call(
            "POST", "/clients",
            {
                "client_id": "door", "id": "mine", "is_active": False, "is_first_party": False, "revoked_before": 5,
                "secret_hash": "x", "audience": None, "scopes": None,
            },
        )
        SECRETS.add(made.json["client_secret"])
        assert (
            made.status == 200
            and made.json["id"] != "mine"
            and made.json["is_active"] is True
            and made.json["audience"] == "microauthd"
            and made.json["scopes"] == []
        )
        assert (
            idp.store.find_client("door").revoked_before == idp.now_ms()
            and idp.store.find_client("door").may_introspect == 0
        )
        assert (
            {name: value for name, value in made.json.items() if name != "client_secret"}
            == call("GET", "/clients/door").json
            == call("GET", f"/clients/{made.json['id']}").json
        )
        assert call("GET", "/clients/id-by-name/door").json == {"result": made.json["id"]}

    def test_a_secret_is_told_once(self, auth, call):
        made = call("POST", "/clients", {"client_id": "door"}).json
        given = call("POST", "/clients", {"client_id": "gate", "client_secret": "sixteen characters"}).json
        assert "client_secret" not in given
        for path in ("/clients", "/clients/door", "/clients/gate"):
            said = call("GET", path).body.decode()
            assert made["client_secret"] not in said and "sixteen" not in said and "argon2" not in said
        for client in (("door", made["client_secret"]), ("gate", "sixteen+characters")):
            assert auth.post("/token", {"grant_type": "client_credentials"}, auth=client).status == 200

    def test_a_secret_is_changed_by_id_or_name(self, auth, call, service, idp):
        for key in (idp.store.find_client("service").id, "service"):
            answer = call("POST", "/clients/secret", {"client_id": key})
            assert set(answer.json) == {"success", "message"}
            SECRETS.add(answer.json["message"])
            assert (
                auth.post(
                    "/token", {"grant_type": "client_credentials"}, auth=("service", answer.json["message"])
                ).status
                == 200
            )
        assert call("POST", "/clients/secret", {"client_id": "nobody"}).status == 404

    def test_scopes_and_rights_count_at_once(self, auth, call):
        scope = call("POST", "/scopes", {"name": "door:open", "desc": None}).json
        made = call("POST", "/clients", {"client_id": "door"}).json
        client = ("door", made["client_secret"])
        assert "scope" not in auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json
        for body in ({"scope_ids": [scope["id"]]}, {"scopeIds": ["door:open"]}, {"scope_id": "door:open"}):
            assert call("POST", "/clients/door/scopes", body).json["success"] is True
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["scope"] == "door:open"
        assert [scope["name"] for scope in call("GET", "/clients/door/scopes").json] == ["door:open"]
        assert call("POST", "/clients/door/scopes", {"scope_ids": ["nonsense"]}).status == 400

    def test_scopes_of_users(self, call, alice):
        assert call("POST", f"/users/{alice.id}/scopes", {"scope_ids": ["api:write"]}).json == {
            "success": True, "message": "1 scopes assigned.",
        }
        assert [scope["name"] for scope in call("GET", "/users/alice/scopes").json] == ["api:read", "api:write"]

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"name": "a b"}, "name"), ({}, "name"), ({"name": "x", "description": "a" * 5000}, "description"),
            ({"name": "x", "description": "\x1b[31m"}, "description"),
        ],
    )
    def test_what_is_refused_of_a_scope_names_the_member(self, call, body, member):
        answer = call("POST", "/scopes", body)
        assert (answer.status, list(answer.json["errors"])) == (400, [member])

    @pytest.mark.parametrize(
        "path",
        [
            "/users/x", "/users/id-by-name/x", "/clients/x", "/clients/id-by-name/x", "/scopes/x",
            "/scopes/id-by-name/x", "/clients/x/scopes", "/users/x/scopes",
        ],
    )
    def test_what_is_not_there_is_404(self, call, path):
        answer = call("GET", path)
        assert (answer.status, answer.json) == (
            404, {"success": False, "message": m.ERRORS["not_found"][1], "error": "not_found", "request_id": "r1"},
        )

    def test_every_change_leaves_a_row_that_names_who_and_from_where(self, idp, call, root, service, alice):
        call("POST", "/users", {"username": "bob", "email": "bob@example.org", "password": PASSWORD})
        call("POST", "/clients", {"client_id": "door"})
        call("POST", "/clients/secret", {"client_id": "door"})
        call("POST", "/scopes", {"name": "door:open"})
        call("POST", "/clients/door/scopes", {"scope_ids": ["door:open"]})
        call("POST", "/users/bob/scopes", {"scope_ids": ["door:open"]})
        rows = idp.store.list_audit(limit=6)
        assert [row.action for row in rows] == [
            "assign_scope_to_user", "assign_scope_to_client", "create_scope", "client_secret_changed", "create_client",
            "user_created",
        ]
        assert {(row.actor_id, row.ip_address, row.request_id) for row in rows} == {(root.id, "192.0.2.7", "r1")}

    def test_a_put_changes_what_is_sent_and_nothing_else(self, call, service):
        before = call("GET", "/clients/service").json
        after = call(
            "PUT", "/clients/service",
            {
                "display_name": "Door", "audience": "", "id": "mine", "created_at": "2000-01-01T00:00:00Z",
                "revoked_before": 0, "client_type": "public", "client_secret": "xxxxxxxxxxxxxxxx", "scopes": [],
            },
        ).json
        assert after == before | {"display_name": "Door"}
        changes = {
            "grant_types": ["client_credentials"], "may_introspect": True, "is_first_party": False,
            "access_token_signed_alg": "RS256", "id_token_signed_response_alg": "ES256",
        }
        assert call("PUT", "/clients/service", changes).json == after | changes

    def test_the_switches_for_redirect_uris(self, call, service):
        before = call("GET", "/clients/service").json
        assert (before["allow_http_redirects"], before["allow_short_schemes"]) == (False, False)
        for uri in ("http://nas.lan/cb", "audiobookshelf://oauth"):
            assert "lets a" in call("POST", "/clients/service/redirect-uris", uri).json["errors"]["uri"]
        both = {"allow_http_redirects": True, "allow_short_schemes": True}
        assert call("PUT", "/clients/service", both).json == call("GET", "/clients/service").json == before | both
        for uri in ("http://nas.lan/cb", "audiobookshelf://oauth"):
            assert call("POST", "/clients/service/redirect-uris", uri).status == 201
        refused = call("PUT", "/clients/service", {"allow_http_redirects": False})
        assert (refused.status, refused.json["errors"]) == (
            400, {"allow_http_redirects": "is needed for http://nas.lan/cb: remove that URI first"},
        )
        made = call("POST", "/clients", {"client_id": "native", "client_type": "public", "allow_short_schemes": True})
        assert made.json["allow_short_schemes"] is True and made.json["allow_http_redirects"] is False
        for body in ({"allow_http_redirects": True}, {"allow_short_schemes": 1}, {"allow_short_schemes": None}):
            assert list(call("PUT", "/clients/native", body).json["errors"]) == list(body)

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"client_id": "a b"}, "client_id"), ({"client_id": None}, "client_id"),
            ({"grant_types": ["implicit"]}, "grant_types"),
            ({"access_token_signed_alg": "none"}, "access_token_signed_alg"), ({"audience": "x" * 300}, "audience"),
            ({"is_active": 1}, "is_active"),
        ],
    )
    def test_a_refused_put_names_the_member(self, call, service, body, member):
        answer = call("PUT", "/clients/service", body | {"display_name": "changed"})
        assert (answer.status, list(answer.json["errors"])) == (400, [member]) and call("GET", "/clients/service").json[
            "display_name"
        ] == ""

    def test_a_public_client_stays_one(self, call, public):
        assert [
            call("PUT", "/clients/spa", body).status
            for body in ({"grant_types": ["client_credentials"]}, {"may_introspect": True})
        ] == [400, 400]

    @pytest.mark.parametrize(
        "change, back",
        [
            (
                lambda call: call("PUT", "/clients/service", {"is_active": False}),
                lambda call: call("PUT", "/clients/service", {"is_active": True}),
            ),
            (
                lambda call: call("PUT", "/clients/service", {"audience": "other"}),
                lambda call: call("PUT", "/clients/service", {"audience": "microauthd"}),
            ),
            (
                lambda call: call("PUT", "/clients/service", {"client_id": "renamed"}),
                lambda call: call("PUT", "/clients/renamed", {"client_id": "service"}),
            ),
            (lambda call: call("POST", "/clients/service/revoke"), lambda call: call("GET", "/clients/service")),
            (
                lambda call: call("DELETE", "/clients/service"),
                lambda call: call("POST", "/clients", {"client_id": "service", "client_secret": "sixteen characters"}),
            ),
        ],
        ids=["disable", "audience", "rename", "revoke", "delete"],
    )
    def test_what_it_lost_never_comes_back(self, call, auth, service, log_in, alice, machine, clock, change, back):
        person = log_in(alice)
        assert change(call).status == 200
        assert status_of(auth, machine["access_token"]) == status_of(auth, person["access_token"]) == 401
        clock.pass_(1)
        assert back(call).status == 200
        assert status_of(auth, machine["access_token"]) == status_of(auth, person["access_token"]) == 401
        statuses = [
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": person["refresh_token"]},
                auth=("service", secret),
            ).status
            for secret in (service[1], "sixteen+characters")
        ]
        assert sorted(statuses) == [400, 401], "one of them is its secret, and does not help"

    def test_it_is_deleted_by_id_or_name(self, call, new_client):
        new_client("one"), new_client("two")
        assert [
            call("DELETE", f"/clients/{key}").status for key in (call("GET", "/clients/one").json["id"], "two", "two")
        ] == [200, 200, 404]

    def test_secrets_overlap_are_listed_and_end(self, call, auth, service, clock):
        fresh = call("POST", "/clients/secret", {"client_id": "service", "overlap_seconds": 60}).json["message"]
        SECRETS.add(fresh)
        works = lambda secret: (
            auth.post("/token", {"grant_type": "client_credentials"}, auth=("service", secret)).status
        )  # noqa: E731
        rows = call("GET", "/clients/service/secrets").json
        assert [row["expires_at"] is None for row in rows] == [True, False] and [works(service[1]), works(fresh)] == [
            200, 200,
        ]
        clock.pass_(61)
        assert [works(service[1]), works(fresh)] == [401, 200]
        assert call("DELETE", f"/clients/service/secrets/{rows[0]['id']}").status == 200 and works(fresh) == 401
        assert call("DELETE", f"/clients/service/secrets/{rows[0]['id']}").status == 404


class TestHealth:
    def test_plain_answers(self, admin):
        assert (
            admin.get("/ping").json == {"message": "pong from admin"}
            and admin.get("/version").json["version"] == m.VERSION
        )
        assert admin.get("/health").json == {"status": "ok"} and admin.get("/health/ready").status == 200


class TestLists:
    def test_pages_follow_each_other(self, call, new_user, root):
        for number in range(7):
            new_user(f"user{number}")
        seen, path = [], "/users?limit=3&sort=-username&q=user"
        while path:
            page = call("GET", path)
            assert page.headers["x-total-count"] == "7" and len(page.json) <= 3
            seen += [user["username"] for user in page.json]
            link = re.search(r'<(\?[^>]*)>; rel="next"', page.headers.get("link", ""))
            path = "/users" + link[1] if link else None
        assert seen == [f"user{number}" for number in reversed(range(7))]

    @pytest.mark.parametrize("path", ["/users", "/roles", "/permissions", "/scopes", "/clients"])
    @pytest.mark.parametrize(
        "q", ["%25", "in_users", "%5C", "'", "%22", "%27%20OR%201=1--", "%27%3BDROP%20TABLE%20account%3B--"]
    )
    def test_a_search_is_for_letters(self, call, service, path, q):
        answer = call("GET", f"{path}?q={q}")
        assert answer.status == 200 and answer.json == [] and call("GET", path).status == 200

    @pytest.mark.parametrize(
        "query, member",
        [
            ("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("offset=-1", "offset"),
            ("sort=password_hash", "sort"), ("sort=username;--", "sort"), ("is_active=maybe", "is_active"),
            ("q=" + "x" * 300, "q"),
        ],
    )
    def test_a_bad_query_names_the_member(self, call, query, member):
        answer = call("GET", f"/users?{query}")
        assert (answer.status, list(answer.json["errors"])) == (400, [member])

    def test_what_is_not_known_of_a_query_is_ignored_and_a_repeat_refused(self, call):
        assert call("GET", "/users?page=3&page=4").status == 200
        for query in ("limit=3&limit=4", "limit=3&Limit=3"):
            answer = call("GET", f"/users?{query}")
            assert (answer.status, list(answer.json["errors"])) == (400, ["limit"])

    def test_a_link_keeps_what_is_not_known_and_counts_on_in_any_case(self, call, new_user, root):
        for number in range(3):
            new_user(f"user{number}")
        link = call("GET", "/users?Limit=2&x=1&x=2").headers["link"]
        assert link == '<?x=1&x=2&limit=2&offset=2>; rel="next"'
        assert len(call("GET", "/users" + link[1 : link.index(">")]).json) == 2

    @pytest.mark.parametrize(
        "sort",
        ["username", "-username", "email", "-email", "created_at", "-created_at", "last_login_at", "-last_login_at"],
    )
    def test_every_order_works(self, call, new_user, sort):
        new_user("ann"), new_user("ben")
        names = [user["username"] for user in call("GET", f"/users?sort={sort}&q=n").json]
        assert sorted(names) == ["ann", "ben"] and (
            sort[-8:] != "username" or names == sorted(names, reverse=sort[0] == "-")
        )


class TestRoles:
    def test_their_life(self, call, alice, actions):
        role = call("POST", "/roles", {"name": " Ops ", "description": None}).json
        assert role == {
            "id": role["id"], "name": "Ops", "description": "", "is_protected": False, "is_active": True,
            "is_privileged": False,
        } and actions() == ["role_created"]
        assert (
            call("GET", "/roles/id-by-name/Ops").json == {"result": role["id"]}
            and call("GET", "/roles/ops").status == 404
        ), "names keep their case"
        assert call("PUT", f"/roles/{role['id'].upper()}", {"description": "runs it", "name": ""}).json["name"] == "Ops"
        assert call("PUT", "/roles/Ops", {"name": "MadAdmin"}).status == 409
        assert [
            call("POST", "/roles/assign", {"user_id": alice.id.upper(), "role_id": "Ops"}).status for _ in range(2)
        ] == [200, 200]
        assert call("GET", f"/roles/user/{alice.id}").json == [role["id"]] and call(
            "GET", "/users/alice/roles?all=false"
        ).json == [{"id": role["id"], "name": "Ops"}]
        assert [found["name"] for found in call("GET", "/users/alice/roles?all=true").json] == ["MadAdmin", "Ops"]
        assert [user["username"] for user in call("GET", "/roles/Ops/users").json] == ["alice"]
        assert (
            call("POST", "/roles/unassign", {"user_id": "alice", "role_id": "Ops"}).status == 200
            and call("POST", "/roles/unassign", {"user_id": "alice", "role_id": "Ops"}).status == 404
        )
        assert (
            call("DELETE", "/roles/Ops").status == 200
            and call("DELETE", "/roles/Ops").status == 404
            and actions() == ["delete_role"]
        )

    @pytest.mark.parametrize(
        "name",
        [
            "madadmin", "MADADMIN", "Mad Admin", "mad-admin", "Mad_Admin", "mad.admin", "Mad/Admin", "MadAdm\u0131n",
            "M\u0430dAdmin", "\u039cadAdmin", "\u041c\u0410DAdmin", "MadAdmi\u0578", "MADADMI\u039d", "MadAdmln", "MadAdm1n",
            "M@dAdmin", "MadA\u0501min", "MadAdrnin", "MadAdm\u0130n",
            "M\u00e1dAdmin", "'MadAdmin'", "\u13b7adAdmin", "MadAdm|n",
        ],
    )
    def test_a_name_that_could_be_mistaken_for_mad_admin_is_refused_at_creation_and_change(self, call, name):
        call("POST", "/roles", {"name": "Ops"})
        for answer in (call("POST", "/roles", {"name": name}), call("PUT", "/roles/Ops", {"name": name})):
            assert answer.status == 400 and list(answer.json["errors"]) == ["name"]
        assert {role["name"] for role in call("GET", "/roles").json} == {"MadAdmin", "Ops"}
        for same in ("MadAdmin", "\uff2d\uff41\uff44Admin", " MadAdmin "):
            assert call("POST", "/roles", {"name": same}).status == 409

    @pytest.mark.parametrize(
        "name",
        [
            "Admin", "MadHatter", "Administrator", "admin", "Mad", "MadAdmins", "MadAdmin2", "Mad Administrator",
            "MadAdmin (read only)", "Madman", "\u0430\u0434\u043c\u0438\u043d", "\u7ba1\u7406\u54e1", "!",
        ],
    )
    def test_any_other_name_is_let_in(self, call, name):
        role = call("POST", "/roles", {"name": name}).json
        assert role["name"] == name
        assert call("PUT", f"/roles/{role['id']}", {"name": name, "description": "x"}).status == 200

    def test_a_role_of_before_that_could_be_mistaken_for_mad_admin_keeps_its_name(self, idp, call):
        idp.store.add_role("0b9d6d7e-7f0d-4f0e-8f5c-3b1e0f3d9a11", "madadmin", "", False, idp.now())
        assert call("PUT", "/roles/madadmin", {"name": "madadmin", "description": "x"}).status == 200
        assert call("PUT", "/roles/madadmin", {"name": "Reader"}).json["name"] == "Reader"

    @pytest.mark.parametrize(
        "method, body", [("PUT", {"name": "Root"}), ("PUT", {"description": "mine"}), ("DELETE", None)]
    )
    def test_madadmin_is_protected_by_its_id(self, call, method, body):
        for key in (MAD_ADMIN_ROLE_ID, MAD_ADMIN_ROLE_ID.upper(), "MadAdmin"):
            assert call(method, f"/roles/{key}", body).json["error"] == "protected"

    def test_what_the_caller_says_of_protection_does_nothing(self, call):
        assert (
            call("POST", "/roles", {"name": "x", "is_protected": True, "is_active": False, "id": "x"}).json[
                "is_protected"
            ]
            is False
        )
        assert call("PUT", "/roles/x", {"is_protected": True, "is_active": False}).json == {
            **call("GET", "/roles/x").json, "is_protected": False, "is_active": True,
        }
        assert call("DELETE", "/roles/x").status == 200

    @pytest.mark.parametrize(
        "take",
        [
            lambda call: call("POST", "/roles/unassign", {"user_id": "alice", "role_id": "ops"}),
            lambda call: call("DELETE", "/roles/ops"), lambda call: call("PUT", "/users/alice/roles", []),
        ],
    )
    def test_a_lost_role_ends_what_names_it(self, call, auth, log_in, alice, take):
        call("POST", "/roles", {"name": "ops"})
        call("POST", "/roles/assign", {"user_id": "alice", "role_id": "ops"})
        token = log_in(alice)["access_token"]
        assert auth.get("/me", bearer=token).json["role_names"] == ["ops"]
        assert (
            take(call).status == 200
            and status_of(auth, token) == 401
            and auth.get("/me", bearer=log_in(alice)["access_token"]).json["role_names"] == []
        )

    def test_the_roles_of_a_user_are_replaced_all_or_none(self, call, alice):
        ids = [call("POST", "/roles", {"name": name}).json["id"] for name in ("a", "b", "c")]
        assert (
            call("PUT", "/users/alice/roles", [{"id": ids[0]}, {"id": ids[1], "name": "ignored"}, {"id": ""}]).status
            == 200
        )
        assert (
            call("PUT", "/users/alice/roles", {"user_id": alice.id, "roles": [{"id": ids[1]}, {"id": ids[2]}]}).status
            == 200
        )
        assert [role["name"] for role in call("GET", "/users/alice/roles?all=false").json] == ["b", "c"]
        assert call("PUT", "/users/alice/roles", [{"id": ids[0]}, {"id": "nonsense"}]).status == 404
        assert [role["name"] for role in call("GET", "/users/alice/roles?all=false").json] == ["b", "c"]

    @pytest.mark.parametrize(
        "body, member",
        [
            ({"name": ""}, "name"), ({"name": "  "}, "name"), ({}, "name"), ({"name": MAD_ADMIN_ROLE_ID}, "name"),
            ({"name": "x" * 256}, "name"), ({"name": "a\x00b"}, "name"),
            ({"name": "x", "description": "x" * 256}, "description"),
        ],
    )
    def test_a_bad_one_is_refused(self, call, body, member):
        for path in ("/roles",) if "description" in body else ("/roles", "/permissions"):
            answer = call("POST", path, body)
            assert (answer.status, list(answer.json["errors"])) == (400, [member])


class TestPermissions:
    def test_their_life(self, call, alice, actions):
        permission = call("POST", "/permissions", {"name": " door.open "}).json
        assert (
            permission == {"id": permission["id"], "name": "door.open"}
            and call("POST", "/permissions", {"name": "door.open"}).status == 409
        )
        call("POST", "/roles", {"name": "ops"})
        assert call(
            "POST", "/roles/ops/permissions", {"permission_id": permission["id"]}
        ).status == 200 and actions() == ["assigned_permission"]
        assert (
            call("GET", "/roles/ops/permissions").json
            == call("GET", "/permissions/retrieve/ops").json
            == call("GET", "/permissions/retrieve/all").json
            == [permission]
        )
        assert [role["name"] for role in call("GET", f"/permissions/{permission['id']}/roles").json] == [
            "ops"
        ] and call("GET", "/permissions/user/alice").json == []
        call("POST", "/roles/assign", {"user_id": "alice", "role_id": "ops"})
        assert call("GET", "/permissions/user/alice").json == [permission]
        assert call("PUT", "/permissions/door.open", {"name": "gate.open"}).json["name"] == "gate.open" and call(
            "GET", "/permissions/id-by-name/gate.open"
        ).json == {"result": permission["id"]}
        assert (
            call("DELETE", "/roles/ops/permissions/gate.open").status == 200
            and call("DELETE", "/roles/ops/permissions/gate.open").status == 404
        )
        assert (
            call("POST", "/permissions/assign", {"role_id": "ops", "permission_id": "gate.open"}).status == 200
            and call("POST", "/permissions/remove", {"role_id": "ops", "permission_id": "gate.open"}).status == 200
        )
        assert (
            call("DELETE", "/permissions/gate.open").status == 200
            and call("GET", "/permissions/gate.open").status == 404
        )

    def test_access_hangs_on_user_role_and_permission(self, call, alice):
        permission = call("POST", "/permissions", {"name": "door.open"}).json["id"]
        call("POST", "/roles", {"name": "ops"})
        ask = {"user_id": alice.id, "permission_id": permission}
        assert call("POST", "/check-access", ask).json == {
            "access": False, "user_id": alice.id, "permission_id": permission, "allowed": False,
        }
        call("POST", "/roles/ops/permissions", {"permission_id": "door.open"})
        call("POST", "/roles/assign", {"user_id": "alice", "role_id": "ops"})
        assert call("POST", "/check-access", ask).json["allowed"] is True
        for body in ({"permission": "door.open"}, {"scope": "api:read"}):
            assert call("POST", "/check-access", {"user_id": "alice"} | body).json == {"access": True}, "booleans only"
        for body in (
            {"user_id": "nobody", "permission_id": permission}, {"user_id": alice.id, "permission_id": "nonsense"},
            {"user_id": alice.id, "permission": "nonsense"}, {"user_id": alice.id, "scope": "api:secret"},
        ):
            assert call("POST", "/check-access", body).json["access"] is False
        call("POST", "/users/deactivate/alice")
        assert call("POST", "/check-access", ask).json["allowed"] is False
        assert [
            list(call("POST", "/check-access", body).json["errors"])
            for body in (
                {"user_id": " ", "permission_id": permission}, {"user_id": alice.id}, {"permission_id": permission},
            )
        ] == [["user_id"], ["permission_id"], ["user_id"]]


class TestScopes:
    def test_their_life(self, call, auth, service, alice):
        scope = call("POST", "/scopes", {"name": "door:open", "description": "Open doors."}).json
        assert (
            scope["desc"] == scope["description"] == "Open doors."
            and scope["is_active"] is True
            and scope["is_protected"] is False
        )
        assert (
            call("PUT", "/scopes/door:open", {"description": "x"}).json["desc"] == "x"
            and call("PUT", "/scopes/door:open", {"name": "gate:open"}).json["desc"] == "x"
        )
        for body in ({"user_id": "alice", "scope_id": scope["id"]}, {"client_id": "service", "scope_id": "gate:open"}):
            kind = next(iter(body)).removesuffix("_id")
            assert call("POST", f"/scopes/assign-to-{kind}", body).status == 200
            assert "gate:open" in [found["name"] for found in call("GET", f"/scopes/{kind}/{body[kind + '_id']}").json]
        assert [user["username"] for user in call("GET", "/scopes/gate:open/users").json] == ["alice"] and [
            client["client_id"] for client in call("GET", "/scopes/gate:open/clients").json
        ] == ["service"]
        assert "gate:open" in auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["scope"]
        assert (
            call("DELETE", "/users/alice/scopes/gate:open").status == 200
            and call("DELETE", "/users/alice/scopes/gate:open").status == 404
        )
        assert (
            call("POST", "/scopes/remove-from-client", {"client_id": "service", "scope_id": "gate:open"}).status == 200
            and call("DELETE", "/clients/service/scopes/gate:open").status == 404
        )
        assert call("DELETE", "/scopes/gate:open").status == 200 and call("GET", "/scopes/gate:open").status == 404

    @pytest.mark.parametrize("id, name", [(id, name) for id, name, _ in SEEDED_SCOPES])
    def test_the_seeded_ones_keep_their_name_and_stay(self, call, id, name):
        assert (
            call("PUT", f"/scopes/{id}", {"name": "mine"}).json["error"]
            == call("DELETE", f"/scopes/{name}").json["error"]
            == "protected"
        )
        assert call("PUT", f"/scopes/{id}", {"desc": "Said anew.", "name": name}).json["desc"] == "Said anew."

    def test_a_deleted_scope_is_in_no_new_token(self, call, auth, service):
        call("DELETE", "/scopes/api:read")
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["scope"] == "api:write"

    @pytest.mark.parametrize(
        "body",
        [
            {"scope_id": "api:read"}, {"scope_id": "api:read", "user_id": "alice", "client_id": "service"},
            {"scope_id": "nonsense", "user_id": "alice"},
        ],
    )
    def test_who_is_meant_must_be_clear(self, call, alice, service, body):
        assert call("POST", "/scopes/assign-to-user", body).status == 400


class TestUris:
    @pytest.mark.parametrize(
        "path, uri",
        [
            ("redirect-uris", "https://app.example/cb"), ("post-logout-redirect-uris", "https://app.example/bye"),
            ("cors-origins", "https://app.example"),
        ],
    )
    def test_their_life(self, call, public, path, uri):
        made = call("POST", f"/clients/spa/{path}", uri)
        assert (
            made.status == 201
            and made.json["uri"] == uri
            and made.json["client_id"] == call("GET", "/clients/spa").json["id"]
        )
        assert ("redirect_uri" in made.json) is (path == "redirect-uris") and call(
            "POST", f"/clients/spa/{path}", {"uri": uri}
        ).status == 409
        assert call("GET", f"/clients/spa/{path}").json == [made.json]
        refused = call("POST", f"/clients/spa/{path}", "javascript:alert(1)")
        assert (refused.status, list(refused.json["errors"])) == (400, ["uri"])
        assert (
            call("DELETE", f"/clients/spa/{path}/{made.json['id']}").status == 200
            and call("DELETE", f"/clients/spa/{path}/{made.json['id']}").status == 404
        )

    def test_a_redirect_uri_is_deleted_by_its_record_as_the_published_clients_do(self, call, service):
        ids = [
            call("POST", "/clients/service/redirect-uris", uri).json["id"]
            for uri in ("https://a.example/", "https://b.example/")
        ]
        assert (
            call("DELETE", "/clients/redirect-uris", ids[0]).status == 200
            and call("DELETE", f"/clients/redirect-uris/{ids[1]}").status == 200
        )
        assert (
            call("GET", "/clients/service/redirect-uris").json == []
            and call("DELETE", "/clients/redirect-uris", ids[0]).status == 404
        )


class TestFlags:
    def test_in_every_spelling_of_the_published_clients(self, admin, admin_token, call, service):
        id = call("GET", "/clients/service").json["id"]
        spellings = [
            lambda on: admin(
                "POST", "/client/options/enable_totp", {"client_id": id, "enabled": "True" if on else "FALSE"},
                bearer=admin_token,
            ),
            lambda on: call("POST", f"/client/options/ENABLE_TOTP?client_id={id}", {"is_enabled": on}),
            lambda on: call("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": on}),
        ]
        for say in spellings:
            for on in (True, False):
                assert say(on).json["success"] is True
                assert call("GET", f"/client/options/ENABLE_TOTP?client_id={id}").json == {
                    "success": True, "message": str(on),
                }

    def test_options(self, admin, admin_token, call, auth, service):
        assert (
            admin(
                "POST", "/client/options/TOKEN_EXPIRATION/ext", {"client_id": "service", "options": "60"},
                bearer=admin_token,
            ).json["success"]
            is True
        )
        assert (
            call("GET", "/client/options/token_expiration/ext?client_id=service").json["message"] == "60"
            and auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["expires_in"] == 60
        )
        assert (
            call("POST", "/client/options/TOKEN_EXPIRATION", {"client_id": "service", "enabled": False}).status == 200
        )
        assert call("GET", "/clients/service/options").json["TOKEN_EXPIRATION"] == {
            "is_enabled": False, "options": "60",
        }, "switching a flag keeps its option"
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["expires_in"] == 3600
        assert set(call("GET", "/clients/service/options").json) == set(m.FLAGS)

    @pytest.mark.parametrize(
        "path, body, member",
        [
            ("NONSENSE", {"client_id": "service", "enabled": True}, "flag"),
            ("ENABLE_TOTP", {"client_id": "", "enabled": True}, "client_id"),
            ("ENABLE_TOTP", {"client_id": "service"}, "enabled"),
            ("ENABLE_TOTP", {"client_id": "service", "enabled": "perhaps"}, "enabled"),
            ("ENABLE_TOTP/ext", {"client_id": "service", "options": "x"}, "flag"),
            ("TOKEN_EXPIRATION/ext", {"client_id": "service", "options": "soon"}, "options"),
            ("TOKEN_EXPIRATION/ext", {"client_id": "service", "options": "0"}, "options"),
            ("TOTP_ISSUER/ext", {"client_id": "service", "options": "a\nb"}, "options"),
        ],
    )
    def test_what_is_refused_names_the_member(self, call, service, path, body, member):
        answer = call("POST", f"/client/options/{path}", body)
        assert (answer.status, list(answer.json["errors"])) == (400, [member])
        assert call("POST", "/client/options/ENABLE_TOTP", {"client_id": "nobody", "enabled": True}).status == 404


class TestExternalIdps:
    def test_their_life(self, call, service):
        wanted = {
            "provider_key": " Google ", "display_name": "Google", "issuer": "https://accounts.google.com",
            "client_identifier": "abc",
        }
        made = call("POST", "/clients/service/idp", wanted)
        assert (
            made.status == 201
            and made.json["provider_key"] == "google"
            and made.json["scopes"] == "openid email profile"
        )
        assert call("POST", "/admin/clients/service/idp", wanted).status == 409 and call(
            "GET", "/clients/service/idp"
        ).json == call("GET", "/admin/clients/service/idp").json == [made.json]
        changed = call(
            "PUT", f"/clients/service/idp/{made.json['id']}",
            wanted
            | {
                "provider_key": "GOOGLE", "issuer": "https://other.example", "id": "x", "client_id": "x",
                "created_at": "x",
            },
        )
        assert (
            changed.status == 200
            and changed.json
            == made.json | {"issuer": "https://other.example", "modified_at": changed.json["modified_at"]}
            == call("GET", f"/clients/service/idp/{made.json['id']}").json
        )
        assert (
            call("PUT", "/clients/service/idp/nonsense", wanted).status == 404
            and call("DELETE", f"/clients/service/idp/{made.json['id']}").status == 200
            and call("DELETE", f"/clients/service/idp/{made.json['id']}").status == 404
        )

    def test_one_of_another_client_is_not_there(self, call, service, public):
        made = call("POST", "/clients/service/idp", {"provider_key": "x"}).json["id"]
        assert [
            call(method, f"/clients/spa/idp/{made}", {"provider_key": "y"} if method == "PUT" else None).status
            for method in ("GET", "PUT", "DELETE")
        ] == [404, 404, 404]

    @pytest.mark.parametrize(
        "wanted, member",
        [
            ({"provider_key": " "}, "provider_key"), ({}, "provider_key"), ({"provider_key": "a b"}, "provider_key"),
            ({"provider_key": "x", "issuer": "javascript:x"}, "issuer"),
            ({"provider_key": "x", "scopes": None}, "scopes"),
        ],
    )
    def test_a_bad_one_is_refused(self, call, service, wanted, member):
        answer = call("POST", "/clients/service/idp", wanted)
        assert (answer.status, list(answer.json["errors"])) == (400, [member])


class TestTotp:
    def test_it_is_shown_once_and_counts_from_its_first_code(self, idp, call, auth, service, alice, clock):
        made = call("POST", "/users/alice/totp/enroll", {}).json
        SECRETS.update({made["secret"], made["otpauth_uri"]})
        assert (
            made["otpauth_uri"].startswith("otpauth://totp/idp.example:alice?secret=" + made["secret"])
            and made["svg"].startswith("<?xml")
            and "</svg>" in made["svg"]
        )
        assert made["secret"] not in str(idp.store.find_account(alice.id)), (
            "sealed even where the file is not encrypted"
        )
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert (
            call("GET", "/users/alice").json["totp_enabled"] is False
            and auth.post("/token", login, auth=service).status == 200
        )
        code = pyotp.TOTP(made["secret"]).at(idp.now())
        assert (
            call("POST", "/users/alice/totp/verify", {"code": "000000"}).status == 403
            and call("POST", "/users/alice/totp/verify", {"code": f"{code[:3]} {code[3:]}"}).status == 200
        )
        assert (
            call("GET", "/users/alice").json["totp_enabled"] is True
            and auth.post("/token", login, auth=service).status == 403
        )
        assert auth.post("/token", login | {"totp": code}, auth=service).status == 403, "the first code is spent"
        clock.pass_(30)
        assert (
            auth.post("/token", login | {"totp": pyotp.TOTP(made["secret"]).at(idp.now())}, auth=service).status == 200
        )

    def test_a_new_one_replaces_the_old_only_when_it_is_confirmed(
        self, idp, call, auth, service, alice, give_totp, clock
    ):
        old = give_totp(idp, idp.store.find_account(alice.id))
        new = call("POST", "/users/alice/totp/enroll", {}).json["secret"]
        SECRETS.add(new)
        clock.pass_(60)
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert auth.post("/token", login | {"totp": pyotp.TOTP(old).at(idp.now())}, auth=service).status == 200
        clock.pass_(60)
        assert (
            call("POST", "/users/totp/verify", {"user_id": "alice", "code": pyotp.TOTP(new).at(idp.now())}).status
            == 200
        )
        clock.pass_(60)
        assert [
            auth.post("/token", login | {"totp": pyotp.TOTP(seed).at(idp.now())}, auth=service).status
            for seed in (old, new)
        ] == [403, 200]

    def test_guesses_are_counted(self, call, idp, alice, clock):
        seed = call("POST", "/users/alice/totp/enroll", {}).json["secret"]
        SECRETS.add(seed)
        for _ in range(m.TOTP_TRIES):
            assert call("POST", "/users/alice/totp/verify", {"code": "000000"}).status == 403
        assert call("POST", "/users/alice/totp/verify", {"code": pyotp.TOTP(seed).at(idp.now())}).status == 403
        call("POST", "/users/alice/clear-lockout")
        assert call("POST", "/users/alice/totp/verify", {"code": pyotp.TOTP(seed).at(idp.now())}).status == 200

    def test_the_client_names_the_issuer_and_must_demand_a_second_factor(self, call, alice, service):
        assert list(call("POST", "/users/alice/totp/enroll", {"client_id": "service"}).json["errors"]) == ["client_id"]
        call("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": True})
        call("PUT", "/clients/service", {"display_name": "A service"})
        made = call("POST", "/users/alice/totp/enroll", {"client_id": "service"}).json
        SECRETS.update({made["secret"], made["otpauth_uri"]})
        assert pyotp.parse_uri(made["otpauth_uri"]).issuer == "idp.example", "one box has one name"
        call("POST", "/client/options/TOTP_ISSUER/ext", {"client_id": "service", "options": "Böx: & Co"})
        made = call("POST", "/users/alice/totp/enroll", {"client_id": "service"}).json
        SECRETS.add(made["secret"])
        assert (
            pyotp.parse_uri(made["otpauth_uri"]).issuer == "Böx & Co"
            and pyotp.parse_uri(made["otpauth_uri"]).name == "alice"
        )

    def test_a_change_of_it_by_an_administrator_ends_what_the_user_has(self, idp, call, auth, service, alice, clock):
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        session = m.begin_browser_session(idp, m.LOCAL, idp.store.find_account(alice.id), ["pwd"], idp.now(), None)
        token = auth.post("/token", login, auth=service).json["access_token"]
        clock.pass_(1)
        seed = call("POST", "/users/alice/totp/enroll", {}).json["secret"]
        assert auth.get("/me", bearer=token).status == 200, "not yet confirmed"
        call("POST", "/users/alice/totp/verify", {"code": pyotp.TOTP(seed).at(idp.now())})
        assert auth.get("/me", bearer=token).status == 401 and m.find_browser_session(idp, session) is None
        clock.pass_(30)
        code = pyotp.TOTP(seed).at(idp.now())
        token = auth.post("/token", login | {"totp": code}, auth=service).json["access_token"]
        clock.pass_(1)
        assert call("POST", "/users/alice/disable-totp").status == 200
        assert auth.get("/me", bearer=token).status == 401

    @pytest.mark.parametrize("path", ["/users/alice/disable-totp", "/users/alice/service/disable-totp"])
    def test_it_is_taken_away(self, idp, call, alice, service, give_totp, path):
        call("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": True})
        assert call("POST", path).status == 404
        give_totp(idp, idp.store.find_account(alice.id))
        assert call("POST", path).status == 200 and call("GET", "/users/alice").json["totp_enabled"] is False

    @pytest.fixture
    def filed(self, make_idp, root, alice, tmp_path):
        folder = tmp_path / "qr"
        folder.mkdir()
        idp = make_idp(Options(**CHEAP, admin_domain="localhost", totp_qr_output_root=str(folder)))
        admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp))
        token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]

        def generate(body):
            return admin("POST", "/users/alice/totp/generate", bearer=token, json_body=body)

        generate.idp = idp
        return folder, generate

    @pytest.mark.parametrize("path", [".", "a/b", "a//b/.", "{root}/c", "a/../d"])
    def test_the_qr_code_is_a_private_file_below_the_root(self, filed, path):
        folder, generate = filed
        made = generate({"qr_output_path": path.format(root=folder)}).json
        (file,) = folder.rglob("*.svg")
        assert made == {"success": True, "filename": file.name, "qr_code_filename": file.name} and re.fullmatch(
            r"totp_qr_[0-9a-f]{12}\.svg", file.name
        )
        assert file.stat().st_mode & 0o777 == 0o600 and "<svg" in file.read_text()

    ENDS = {  # noqa: RUF012
        "confirmed": lambda idp, alice, seed: m.confirm_totp(idp, m.LOCAL, alice, pyotp.TOTP(seed).at(idp.now())),
        "enrolled again": lambda idp, alice, seed: m.begin_totp(idp, m.LOCAL, alice),
        "disabled": lambda idp, alice, seed: m.disable_totp(idp, m.LOCAL, alice),
        "deleted": lambda idp, alice, seed: m.delete_user(idp, m.LOCAL, alice.id),
    }

    @pytest.mark.parametrize("end", ENDS)
    def test_the_file_goes_when_its_seed_has_served_or_is_void(self, filed, alice, new_user, end):
        folder, generate = filed
        assert generate({"qr_output_path": "x"}).status == generate({"qr_output_path": "a/b"}).status == 200
        idp, (file,) = generate.idp, folder.rglob("*.svg")
        assert file.parent == folder / "a" / "b", "the first seed was replaced"
        m.begin_totp(idp, m.LOCAL, new_user("bob"))
        with pytest.raises(m.Problem):
            m.confirm_totp(idp, m.LOCAL, idp.store.find_account(alice.id), "nonsense")
        assert file.exists(), "a wrong code, and what others do, leaves it"
        account = idp.store.find_account(alice.id)
        self.ENDS[end](idp, account, idp.seal.open(account.totp_pending_sealed, account.id))
        assert list(folder.rglob("*.svg")) == idp.store.values("SELECT path FROM totp_qr_file") == []

    def test_a_file_that_cannot_be_removed_is_tried_again_and_no_link_is_followed(self, filed, alice, tmp_path):
        folder, generate = filed
        generate({"qr_output_path": "a"})
        idp, (file,) = generate.idp, folder.rglob("*.svg")
        (folder / "a").rename(tmp_path / "outside")
        (folder / "a").symlink_to(tmp_path / "outside")
        m.disable_totp(idp, m.LOCAL, idp.store.find_account(alice.id))
        assert (tmp_path / "outside" / file.name).exists()
        (folder / "a").unlink()
        (tmp_path / "outside").rename(folder / "a")
        m.remove_qr_files(idp)
        assert not file.exists() and idp.store.list_due_qr_files() == []

    def test_there_is_none_of_an_inactive_user(self, filed, idp, alice):
        folder, generate = filed
        m.set_user_active(idp, m.LOCAL.acting_as("test"), alice.id, False)
        assert generate({"qr_output_path": "."}).status == 404 and list(folder.iterdir()) == []
        assert idp.store.find_account(alice.id).totp_pending_sealed == ""

    def test_a_name_too_long_for_a_folder_is_the_callers_fault(self, filed):
        folder, generate = filed
        answer = generate({"qr_output_path": "a" * 300})
        assert (answer.status, list(answer.json["errors"])) == (400, ["qr_output_path"]) and list(
            folder.iterdir()
        ) == []

    @pytest.mark.parametrize(
        "path",
        ["..", "../x", "a/../../x", "/etc", "/", "", " ", "link", "link/x", "{root}x", "{root}/../x", "a\x00b", "file"],
    )
    def test_no_path_leaves_the_root(self, filed, tmp_path, path):
        folder, generate = filed
        (tmp_path / "outside").mkdir()
        (folder / "link").symlink_to(tmp_path / "outside")
        (folder / "file").write_text("x")
        answer = generate({"qr_output_path": path.format(root=folder)})
        assert (answer.status, list(answer.json["errors"])) == (400, ["qr_output_path"])
        assert list(tmp_path.rglob("*.svg")) == []

    def test_without_a_root_it_says_so_and_makes_nothing(self, call, idp, alice):
        assert (
            call("POST", "/users/alice/totp/generate", {}).status == 503
            and idp.store.find_account(alice.id).totp_pending_sealed == ""
        )


class TestTakenNames:
    """RFC 9110 §15.5.10"""

    @pytest.mark.parametrize(
        "path, name",
        [
            ("users", "username"), ("roles", "name"), ("permissions", "name"), ("scopes", "name"),
            ("clients", "client_id"),
        ],
    )
    def test_a_name_that_is_taken_is_a_conflict_with_and_without_if_match(self, call, path, name):
        one, other = [
            call("POST", f"/{path}", {name: word, "email": f"{word}@example.org", "password": OTHER})
            for word in ("one", "other")
        ]
        assert {one.status, other.status} <= {200, 201}
        before = call("GET", f"/{path}/{one.json['id']}")
        for headers in ((), [("If-Match", before.headers["etag"])]):
            answer = call("PUT", f"/{path}/{one.json['id']}", {name: "other"}, headers=headers)
            assert (answer.status, answer.json["error"]) == (409, "conflict")
        assert call("GET", f"/{path}/{one.json['id']}").json == before.json


class TestSessions:
    def test_they_are_listed_with_what_the_published_clients_read(self, call, log_in, alice, machine, idp):
        jti = log_in(alice)["jti"]
        idp.store.flush()
        rows = call("GET", "/sessions").json
        assert (
            jti in [row["id"] for row in rows]
            and {row["mad_use"] for row in rows} == {"admin", "auth"}
            and len(rows) == 3
        )
        row = call("GET", f"/sessions/{jti.upper()}").json
        assert (
            row["username"] == "alice"
            and row["client_id"] == row["client_identifier"] == "service"
            and row["created_at"] == row["issued_at"]
            and row["is_revoked"] is False
        )
        assert [found["id"] for found in call("GET", f"/sessions/user/{alice.id}").json] == [
            found["id"] for found in call("GET", "/sessions?user_id=alice").json
        ] == [jti] and call("GET", "/sessions/user/nobody").json == []
        assert {found["username"] for found in call("GET", "/sessions?client_id=service").json} == {
            "alice", "",
        } and call("GET", "/sessions/nonsense").status == 404

    def test_one_is_ended_with_its_login(self, call, auth, service, log_in, alice, actions):
        one, other = log_in(alice), log_in(alice)
        assert call("DELETE", f"/sessions/{one['jti']}").json == {
            "jti": one["jti"], "status": "revoked", "message": "Session revoked.",
        } and actions() == ["session_revoked"]
        assert status_of(auth, one["access_token"]) == 401 and status_of(auth, other["access_token"]) == 200
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": one["refresh_token"]}, auth=service
            ).status
            == 400
        )
        assert call("GET", f"/sessions/{one['jti']}").json["is_revoked"] is True and [
            call("DELETE", f"/sessions/{jti}").status for jti in (one["jti"], "nonsense")
        ] == [400, 404]

    def test_a_machine_token_just_issued_is_found_and_ended(self, call, auth, machine):
        assert (
            call("DELETE", f"/sessions/{machine['jti']}").status == 200
            and status_of(auth, machine["access_token"]) == 401
        )

    def test_an_admin_session_ends_its_token(self, call, admin_token):
        jti = next(row["id"] for row in call("GET", "/sessions").json if row["mad_use"] == "admin")
        assert call("DELETE", f"/sessions/{jti}").status == 200 and call("GET", "/users").status == 401

    @pytest.mark.parametrize("how", ["form", "json"])
    def test_any_token_is_revoked(self, admin, admin_token, call, auth, service, log_in, alice, machine, how):
        def revoke(token):
            return (
                call("POST", "/revoke", {"token": token})
                if how == "json"
                else admin.post("/revoke", {"token": token}, bearer=admin_token)
            )

        person = log_in(alice)
        assert revoke(machine["access_token"]).status == 200 and status_of(auth, machine["access_token"]) == 401
        assert revoke(person["refresh_token"]).status == 200 and status_of(auth, person["access_token"]) == 401
        for token in ("nonsense", "", "a.b.c", person["id_token"] if "id_token" in person else "x"):
            assert (revoke(token).status, list(revoke(token).json["errors"])) == (400, ["token"])

    @pytest.mark.parametrize("how", ["form", "json"])
    def test_introspection_tells_an_administrator_of_expired_tokens_too(
        self, admin, admin_token, call, machine, clock, root, how
    ):
        def ask(token, bearer=admin_token):
            return admin(
                "POST", "/introspect", {"token": token} if how == "form" else None, bearer=bearer,
                json_body={"token": token} if how == "json" else None,
            )

        told = ask(machine["access_token"]).json
        assert (
            told["valid"] is True
            and told["expired"] is False
            and told["active"] is True
            and told["sub"] == "service"
            and isinstance(told["exp"], int)
        )
        assert ask(admin_token).json["kind"] == "admin" and ask("nonsense").status == 400
        call("POST", "/revoke", {"token": machine["access_token"]})
        assert ask(machine["access_token"]).json["active"] is False
        clock.pass_(3600)
        fresh = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        assert ask(machine["access_token"], fresh).json["expired"] is True

    def test_refresh_tokens(self, call, auth, service, log_in, alice):
        answer = log_in(alice)
        (row,) = call("GET", "/refresh-tokens").json
        assert (
            row == call("GET", f"/refresh-tokens/{row['id']}").json == call("GET", "/refresh-tokens/user/alice").json[0]
            and row["username"] == "alice"
            and row["client_identifier"] == "service"
            and answer["refresh_token"] not in str(row)
        )
        assert (
            call("DELETE", f"/refresh-tokens/{row['id']}").status == 200
            and status_of(auth, answer["access_token"]) == 401
        )
        assert (
            call("GET", f"/refresh-tokens/{row['id']}").json["is_revoked"] is True
            and call("DELETE", "/refresh-tokens/nonsense").status == 404
        )

    def test_a_purge_deletes_what_is_over_and_nothing_that_lives(
        self, idp, call, admin, auth, service, log_in, alice, clock
    ):
        old = log_in(alice)
        clock.pass_(4000)
        young = log_in(alice)
        fresh = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        call = lambda body, path="/sessions/purge": admin("POST", path, bearer=fresh, json_body=body).json["message"]  # noqa: E731
        assert (
            call({"purge_expired": False})
            == call({})
            == call({"older_than_seconds": 0, "user_id": "root", "client_id": "service"})
            == "0 rows purged."
        )
        assert call({"older_than_seconds": 0, "purge_expired": False, "purge_revoked": True}) == "0 rows purged."
        assert (
            call({"older_than_seconds": 0, "user_id": "alice", "client_id": None}) == "1 rows purged."
            and idp.store.find_session(old["jti"]) is None
        )
        assert (
            status_of(auth, young["access_token"]) == 200
            and auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": old["refresh_token"]}, auth=service
            ).status
            == 200
        )
        assert call({"older_than_seconds": 0}, "/refresh-tokens/purge") == "0 rows purged.", (
            "none before it expired: a used one that comes back must be known"
        )
        assert call({"older_than_seconds": 0}, "/tokens/purge").endswith("rows purged.")
        row = next(
            row for row in idp.store.list_audit(limit=20) if row.action == "sessions_purged" and row.target == alice.id
        )
        assert row.secondary == "purged=1;expired=true;revoked=false"

    @pytest.mark.parametrize("path, left", [("/sessions/purge", 1), ("/tokens/purge", 0), ("/refresh-tokens/purge", 0)])
    def test_a_purge_of_sessions_leaves_refresh_tokens(self, idp, admin, root, log_in, alice, clock, path, left):
        answer = log_in(alice)
        clock.pass_(3 * 86400 + 1)
        token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        assert admin("POST", path, bearer=token, json_body={"older_than_seconds": 0}).status == 200
        assert bool(idp.store.find_refresh_token(m.refresh_token_sha256(answer["refresh_token"]))) is bool(left)
        assert bool(idp.store.find_session(answer["jti"])) is (path == "/refresh-tokens/purge")

    @pytest.mark.parametrize("body", [{"older_than_seconds": -1}, {"older_than_seconds": "x"}, {"purge_expired": 1}])
    def test_a_bad_purge_is_refused(self, call, body):
        assert call("POST", "/sessions/purge", body).status == 400


class TestAudit:
    def test_rows_tell_who_what_and_whether(self, call, auth, service, alice, root):
        auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": "wrong password"}, auth=service,
            headers=[("User-Agent", "curl\x1b[31m")],
        )
        auth.post("/token", {"grant_type": "client_credentials", "scope": "nonsense"}, auth=service)
        auth.post("/token", {"grant_type": "client_credentials"}, auth=("service", "wrong"))
        call("POST", "/roles", {"name": "ops"})
        rows = {row["action"]: row for row in call("GET", "/audit-logs?limit=20").json}
        assert [
            rows[action]["result"]
            for action in ("user_login_failed", "token_refused", "client_authentication_failed", "role_created")
        ] == ["failure", "failure", "failure", "success"]
        assert (
            rows["token_refused"]["secondary"] == "grant_type=client_credentials error=invalid_scope"
            and "\x1b" not in rows["user_login_failed"]["user_agent"]
        )
        row = rows["role_created"]
        assert (
            row["actor_id"] == row["user_id"] == root.id
            and row["ip_address"] == row["ip"] == "192.0.2.7"
            and row["request_id"] == "r1"
            and row["target"] == "ops"
            and row["timestamp"].endswith("Z")
        )
        assert (
            call("GET", f"/audit-logs/{row['id']}").json == row
            and [call("GET", f"/audit-logs/{id}").status for id in ("0", "x", "99999999", "-1")] == [404] * 4
        )

    def test_filters(self, call, root, alice, clock):
        for name in ("a", "b", "c"):
            call("POST", "/roles", {"name": name})
            clock.pass_(100)
        names = lambda query: [row["target"] for row in call("GET", f"/audit-logs?{query}").json]  # noqa: E731
        assert (
            names("action=role_created") == ["c", "b", "a"]
            and names("action=role_created&limit=1&offset=1") == ["b"]
            and names(f"action=role_created&userId={root.id}")
            == names(f"action=role_created&user_id={root.id}")
            == ["c", "b", "a"]
        )
        assert (
            names("action=role_created&target=b") == ["b"]
            and names("action=role_created&userId=nobody") == []
        )
        since = call("GET", "/audit-logs?action=role_created&target=b").json[0]
        assert (
            names(f"action=role_created&since={since['timestamp']}") == ["c", "b"]
            and names(f"action=role_created&until={since['timestamp']}") == ["b", "a"]
            and names(f"after={since['id']}") == ["c"]
        )
        assert list(call("GET", "/audit-logs?since=yesterday").json["errors"]) == ["since"]
        page = call("GET", "/audit-logs?action=role_created&limit=2")
        assert (
            page.headers["x-total-count"] == "3"
            and f"before={page.json[-1]['id']}" in page.headers["link"]
            and "next" not in call("GET", "/audit-logs?action=role_created&limit=2&offset=2").headers["link"]
        )
        assert int(call("GET", "/audit-logs?limit=1").headers["x-total-count"]) == len(
            call("GET", "/audit-logs?limit=-1").json
        )

    @pytest.mark.parametrize("limit, rows", [(0, 0), (1, 1), (1000, 1000), (1001, 1000), (-1, 1000)])
    def test_a_list_is_bounded_whatever_limit_is_asked_for(self, idp, call, limit, rows):
        idp.store.append_audit([(1, "a", "many", "", "", "", "", "", "success")] * 1001)
        assert len(call("GET", f"/audit-logs?action=many&limit={limit}").json) == rows

    def test_a_start_and_what_changed_since_the_last_are_written_down(self, make_idp):
        for brand, secret in (("One", "x"), ("One", "y"), ("Two", "y")):
            note_configuration(idp := make_idp(Options(**CHEAP, brand_name=brand, db_pass=secret)))
        rows = idp.store.list_audit(limit=10)
        assert [row.action for row in rows][:4] == [
            "server_started", "configuration_changed", "server_started", "server_started",
        ] and rows[1].secondary == "brand-name=Two"

    @pytest.mark.parametrize(
        "attack, says",
        [
            ("UPDATE audit SET target = 'x' WHERE seq = 3", "row 3 was altered"),
            ("UPDATE audit SET result = 'success' WHERE action = 'user_login_failed'", "was altered"),
            ("UPDATE audit SET result = '' WHERE seq = 3", "row 3 was altered"),
            ("DELETE FROM audit WHERE seq = 3", "rows 3 to 3 are missing"),
            ("DELETE FROM audit WHERE seq < 3", "are missing"),
            ("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)", "the chain ends before"),
            ("DELETE FROM audit", "the chain ends before"),
            ("UPDATE audit SET seq = seq + 1000 WHERE seq = (SELECT max(seq) FROM audit)", "are missing"),
        ],
    )
    def test_an_altered_or_removed_row_is_found(self, call, auth, service, alice, machine, idp, change, attack, says):
        idp.store.flush()
        auth.post("/token", {"grant_type": "password", "username": "alice", "password": "wrong password"}, auth=service)
        whole = call("GET", "/audit-logs/verify").json
        assert (
            whole["valid"] is True
            and whole["reason"] == ""
            and whole["rows"] == whole["last_seq"] >= 5
            and whole["head"]
        )
        change(attack)
        broken = call("GET", "/audit-logs/verify").json
        assert broken["valid"] is False and says in broken["reason"]

    def test_the_purge_is_written_down_and_the_chain_goes_on(self, call, admin, clock, idp):
        for _ in range(3):
            call("POST", "/roles", {"name": str(clock.now)})
            clock.pass_(2 * 86400)
        token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        ask = lambda method, path, body=None: admin(method, path, bearer=token, json_body=body)  # noqa: E731
        before = ask("GET", "/audit-logs/verify").json["rows"]
        count = int(ask("POST", "/audit-logs/purge", {"older_than_days": 3}).json["message"].split()[0])
        after = ask("GET", "/audit-logs/verify").json
        assert (
            0 < count < before
            and after["valid"] is True
            and after["first_seq"] == count + 1
            and after["rows"] == before - count + 1
        )
        assert ask("GET", "/audit-logs?limit=1").json[0]["action"] == "audit_purged"
        assert [ask("POST", "/audit-logs/purge", {"older_than_days": days}).status for days in (0, -1, "x")] == [
            400
        ] * 3

    def test_export_is_json_lines_in_pages(self, call):
        for number in range(5):
            call("POST", "/roles", {"name": f"r{number}"})
        lines, after = [], 0
        while after is not None:
            page = call("GET", f"/audit-logs/export?after={after}&limit=2")
            assert page.headers["content-type"] == "application/x-ndjson"
            lines += [msgspec.json.decode(line) for line in page.body.splitlines()]
            after = page.headers.get("x-next-after")
        assert [int(row["id"]) for row in lines] == list(range(1, len(lines) + 1)) and len(lines) >= 6

    def test_there_is_no_way_to_change_a_row(self, call):
        assert {
            method
            for route in m.ADMIN.routes
            for path in route.paths
            if path.startswith("/audit-logs")
            for method in route.methods
        } == {"GET", "POST"}
        assert [call(method, "/audit-logs/1", {}).status for method in ("PUT", "DELETE", "PATCH", "POST")] == [405] * 4

    def test_a_dead_token_that_comes_back_is_written_down_once(self, idp, call, auth, machine):
        call("POST", "/revoke", {"token": machine["access_token"]})
        for _ in range(3):
            assert status_of(auth, machine["access_token"]) == 401
        rows = idp.store.list_audit("auth.token.replay_detected")
        assert len(rows) == 1 and rows[0].target == f"jti={machine['jti']}" and rows[0].result == "failure"
