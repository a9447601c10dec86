"""Grants: what the token endpoint answers and what becomes of refresh tokens."""

import concurrent.futures
import dataclasses
import hashlib
import threading

import jwt
import microauthd as m
import pyotp
import pytest
from conftest import CHEAP, PASSWORD, Caller
from appliance.base.clock import RELEASED_AT
from appliance.base.database import Unavailable
from appliance.base.metrics import TOKENS
from appliance.base.settings import Options
from appliance.base.store import MAD_ADMIN_ROLE_ID, SEEDED_SCOPES, AuthorizationCode
from appliance.base.keys import b64url
from appliance.base.objects import CreateRole, CreateScope

MACHINE = {"grant_type": "client_credentials"}

REFRESH = {"grant_type": "refresh_token"}


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


class TestTokenSize:
    """RFC 9068 §6: a token must fit into the header of every request"""

    @pytest.fixture
    def give_roles(self, idp):
        def give(user, count):
            caller = m.LOCAL.acting_as("test")
            for number in range(count):
                m.assign_role(idp, caller, user, m.create_role(idp, caller, CreateRole(f"role {number:03}")).id)

        return give

    def test_a_user_of_many_roles_gets_a_token_that_every_endpoint_takes(
        self, idp, auth, admin, service, alice, root, log_in, give_roles
    ):
        names = ["role " + f"{number:03}" for number in range(150)]
        give_roles("alice", 150)
        answer = log_in(alice, scope="openid groups")
        token = answer["access_token"]
        claims = claims_of(token)
        assert claims["roles_omitted"] is True and not {"role", "roles", "groups"} & set(claims)
        assert claims_of(answer["id_token"])["groups"] == names, "these fit"
        assert auth.get("/userinfo", bearer=token).json["groups"] == names
        assert auth.get("/me", bearer=token).json["role_names"] == names
        assert auth.get("/userinfo", bearer=token).json["roles"] == names
        seen = auth.post("/introspect", {"token": token}, auth=service).json
        assert seen["roles"] == seen["groups"] == names and len(seen["role"]) == 150 and seen["roles_omitted"] is True
        ids = [role.id for role in idp.store.list_roles_of(alice.id)]
        m.set_roles(idp, m.LOCAL.acting_as("test"), "root", [MAD_ADMIN_ROLE_ID, *ids])
        token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]
        assert claims_of(token)["roles_omitted"] is True and admin.get("/users", bearer=token).status == 200

    def test_an_id_token_leaves_them_out_too(self, idp, auth, alice, log_in, give_roles):
        give_roles("alice", 400)
        answer = log_in(alice, scope="openid groups")
        claims = claims_of(answer["id_token"])
        assert claims["roles_omitted"] is True and "groups" not in claims
        assert len(auth.get("/userinfo", bearer=answer["access_token"]).json["groups"]) == 400

    def test_a_user_of_some_roles_has_them_in_the_token(self, auth, alice, log_in, give_roles):
        give_roles("alice", 40)
        claims = claims_of(log_in(alice)["access_token"])
        assert len(claims["roles"]) == len(claims["role"]) == 40 and "roles_omitted" not in claims

    @pytest.mark.parametrize("roles", [0, 60])
    def test_a_token_that_is_too_large_without_them_is_refused(
        self, idp, auth, new_client, new_user, give_roles, roles
    ):
        names = [f"scope{number:03}:" + "x" * 30 for number in range(170)]
        for name in names:
            m.create_scope(idp, m.LOCAL.acting_as("test"), CreateScope(name))
        client = new_client("c", scopes=names)
        new_user("alice", names)
        give_roles("alice", roles)
        login = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        for form in (MACHINE, login):
            answer = auth.post("/token", form, auth=client)
            assert answer.json["error"] == "invalid_scope" and "octets, above" in idp.stream.getvalue()
            answer = auth.post("/token", form | {"scope": " ".join(names[:100])}, auth=client)
            assert answer.status == 200 and auth.get("/me", bearer=answer.json["access_token"]).status == 200


class TestTokenAnswer:
    """RFC 6749 §5.1, RFC 9068 §2"""

    @pytest.mark.parametrize(
        "form",
        [
            MACHINE, MACHINE | {"scope": "api:read"},
            {"grant_type": "password", "username": "alice", "password": PASSWORD},
            {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": "openid"},
        ],
    )
    @pytest.mark.parametrize("scopes_of_client", [["api:read", "api:write"], []])
    def test_no_member_is_null_or_empty_and_nothing_is_stored_by_caches(
        self, auth, new_client, alice, form, scopes_of_client
    ):
        if not scopes_of_client:
            form = {name: value for name, value in form.items() if value != "api:read"}
        answer = auth.post("/token", form, auth=new_client("c", scopes=scopes_of_client))
        assert (
            answer.status == 200
            and not {None, ""} & set(answer.json.values())
            and answer.json["token_type"] == "Bearer"
        )
        assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
        assert set(answer.json) <= {
            "access_token", "token_type", "expires_in", "jti", "aud", "audience", "scope", "refresh_token", "id_token",
        }

    def test_both_paths_are_one(self, auth, service):
        assert (
            auth.post("/oidc/token", MACHINE, auth=service).json.keys()
            == auth.post("/token", MACHINE, auth=service).json.keys()
        )

    def test_the_claims_of_a_machine(self, idp, machine):
        assert jwt.get_unverified_header(machine["access_token"]) == {
            "alg": "ES256", "typ": "at+jwt", "kid": idp.auth_ring.access.kid,
        }
        assert claims_of(machine["access_token"]) == {
            "iss": "https://idp.example", "sub": "service", "client_id": "service", "aud": "microauthd",
            "iat": idp.now(), "nbf": idp.now(), "exp": idp.now() + 3600, "jti": machine["jti"],
            "scope": "api:read api:write", "mad": "auth", "token_use": "access",
        }
        assert "refresh_token" not in machine and (machine["expires_in"], machine["aud"]) == (3600, "microauthd")

    def test_the_audience_stands_under_both_names(self, log_in, alice, machine):
        for answer in (machine, log_in(alice)):
            assert answer["audience"] == answer["aud"] == claims_of(answer["access_token"])["aud"]
            assert None not in answer.values()

    def test_the_claims_of_a_user(self, idp, log_in, root, alice):
        claims = claims_of(log_in(root)["access_token"])
        assert (
            claims["sub"], claims["username"], claims["preferred_username"], claims["amr"], claims["auth_time"],
        ) == (root.id, "root", "root", ["pwd"], idp.now())
        assert (
            (claims["role"], claims["roles"]) == ([MAD_ADMIN_ROLE_ID], ["MadAdmin"])
            and claims["sid"]
            and claims["mad"] == "auth"
        )
        assert claims_of(log_in(alice)["access_token"])["role"] == []

    def test_time_is_whole_seconds(self, log_in, alice, clock):
        clock.pass_(0.7)
        answer = log_in(alice, scope="openid")
        for token in (answer["access_token"], answer["id_token"]):
            assert all(type(claims_of(token)[name]) is int for name in ("iat", "exp", "auth_time"))

    def test_every_token_has_its_own_jti(self, auth, service):
        assert len({auth.post("/token", MACHINE, auth=service).json["jti"] for _ in range(50)}) == 50

    def test_a_client_may_ask_for_less(self, auth, service):
        answer = auth.post("/token", MACHINE | {"scope": "api:read"}, auth=service).json
        assert answer["scope"] == claims_of(answer["access_token"])["scope"] == "api:read"

    @pytest.mark.parametrize(
        "scope",
        [
            "openid", "api:read openid", SEEDED_SCOPES[0][0], "admin:provision_users", "api:secret", "*",
            "api:read\tapi:write", "API:READ",
        ],
    )
    def test_nobody_is_granted_what_was_not_assigned(self, auth, service, alice, scope):
        assert auth.post("/token", MACHINE | {"scope": scope}, auth=service).json["error"] == "invalid_scope"
        if "openid" not in scope:
            assert (
                auth.post(
                    "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": scope},
                    auth=service,
                ).json["error"]
                == "invalid_scope"
            )

    def test_a_refused_scope_leaves_no_login_behind(self, idp, auth, service, alice):
        auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "scope": "api:secret"},
            auth=service,
        )
        assert idp.store.list_families_of(alice.id) == [] and idp.store.list_sessions(alice.id)[0] == []

    def test_a_born_token_is_not_before_a_revocation(self, idp, auth, service, change):
        change("UPDATE client SET revoked_before = :ms", ms=idp.now_ms() + 5)
        assert auth.get("/me", bearer=auth.post("/token", MACHINE, auth=service).json["access_token"]).status == 200

    @pytest.fixture
    def token_after(self, auth, service, alice, log_in, monkeypatch):
        """Ask for a token of alice; something is done when the grant is proven and nothing is issued yet."""

        def call(grant, act):
            form = {
                "grant_type": grant, "username": "alice", "password": PASSWORD,
                "refresh_token": log_in(alice)["refresh_token"],
            }
            proven = m.GRANTS[grant]

            def slowly(idp, client, params):
                granted = proven(idp, client, params)
                act()
                return granted

            monkeypatch.setitem(m.GRANTS, grant, slowly)
            return auth.post("/token", form, auth=service)

        return call

    @pytest.mark.parametrize("meanwhile", ["deactivated", "deleted", "password reset", "logged out everywhere"])
    @pytest.mark.parametrize("grant, status", [("password", 403), ("refresh_token", 400)])
    def test_what_happens_to_a_user_between_login_and_issue_counts(
        self, idp, alice, clock, change, token_after, meanwhile, grant, status
    ):
        def act():
            clock.pass_(1)
            if meanwhile == "deactivated":
                change("UPDATE account SET is_active = 0")
            if meanwhile == "deleted":
                change("DELETE FROM account WHERE id = :id", id=alice.id)
            if meanwhile == "password reset":
                idp.store.set_password_hash(alice.id, idp.hasher.hash("another good one"), idp.now())
            if meanwhile in ("password reset", "logged out everywhere"):
                m.revoke_user(idp, m.LOCAL.acting_as("root"), alice.id, "reset")
            clock.pass_(1)

        answer = token_after(grant, act)
        assert (answer.status, answer.json["error"]) == (status, "invalid_grant")

    @pytest.mark.parametrize("grant", ["password", "refresh_token"])
    @pytest.mark.parametrize(("statement", "expected"), [
        ("UPDATE client SET is_active = 0 WHERE client_id = 'service'", "invalid_grant"),
        ("UPDATE client SET revoked_before = 1 WHERE client_id = 'service'", "invalid_grant"),
        ("UPDATE client SET id = 'another' WHERE client_id = 'service'", "invalid_grant"),
        ("UPDATE client SET client_id = 'deleted:' || id WHERE client_id = 'service'", "invalid_grant"),
        ("UPDATE client SET display_name = 'new' WHERE client_id = 'service'", None),
        ("UPDATE client SET is_active = 0 WHERE client_id <> 'service'", None),
    ])
    def test_what_happens_to_a_client_between_login_and_issue_counts(
        self, idp, token_after, statement, expected, grant
    ):
        def act():
            idp.store.connection.execute("PRAGMA foreign_keys = OFF")
            idp.store.connection.execute(statement)

        assert token_after(grant, act).json.get("error") == expected

    def test_a_retry_is_looked_for_only_if_the_refresh_token_cannot_be_spent(self, idp, auth, service, alice, log_in):
        """A login has as many rows as it was refreshed: no refresh may read them all."""
        form, said = {"grant_type": "refresh_token", "refresh_token": log_in(alice)["refresh_token"]}, []
        idp.store.connection.set_trace_callback(said.append)
        first = auth.post("/token", form, auth=service).json["refresh_token"]
        assert said and not [line for line in said if "AS successor" in line]
        assert auth.post("/token", form, auth=service).json["refresh_token"] == first


class TestIdToken:
    """OpenID Connect Core §2, §3.1.3.6, §5.4"""

    def test_it_comes_with_openid_only(self, log_in, alice):
        assert "id_token" in log_in(alice, scope="openid") and "id_token" not in log_in(alice)

    def test_its_claims_have_the_types_of_the_standard(self, idp, log_in, alice):
        answer = log_in(alice, scope="openid")
        assert claims_of(answer["id_token"]) == {
            "iss": "https://idp.example", "sub": alice.id, "aud": "service", "azp": "service", "iat": idp.now(),
            "exp": idp.now() + 600, "auth_time": idp.now(), "amr": ["pwd"],
            "acr": "urn:microauthd:acr:1fa",
            "sid": claims_of(answer["access_token"])["sid"], "token_use": "id",
            "at_hash": b64url(hashlib.sha256(answer["access_token"].encode()).digest()[:16]),
        }
        assert jwt.get_unverified_header(answer["id_token"]) == {
            "alg": "RS256", "typ": "JWT", "kid": idp.auth_ring.signer("RS256").kid,
        }

    @pytest.mark.parametrize(
        "scope, more",
        [
            ("openid email", {"email": "alice@example.org", "email_verified": False}), ("openid roles", {"roles": []}),
            ("openid groups", {"groups": []}),
            ("openid profile", {
                "name": "alice", "nickname": "alice", "preferred_username": "alice", "updated_at": RELEASED_AT + 1000,
            }),
            ("openid offline_access", {}),
        ],
    )
    def test_a_scope_opens_its_claims(self, log_in, alice, scope, more):
        plain = claims_of(log_in(alice, scope="openid")["id_token"])
        claims = claims_of(log_in(alice, scope=scope)["id_token"])
        assert {name: value for name, value in claims.items() if name not in plain} == more

    def test_who_has_no_address_has_no_claim_of_one(self, auth, log_in, alice, change):
        """A claim without a value is left out. OpenID Connect Core §5.3.2"""
        change("UPDATE account SET email = '' WHERE id = :id", id=alice.id)
        answer = log_in(alice, scope="openid email")
        for claims in (claims_of(answer["id_token"]), auth.get("/userinfo", bearer=answer["access_token"]).json):
            assert not {"email", "email_verified"} & set(claims) and claims["sub"] == alice.id

    def test_a_refreshed_one_tells_of_the_same_login(self, auth, service, log_in, alice, clock):
        """OpenID Connect Core §12.2"""
        answer = log_in(alice, scope="openid")
        clock.pass_(100)
        first, second = (
            claims_of(answer["id_token"]),
            claims_of(
                auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service).json["id_token"]
            ),
        )
        assert (
            all(first[name] == second[name] for name in ("iss", "sub", "aud", "azp", "auth_time", "amr", "acr", "sid"))
            and second["iat"] == first["iat"] + 100
        )
        assert "nonce" not in second

    def test_an_amr_of_two_factors_lasts(self, idp, auth, service, log_in, alice, clock, give_totp):
        seed = give_totp(idp, alice.account)
        clock.pass_(90)
        answer = log_in(alice, scope="openid", totp=pyotp.TOTP(seed).at(idp.now()))
        again = auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service).json
        assert claims_of(answer["id_token"])["amr"] == claims_of(again["id_token"])["amr"] == ["pwd", "otp", "mfa"]


@pytest.fixture
def strict(make_idp, idp):
    """AUTH of another process of the same box, without a grace for refresh tokens."""
    return Caller(m.App(make_idp(dataclasses.replace(idp.options, refresh_token_grace=0)), m.AUTH))


class TestUnnamedClient:
    """RFC 6749 §6: the refresh token of a public client says whose it is."""

    @pytest.fixture
    def login(self, auth, public, alice):
        return auth.post(
            "/token", {"grant_type": "password", "client_id": "spa", "username": "alice", "password": alice.password}
        ).json

    def test_it_refreshes_as_if_it_had_named_itself(self, idp, auth, login):
        answer = auth.post("/token", REFRESH | {"refresh_token": login["refresh_token"]})
        assert (answer.status, answer.json["scope"], answer.json.keys()) == (200, login["scope"], login.keys())
        assert idp.auth_ring.verify(answer.json["access_token"], "at+jwt")["client_id"] == "spa"
        again = auth.post("/token", REFRESH | {"refresh_token": answer.json["refresh_token"], "client_id": "spa"})
        assert again.status == 200

    def test_every_check_of_the_client_holds(self, auth, login, change):
        form = REFRESH | {"refresh_token": login["refresh_token"]}
        for statement, status, error in (
            ("UPDATE client SET grant_types = 'password'", 400, "unauthorized_client"),
            ("UPDATE client SET is_active = 0", 401, "invalid_client"),
            ("UPDATE client SET is_active = 1, grant_types = 'refresh_token', client_type = 'confidential'", 401,
             "invalid_client"),
            ("UPDATE client SET client_type = 'public', revoked_before = 9999999999999", 400, "invalid_grant"),
            ("DELETE FROM client", 401, "invalid_client"),
        ):
            change(statement)
            answer = auth.post("/token", form)
            assert (answer.status, answer.json["error"]) == (status, error), statement

    @pytest.mark.parametrize(
        "more, status, error",
        [
            ({"client_id": "other"}, 400, "invalid_grant"), ({"client_id": "nobody"}, 401, "invalid_client"),
            ({"client_id": "service"}, 401, "invalid_client"), ({"client_secret": "x"}, 401, "invalid_client"),
            ({"grant_type": "password"}, 401, "invalid_client"), ({"grant_type": ""}, 401, "invalid_client"),
            ({"grant_type": "client_credentials"}, 401, "invalid_client"),
            ({"grant_type": "authorization_code"}, 401, "invalid_client"),
        ],
    )
    def test_a_name_that_disagrees_and_another_grant_are_refused(
        self, auth, login, new_client, service, more, status, error
    ):
        new_client("other", client_type="public")
        answer = auth.post("/token", REFRESH | {"refresh_token": login["refresh_token"]} | more)
        assert (answer.status, answer.json["error"]) == (status, error)
        assert auth.post("/token", REFRESH | {"refresh_token": login["refresh_token"]}).status == 200, "it did no harm"

    def test_credentials_that_are_wrong_are_not_as_if_there_were_none(self, auth, login):
        form = REFRESH | {"refresh_token": login["refresh_token"]}
        for client in (("spa", "wrong"), ("", ""), ("nobody", "")):
            assert auth.post("/token", form, auth=client).status == 401

    def test_a_confidential_client_must_authenticate_and_an_unknown_token_is_answered_alike(
        self, auth, log_in, alice, service
    ):
        token = log_in(alice)["refresh_token"]
        known, unknown = (auth.post("/token", REFRESH | {"refresh_token": word}) for word in (token, "x"))
        assert (known.status, known.json["error"]) == (401, "invalid_client")
        assert (known.status, known.body, known.headers) == (unknown.status, unknown.body, unknown.headers)
        assert auth.post("/token", REFRESH | {"refresh_token": token}, auth=service).status == 200, "it did no harm"

    def test_reuse_ends_the_login_and_is_audited(self, idp, strict, login):
        form = REFRESH | {"refresh_token": login["refresh_token"]}
        second = strict.post("/token", form).json
        assert strict.post("/token", form).json["error"] == "invalid_grant"
        assert strict.get("/me", bearer=second["access_token"]).status == 401
        assert idp.store.list_audit("refresh_token_reused")[0].secondary.startswith("sid=")

    def test_a_refusal_is_audited(self, idp, auth, login):
        form = REFRESH | {"refresh_token": login["refresh_token"], "scope": "api:secret"}
        assert auth.post("/token", form).json["error"] == "invalid_scope"
        row = idp.store.list_audit("token_refused")[0]
        assert (row.target, row.secondary) == ("spa", "grant_type=refresh_token error=invalid_scope")


class TestRefresh:
    """RFC 6749 §6, RFC 9700 §4.14.2"""

    def turn(self, auth, service, token, **more):
        return auth.post("/token", REFRESH | {"refresh_token": token} | more, auth=service)

    def test_a_token_works_once_and_its_reuse_ends_the_family(self, strict, service, log_in, alice):
        first = log_in(alice)
        second = self.turn(strict, service, first["refresh_token"])
        assert second.status == 200
        assert strict.get("/me", bearer=second.json["access_token"]).status == 200
        assert self.turn(strict, service, first["refresh_token"]).json["error"] == "invalid_grant"
        assert self.turn(strict, service, second.json["refresh_token"]).json["error"] == "invalid_grant"
        assert strict.get("/me", bearer=second.json["access_token"]).status == 401

    def test_it_is_answered_503_if_the_commit_that_it_shares_fails(self, idp, service, log_in, alice):
        def app(environ, start_response):
            steps = m.App(idp, m.AUTH)(environ, start_response)
            assert next(steps) == next(steps) == b""  # before its change, and until that is on the disk
            return [steps.throw(Unavailable("the disk", 5))]

        answer = self.turn(Caller(app), service, log_in(alice)["refresh_token"])
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable")
        assert answer.headers["retry-after"] == "5"
        assert (TOKENS.name, (m.REFRESH_TOKEN, service[0])) not in idp.counters.totals(), "none was issued"

    def test_another_family_lives_on(self, strict, service, log_in, alice):
        one, other = log_in(alice), log_in(alice)
        assert [self.turn(strict, service, one["refresh_token"]).status for _ in range(2)] == [200, 400]
        assert self.turn(strict, service, other["refresh_token"]).status == 200

    def test_it_belongs_to_its_client(self, auth, new_client, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        assert self.turn(auth, new_client("thief"), token).json["error"] == "invalid_grant"
        assert self.turn(auth, service, token).status == 200

    def test_a_request_may_narrow_the_scope_and_never_widen_it(self, auth, service, log_in, alice):
        answer = log_in(alice, scope="openid api:read")
        narrow = self.turn(auth, service, answer["refresh_token"], scope="api:read")
        assert narrow.json["scope"] == "api:read" and "id_token" not in narrow.json
        assert (
            self.turn(auth, service, narrow.json["refresh_token"], scope="api:write").json["error"] == "invalid_scope"
        )

    def test_a_right_that_was_taken_away_is_gone(self, idp, auth, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        with idp.store.transaction():
            idp.store.run("DELETE FROM user_scope WHERE user_id = :id", id=alice.id)
        assert "scope" not in self.turn(auth, service, token).json

    def test_it_does_not_outlive_its_login(self, idp, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        for _ in range(11):
            clock.pass_(259000)
            answer = self.turn(auth, service, token)
            if answer.status != 200:
                break
            token = answer.json["refresh_token"]
        assert answer.json["error"] == "invalid_grant" and clock.now - RELEASED_AT <= 2592000 + 260000

    def test_an_expired_one_is_refused(self, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        clock.pass_(259201)
        assert self.turn(auth, service, token).json["error"] == "invalid_grant"

    def test_a_user_who_may_not_any_more_cannot_refresh(self, idp, auth, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        with idp.store.transaction():
            idp.store.run("UPDATE account SET is_active = 0 WHERE id = :id", id=alice.id)
        assert self.turn(auth, service, token).json["error"] == "invalid_grant"

    def test_the_login_page_of_the_original_calls_it_token(self, auth, service, log_in, alice):
        assert auth.post("/token", REFRESH | {"token": log_in(alice)["refresh_token"]}, auth=service).status == 200

    def test_it_is_off_unless_turned_on(self, make_idp, service, alice):
        idp = make_idp(Options(**CHEAP))
        auth = Caller(m.App(idp, m.AUTH))
        answer = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service
        )
        assert answer.status == 200 and "refresh_token" not in answer.json
        assert (
            auth.post("/token", REFRESH | {"refresh_token": "x"}, auth=service).json["error"]
            == "unsupported_grant_type"
        )
        assert "refresh_token" not in auth.get("/.well-known/openid-configuration").json["grant_types_supported"]

    def test_its_absolute_end_is_that_of_the_login(self, idp, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        (family,) = idp.store.list_families_of(alice.id)
        assert family.expires_at == idp.now() + 2592000
        while idp.now() + 259000 < family.expires_at:
            clock.pass_(259000)
            token = self.turn(auth, service, token).json["refresh_token"]
        assert idp.store.find_refresh_token(m.refresh_token_sha256(token)).expires_at == family.expires_at

    def test_a_login_is_over_in_the_second_of_its_end(self, idp, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        (family,) = idp.store.list_families_of(alice.id)
        clock.now = float(family.expires_at - 1)
        assert m.active_family(idp, family.sid)
        clock.pass_(1)
        assert m.active_family(idp, family.sid) is None
        assert self.turn(auth, service, token).json["error"] == "invalid_grant"

    def test_the_statement_that_spends_it_asks_everything(self, idp, log_in, alice, clock):
        """Whatever was read before it."""
        digest = m.refresh_token_sha256(log_in(alice)["refresh_token"])

        def rotate(client_id, now):
            with idp.store.transaction():
                return idp.store.rotate_refresh_token(digest, client_id, now)

        assert rotate("thief", idp.now()) is None and rotate("service", idp.now() + 259200) is None
        assert rotate("service", idp.now()) and rotate("service", idp.now()) is None

    def test_only_its_hash_is_kept(self, idp, log_in, alice):
        token = log_in(alice)["refresh_token"]
        assert (
            idp.store.find_refresh_token(token) is None
            and idp.store.find_refresh_token(m.refresh_token_sha256(token)).user_id == alice.id
        )

    def test_a_spent_one_in_the_hands_of_another_client_ends_nothing(self, auth, service, new_client, log_in, alice):
        first = log_in(alice)
        second = self.turn(auth, service, first["refresh_token"]).json
        assert self.turn(auth, new_client("thief"), first["refresh_token"]).json["error"] == "invalid_grant"
        assert self.turn(auth, service, second["refresh_token"]).status == 200

    def test_a_refused_scope_does_not_spend_it(self, auth, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        assert self.turn(auth, service, token, scope="api:secret").json["error"] == "invalid_scope"
        assert self.turn(auth, service, token).status == 200

    def test_a_spent_one_ends_its_family_whatever_scope_it_asks_for(self, strict, service, log_in, alice):
        first = log_in(alice)
        second = self.turn(strict, service, first["refresh_token"]).json
        assert self.turn(strict, service, first["refresh_token"], scope="api:secret").json["error"] == "invalid_grant"
        assert self.turn(strict, service, second["refresh_token"]).json["error"] == "invalid_grant"

    def test_narrowing_is_for_one_token_only(self, auth, service, log_in, alice):
        """RFC 6749 §6: the new refresh token has the scope of the old."""
        answer = log_in(alice, scope="openid api:read")
        narrow = self.turn(auth, service, answer["refresh_token"], scope="openid").json
        assert self.turn(auth, service, narrow["refresh_token"]).json["scope"] == "api:read openid"

    def test_a_scope_taken_from_the_client_is_gone_and_one_given_since_is_not_added(
        self, idp, auth, service, log_in, alice, change
    ):
        token = log_in(alice)["refresh_token"]
        m.assign_scopes(idp, m.LOCAL.acting_as("test"), alice.account, ["api:write"])
        answer = self.turn(auth, service, token).json
        assert answer["scope"] == "api:read"
        change("DELETE FROM client_scope")
        assert "scope" not in self.turn(auth, service, answer["refresh_token"]).json

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE account SET is_active = 0", "UPDATE account SET revoked_before = 9999999999999",
            "UPDATE family SET revoked_at = 1", "UPDATE client SET revoked_before = 9999999999999",
            "UPDATE meta SET value = '9999999999999' WHERE name = 'revoked_before'",
        ],
    )
    def test_it_dies_with_what_it_hangs_on_and_is_not_spent(self, idp, auth, service, log_in, alice, change, statement):
        token = log_in(alice)["refresh_token"]
        change(statement)
        assert self.turn(auth, service, token).json["error"] == "invalid_grant"
        assert idp.store.find_refresh_token(m.refresh_token_sha256(token)).rotated_at is None

    @pytest.mark.parametrize(
        "form",
        [
            {"refresh_token": "unknown"}, {"refresh_token": "x" * 60_000}, {"refresh_token": "\u00e4"},
            {"token": "unknown"},
        ],
    )
    def test_an_unknown_one_is_invalid_grant(self, auth, service, form):
        assert auth.post("/token", REFRESH | form, auth=service).json["error"] == "invalid_grant"

    def test_none_is_invalid_request(self, auth, service):
        assert auth.post("/token", REFRESH, auth=service).json["error"] == "invalid_request"

    def test_an_access_token_is_none(self, auth, service, log_in, alice):
        assert self.turn(auth, service, log_in(alice)["access_token"]).json["error"] == "invalid_grant"

    def test_a_client_without_the_grant_gets_none(self, auth, new_client, alice):
        client = new_client("once", grant_types=["password"])
        answer = auth.post("/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=client)
        assert answer.status == 200 and "refresh_token" not in answer.json

    def test_of_many_at_once_one_wins_and_the_family_ends_without_a_grace(
        self, make_idp, idp, service, log_in, alice, auth, strict
    ):
        token, answers = log_in(alice)["refresh_token"], []
        callers = [
            strict, Caller(m.App(make_idp(dataclasses.replace(idp.options, refresh_token_grace=0)), m.AUTH))
        ]
        threads = [
            threading.Thread(target=lambda caller=caller: answers.append(self.turn(caller, service, token)))
            for caller in callers * 4
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        good = [answer for answer in answers if answer.status == 200]
        assert len(good) == 1 and {answer.json["error"] for answer in answers if answer not in good} == {
            "invalid_grant"
        }
        assert auth.get("/me", bearer=good[0].json["access_token"]).status == 401
        assert self.turn(auth, service, good[0].json["refresh_token"]).json["error"] == "invalid_grant"

    def test_its_reuse_is_written_down(self, idp, strict, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        for _ in range(2):
            self.turn(strict, service, token)
        assert "refresh_token_reused" in {row.action for row in idp.store.list_audit(limit=5)}

    def test_a_client_sets_its_lifetime(self, idp, auth, service, log_in, alice, clock):
        with idp.store.transaction(identity=True):
            idp.store.put_feature(idp.store.find_client("service").id, "REFRESH_TOKEN_EXPIRATION", True, "60")
        token = log_in(alice)["refresh_token"]
        clock.pass_(60)
        assert self.turn(auth, service, token).json["error"] == "invalid_grant"


class TestRetriedRefresh:
    """A refresh whose answer was lost, and two tabs that refresh at once. RFC 9700 §4.14.2"""

    def turn(self, auth, service, token, **more):
        return auth.post("/token", REFRESH | {"refresh_token": token} | more, auth=service)

    def reason(self, answer):
        return answer.status, answer.json.get("error")

    def crowd(self, callers, service, tokens):
        """Present these tokens at once: the answers, in the same order."""
        barrier = threading.Barrier(len(tokens))

        def present(number):
            barrier.wait()
            return self.turn(callers[number % len(callers)], service, tokens[number])

        with concurrent.futures.ThreadPoolExecutor(len(tokens)) as pool:
            return list(pool.map(present, range(len(tokens))))

    @pytest.fixture
    def callers(self, auth, make_idp, idp):
        """AUTH of two processes of one box."""
        return [auth, Caller(m.App(make_idp(idp.options), m.AUTH))]

    def test_it_gives_the_same_refresh_token_and_another_access_token(
        self, idp, callers, service, log_in, alice, clock
    ):
        token = log_in(alice, scope="openid api:read")["refresh_token"]
        answers = []
        for number in range(6):
            answers.append(self.turn(callers[number % 2], service, token))
            clock.pass_(6)
        assert {answer.status for answer in answers} == {200}
        (successor,) = {answer.json["refresh_token"] for answer in answers}
        assert successor != token and len(successor) == len(token)
        bearers = {answer.json["access_token"] for answer in answers}
        assert len(bearers) == 6 and all(callers[0].get("/me", bearer=bearer).status == 200 for bearer in bearers)
        assert all(answer.json["id_token"] and answer.json["scope"] == answers[0].json["scope"] for answer in answers)
        assert idp.store.list_refresh_tokens(alice.id)[1] == 2, "a retry stores none"
        assert self.turn(callers[0], service, successor).status == 200

    def test_the_first_of_a_login_is_random_and_another_box_derives_another(self, idp, log_in, alice):
        first, second = (log_in(alice)["refresh_token"] for _ in range(2))
        assert len({first, second, idp.seal.successor(first), idp.seal.successor(second)}) == 4
        assert idp.seal.successor(first) == m.Seal(bytes(32)).successor(first) != m.Seal(b"1" * 32).successor(first)

    @pytest.mark.parametrize("passed, status", [(0, 200), (30, 200), (31, 400), (86400, 400)])
    def test_past_the_grace_it_ends_the_family(self, auth, service, log_in, alice, clock, passed, status):
        first = log_in(alice)
        second = self.turn(auth, service, first["refresh_token"]).json
        clock.pass_(passed)
        answer = self.turn(auth, service, first["refresh_token"])
        assert answer.status == status
        assert self.turn(auth, service, second["refresh_token"]).status == status, "alive or dead with the login"
        if status == 400:
            assert self.reason(answer) == (400, "invalid_grant")
            assert auth.get("/me", bearer=second["access_token"]).status == 401

    def test_retries_do_not_prolong_the_grace_or_the_successor(self, idp, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        successor = self.turn(auth, service, token).json["refresh_token"]
        row = idp.store.find_refresh_token(m.refresh_token_sha256(successor))
        for _ in range(3):
            clock.pass_(10)
            assert self.turn(auth, service, token).status == 200
        assert idp.store.find_refresh_token(m.refresh_token_sha256(successor)) == row
        clock.pass_(1)
        assert self.reason(self.turn(auth, service, token)) == (400, "invalid_grant")

    def test_once_its_successor_was_used_it_ends_the_family(self, auth, service, log_in, alice):
        first = log_in(alice)["refresh_token"]
        second = self.turn(auth, service, first).json["refresh_token"]
        third = self.turn(auth, service, second).json
        assert self.reason(self.turn(auth, service, first)) == (400, "invalid_grant")
        assert self.reason(self.turn(auth, service, third["refresh_token"])) == (400, "invalid_grant")
        assert self.reason(self.turn(auth, service, second)) == (400, "invalid_grant")
        assert auth.get("/me", bearer=third["access_token"]).status == 401

    def test_another_clients_try_ends_nothing(self, auth, service, new_client, log_in, alice):
        first = log_in(alice)["refresh_token"]
        second = self.turn(auth, service, first).json["refresh_token"]
        assert self.reason(self.turn(auth, new_client("thief"), first)) == (400, "invalid_grant")
        assert self.turn(auth, service, first).json["refresh_token"] == second
        assert self.turn(auth, service, second).status == 200

    def test_a_grace_of_nothing_derives_nothing(self, idp, strict, service, log_in, alice):
        first = log_in(alice)["refresh_token"]
        second = self.turn(strict, service, first).json["refresh_token"]
        assert second != idp.seal.successor(first)
        assert self.reason(self.turn(strict, service, first)) == (400, "invalid_grant")
        assert self.reason(self.turn(strict, service, second)) == (400, "invalid_grant")

    def test_it_never_changes_the_granted_scope(self, idp, auth, service, log_in, alice):
        token = log_in(alice, scope="openid api:read")["refresh_token"]
        granted = self.turn(auth, service, token).json["scope"]
        narrow = self.turn(auth, service, token, scope="api:read").json
        assert narrow["scope"] == claims_of(narrow["access_token"])["scope"] == "api:read" and "id_token" not in narrow
        assert self.reason(self.turn(auth, service, token, scope="api:write")) == (400, "invalid_scope")
        assert self.turn(auth, service, token).json["scope"] == granted
        (family,) = idp.store.list_families_of(alice.id)
        assert family.scope == granted
        assert self.turn(auth, service, narrow["refresh_token"]).json["scope"] == granted

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE account SET is_active = 0", "UPDATE account SET revoked_before = 9999999999999",
            "UPDATE family SET revoked_at = 1", "UPDATE family SET expires_at = 1",
            "UPDATE client SET revoked_before = 9999999999999", "UPDATE client SET is_active = 0",
            "UPDATE refresh_token SET revoked_at = 1", "DELETE FROM refresh_token WHERE rotated_at IS NULL",
            "UPDATE refresh_token SET expires_at = 1 WHERE rotated_at IS NULL",
        ],
    )
    def test_it_dies_with_what_it_hangs_on(self, auth, service, log_in, alice, change, statement):
        token = log_in(alice)["refresh_token"]
        assert self.turn(auth, service, token).status == 200
        change(statement)
        assert self.turn(auth, service, token).json["error"] in ("invalid_grant", "invalid_client")

    def test_a_revocation_between_the_reading_and_the_issuing_ends_it(
        self, idp, auth, service, log_in, alice, monkeypatch
    ):
        token = log_in(alice)["refresh_token"]
        assert self.turn(auth, service, token).status == 200
        (family,) = idp.store.list_families_of(alice.id)
        draft_token = m.draft_token

        def revoke_first(*args):
            m.revoke_family(idp, m.LOCAL.acting_as("test"), family.sid, "logout", "service")
            return draft_token(*args)

        monkeypatch.setattr(m, "draft_token", revoke_first)
        assert self.reason(self.turn(auth, service, token)) == (400, "invalid_grant")

    def test_a_use_of_the_successor_between_the_reading_and_the_issuing_ends_the_family(
        self, idp, auth, service, log_in, alice, monkeypatch
    ):
        token = log_in(alice)["refresh_token"]
        successor = self.turn(auth, service, token).json["refresh_token"]
        (family,) = idp.store.list_families_of(alice.id)
        draft_token = m.draft_token

        def use_first(*args):
            monkeypatch.setattr(m, "draft_token", draft_token)
            assert self.turn(auth, service, successor).status == 200
            return draft_token(*args)

        monkeypatch.setattr(m, "draft_token", use_first)
        assert self.reason(self.turn(auth, service, token)) == (400, "invalid_grant")
        assert idp.store.find_family(family.sid).revoked_at is not None

    @pytest.mark.parametrize("back, status", [(1, 200), (2, 400), (3600, 400)])
    def test_a_clock_that_went_back_does_not_begin_the_grace_again(
        self, auth, service, log_in, alice, clock, back, status
    ):
        """The login was begun earlier, so nothing else is in the future."""
        token = log_in(alice)["refresh_token"]
        clock.pass_(7200)
        assert self.turn(auth, service, token).status == 200
        clock.pass_(-back)
        assert self.turn(auth, service, token).status == status

    def test_a_token_that_expires_meanwhile_has_its_grace(self, auth, service, log_in, alice, clock):
        token = log_in(alice)["refresh_token"]
        clock.pass_(259199)
        successor = self.turn(auth, service, token).json["refresh_token"]
        clock.pass_(20)
        assert self.turn(auth, service, token).json["refresh_token"] == successor

    def test_it_is_written_down_as_one(self, idp, auth, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        jtis = [self.turn(auth, service, token).json["jti"] for _ in range(2)]
        rows = [row.secondary for row in idp.store.list_audit("refresh_token_used", 5)]
        assert rows == [f"jti={jtis[1]};retry=true", f"jti={jtis[0]}"]

    def replace_token(self, idp, new, old):
        """Let a refresh token be another, as an older version stored it: with no time before its hash."""
        with idp.store.transaction():
            assert 1 == idp.store.run(
                "UPDATE refresh_token SET token_sha256 = :new WHERE token_sha256 = :old", new=m.sha256(new),
                old=m.refresh_token_sha256(old),
            )

    def test_a_row_of_an_older_version_is_strict(self, idp, auth, service, log_in, alice):
        """Its successor was random."""
        token, successor = log_in(alice)["refresh_token"], "an older version's"
        self.replace_token(idp, successor, self.turn(auth, service, token).json["refresh_token"])
        assert self.reason(self.turn(auth, service, token)) == (400, "invalid_grant")
        assert self.reason(self.turn(auth, service, successor)) == (400, "invalid_grant")

    def test_tokens_that_begin_with_no_time_live_on(self, idp, auth, service, log_in, alice):
        """Also the answer to a refresh that went out just before the program was replaced."""
        token, old = log_in(alice)["refresh_token"], "o" * 43
        self.replace_token(idp, old, token)
        derived = idp.seal.successor(old)
        self.replace_token(idp, derived, self.turn(auth, service, old).json["refresh_token"])
        assert self.turn(auth, service, old).json["refresh_token"] == derived
        assert self.turn(auth, service, derived).status == 200
        assert auth.post("/introspect", {"token": derived}, auth=service).json == {"active": False}, "it was spent"

    def test_what_is_stored_begins_with_the_time_and_tells_nothing_of_the_rest(self, idp, auth, service, log_in, alice):
        """So index entries of one time share their pages. A token whose time is changed is another one."""
        first = log_in(alice)
        second = self.turn(auth, service, first["refresh_token"]).json
        for answer in first, second:
            token = answer["refresh_token"]
            row = idp.store.find_refresh_token(m.refresh_token_sha256(token))
            assert row.token_sha256 == token[:12] + hashlib.sha256(token.encode()).hexdigest()
            assert int(token[:12], 16) == m.jti_ms(row.id) == m.jti_ms(answer["jti"])
            assert row.sid[:12] == first["refresh_token"][:12] and len(row.sid) == 28
        altered = f"{int(token[:12], 16) + 1:012x}{token[12:]}"
        assert self.reason(self.turn(auth, service, altered)) == (400, "invalid_grant")
        assert self.turn(auth, service, token).status == 200

    def test_of_many_at_once_each_gets_a_living_token_and_one_successor(self, idp, callers, service, log_in, alice):
        """20 rounds of 32 at once, each with the successor of the last; 200 on two real processes: test_processes."""
        token = log_in(alice)["refresh_token"]
        for number in range(20):
            answers = self.crowd(callers, service, [token] * 32)
            assert {answer.status for answer in answers} == {200}, (number, answers)
            (token,) = {answer.json["refresh_token"] for answer in answers}
            assert len({answer.json["jti"] for answer in answers}) == 32
        assert all(callers[0].get("/me", bearer=answer.json["access_token"]).status == 200 for answer in answers)
        assert idp.store.list_refresh_tokens(alice.id)[1] == 21

    def test_of_many_at_once_with_the_successor_the_family_dies_exactly_if_the_older_one_comes_later(
        self, idp, callers, service, log_in, alice
    ):
        """20 rounds of 16 retries beside 16 uses of the successor; the audit log tells in which order they came."""
        ends = set()
        for number in range(20):
            first = log_in(alice)["refresh_token"]
            second = self.turn(callers[0], service, first).json["refresh_token"]
            answers = self.crowd(callers, service, [first, second] * 16)
            ends.add(self.check_order(idp, number, second, answers))
        assert True in ends, "no round ended a family"

    def check_order(self, idp, number, second, answers):
        """Return whether the family is dead, having checked that it is so exactly if it must."""
        good = {answer.json["jti"]: number % 2 for number, answer in enumerate(answers) if answer.status == 200}
        assert all(answer.json["error"] == "invalid_grant" for answer in answers if answer.status != 200)
        came = [
            good[row.secondary[4:36]]
            for row in reversed(idp.store.list_audit("refresh_token_used", 32)) if row.secondary[4:36] in good
        ]
        assert len(came) == len(good) and came == sorted(came), (number, "a retry after the use of the successor")
        family = idp.store.find_family(idp.store.find_refresh_token(m.refresh_token_sha256(second)).sid)
        is_dead = family.revoked_at is not None
        assert is_dead == (len(good) < 32), number
        living = [
            row for row in idp.store.list_refresh_tokens(limit=1000)[0]
            if row.sid == family.sid and row.rotated_at is None and not row.family_revoked
        ]
        assert len(living) == (0 if is_dead else 1), number
        return is_dead


class TestAuthorizationCode:
    """The code of a login, exchanged; how a person comes by one: test_login.py"""


    def test_a_code_of_the_millisecond_of_an_epoch_is_dead(self, idp, auth, service, alice, change):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "service", "redirect", "https://x")
        for number, gap in ((0, 1), (1, 0)):
            ms, now = idp.now_ms(), idp.now()
            idp.store.insert(
                AuthorizationCode(
                    m.sha256(f"code{number}"), "service", alice.id, f"s{number}", "https://x", "", "", "", "", "",
                    "pwd", now, ms, now + 60, None, "", 0,
                )
            )
            change("UPDATE client SET revoked_before = :ms", ms=ms - gap)
            answer = auth.post(
                "/token", {"grant_type": "authorization_code", "code": f"code{number}", "redirect_uri": "https://x"},
                auth=service,
            )
            assert answer.status == (200 if gap else 400), answer
