"""The token endpoint and what becomes of its tokens."""

import hashlib

import jwt
import microauthd as m
import pytest
from conftest import PASSWORD
from hypothesis import given
from hypothesis import strategies as st

REFRESH = {"grant_type": "refresh_token"}


def introspect(auth, token, client):
    return auth.post("/introspect", {"token": token}, auth=client).json


class TestScopes:
    """RFC 6749 §3.3: requested ∩ client's ∩ user's."""

    names = st.frozensets(st.sampled_from(["a", "b", "c", "openid", "profile", "email"]))

    @given(client=names, user=st.one_of(st.none(), names), asked=st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c", "openid", "profile", "x"]))))
    def test_never_more_than_allowed(self, client, user, asked):
        allowed = client if user is None else client & user
        if user is not None and asked and "openid" in asked:
            allowed = allowed | set(m.OIDC_SCOPES)
        wanted = set(asked) if asked else allowed
        requested = None if asked is None else " ".join(asked)
        if wanted <= allowed:
            assert m.decide_scopes(requested, client, user).split() == sorted(wanted)
        else:
            with pytest.raises(m.Problem) as caught:
                m.decide_scopes(requested, client, user)
            assert caught.value.code == "invalid_scope"

    @pytest.mark.parametrize("scope, granted", [
        (None, "api:read api:write"), ("api:read", "api:read"), ("api:write api:read", "api:read api:write"),
        ("api:secret", None), ("nonsense", None), ("openid", None), ("d0955db1-67f7-4a7b-a9bb-ffbef4f0d2bd", None),
    ])
    def test_of_a_machine(self, auth, service, scope, granted):
        answer = auth.post("/token", {"grant_type": "client_credentials"} | ({"scope": scope} if scope else {}), auth=service)
        if granted is None:
            assert (answer.status, answer.json["error"]) == (400, "invalid_scope")
        else:
            assert answer.json["scope"] == granted

    @pytest.mark.parametrize("scope, granted", [(None, "api:read"), ("api:read", "api:read"), ("api:write", None), ("openid api:read", "api:read openid"), ("profile", None)])
    def test_of_a_user(self, auth, service, alice, scope, granted):
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD} | ({"scope": scope} if scope else {})
        answer = auth.post("/token", form, auth=service)
        assert (answer.json.get("scope"), answer.status) == ((granted, 200) if granted else (None, 400))


class TestClientTypes:
    """            password  client_credentials  refresh_token   what else
    confidential     yes          yes               yes          only those on its list
    public           if listed    never             yes          no secret
    """

    def test_a_grant_that_is_not_on_its_list_is_refused(self, auth, new_client):
        client = new_client("narrow", grant_types=["client_credentials"])
        answer = auth.post("/token", {"grant_type": "password", "username": "x", "password": "y"}, auth=client)
        assert (answer.status, answer.json["error"]) == (400, "unauthorized_client")

    def test_a_public_client_has_no_secret_and_no_machine_tokens(self, auth, new_client, alice):
        new_client("spa", client_type="public", grant_types=["password", "refresh_token"])
        form = {"client_id": "spa", "grant_type": "password", "username": "alice", "password": PASSWORD}
        answer = auth.post("/token", form)
        assert answer.status == 200
        assert auth.post("/token", REFRESH | {"client_id": "spa", "refresh_token": answer.json["refresh_token"]}).status == 200
        assert auth.post("/token", {"client_id": "spa", "grant_type": "client_credentials"}).json["error"] == "unauthorized_client"
        assert auth.post("/token", form | {"client_secret": "guess"}).json["error"] == "invalid_client"

    def test_a_public_client_cannot_be_given_machine_tokens(self, new_client):
        with pytest.raises(m.Problem) as caught:
            new_client("spa", client_type="public", grant_types=["client_credentials"])
        assert "grant_types" in caught.value.errors

    def test_unknown_grants(self, auth, service):
        assert auth.post("/token", {"grant_type": "implicit"}, auth=service).json["error"] == "unsupported_grant_type"
        assert auth.post("/token", {}, auth=service).json["error"] == "invalid_request"


class TestClientAuthentication:
    """RFC 6749 §2.3"""

    def test_by_basic_or_form_never_both(self, auth, service):
        form = {"grant_type": "client_credentials"}
        both = {"client_id": service[0], "client_secret": service[1]}
        assert auth.post("/token", form, auth=service).status == 200
        assert auth.post("/token", form | both).status == 200
        assert auth.post("/token", form | both, auth=service).json["error"] == "invalid_request"

    def test_a_401_says_how(self, auth, service):
        for client in (None, ("service", "wrong"), ("nobody", "wrong"), ("service", "")):
            answer = auth.post("/token", {"grant_type": "client_credentials"}, auth=client)
            assert (answer.status, answer.json["error"]) == (401, "invalid_client")
            assert answer.headers["www-authenticate"].startswith("Basic ")

    def test_both_parts_of_basic_are_form_decoded(self, auth, new_client):
        secret = "p:%+ \u00e4 sixteen more"
        new_client("a%b+c", client_secret=secret)
        from urllib.parse import quote_plus

        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=(quote_plus("a%b+c"), quote_plus(secret))).status == 200

    def test_two_secrets_live_for_the_overlap(self, idp, auth, service, clock):
        form = {"grant_type": "client_credentials"}
        assert auth.post("/token", form, auth=service).status == 200
        second = m.change_secret(idp, m.LOCAL, "test", m.ChangeSecret("service", overlap_seconds=60))
        third = m.change_secret(idp, m.LOCAL, "test", m.ChangeSecret("service", overlap_seconds=60))
        assert auth.post("/token", form, auth=service).status == 401, "two live, not three"
        assert auth.post("/token", form, auth=("service", second)).status == 200
        assert auth.post("/token", form, auth=("service", third)).status == 200
        clock.pass_(61)
        assert auth.post("/token", form, auth=("service", second)).status == 401
        assert auth.post("/token", form, auth=("service", third)).status == 200

    def test_a_changed_secret_is_dead_at_once(self, idp, auth, service):
        form = {"grant_type": "client_credentials"}
        assert auth.post("/token", form, auth=service).status == 200
        m.change_secret(idp, m.LOCAL, "test", m.ChangeSecret("service"))
        assert auth.post("/token", form, auth=service).status == 401

    def test_an_inactive_client_is_no_client(self, idp, auth, service, machine):
        with idp.store.transaction(identity=True):
            idp.store.set_client_active(idp.store.find_client("service").id, False, idp.now())
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).status == 401
        assert auth.get("/me", bearer=machine["access_token"]).status == 401


class TestTokenAnswer:
    """RFC 6749 §5.1, RFC 9068 §2"""

    def test_no_member_is_null_and_nothing_is_stored_by_caches(self, auth, service, log_in, alice):
        for form in ({"grant_type": "client_credentials"}, {"grant_type": "password", "username": "alice", "password": PASSWORD}):
            answer = auth.post("/token", form, auth=service)
            assert None not in answer.json.values() and answer.json["token_type"] == "Bearer"
            assert answer.headers["cache-control"] == "no-store"

    def test_the_claims_of_a_machine(self, idp, machine):
        claims = jwt.decode(machine["access_token"], options={"verify_signature": False})
        assert jwt.get_unverified_header(machine["access_token"])["typ"] == "at+jwt"
        assert claims == {
            "iss": "https://idp.example", "sub": "service", "client_id": "service", "aud": "microauthd", "iat": idp.now(), "nbf": idp.now(),
            "exp": idp.now() + 3600, "jti": machine["jti"], "scope": "api:read api:write", "mad": "auth", "token_use": "access",
        }
        assert "refresh_token" not in machine

    def test_the_claims_of_a_user(self, idp, log_in, alice):
        claims = jwt.decode(log_in(alice)["access_token"], options={"verify_signature": False})
        assert claims["sub"] == alice.id and claims["username"] == "alice" and claims["amr"] == ["pwd"]
        assert isinstance(claims["role"], list) and isinstance(claims["auth_time"], int) and claims["sid"]

    def test_the_id_token(self, idp, log_in, alice):
        """OpenID Connect Core §2"""
        answer = log_in(alice, scope="openid email")
        claims = jwt.decode(answer["id_token"], options={"verify_signature": False})
        header = jwt.get_unverified_header(answer["id_token"])
        assert (header["typ"], header["alg"]) == ("JWT", "RS256")
        assert claims["aud"] == claims["azp"] == "service" and claims["email"] == "alice@example.org" and claims["email_verified"] is False
        assert claims["at_hash"] == m.b64url(hashlib.sha256(answer["access_token"].encode()).digest()[:16])
        assert "name" not in claims and claims["exp"] == idp.now() + 600
        assert "id_token" not in log_in(alice)

    def test_a_client_sets_its_own_lifetime(self, idp, auth, service):
        with idp.store.transaction(identity=True):
            idp.store.put_feature(idp.store.find_client("service").id, "TOKEN_EXPIRATION", True, "120")
        assert auth.post("/token", {"grant_type": "client_credentials"}, auth=service).json["expires_in"] == 120


class TestRefresh:
    """RFC 6749 §6, RFC 9700 §4.14.2"""

    def turn(self, auth, service, token, **more):
        return auth.post("/token", REFRESH | {"refresh_token": token} | more, auth=service)

    def test_a_token_works_once_and_its_reuse_ends_the_family(self, auth, service, log_in, alice):
        first = log_in(alice)
        second = self.turn(auth, service, first["refresh_token"])
        assert second.status == 200
        assert auth.get("/me", bearer=second.json["access_token"]).status == 200
        assert self.turn(auth, service, first["refresh_token"]).json["error"] == "invalid_grant"
        assert self.turn(auth, service, second.json["refresh_token"]).json["error"] == "invalid_grant"
        assert auth.get("/me", bearer=second.json["access_token"]).status == 401

    def test_another_family_lives_on(self, auth, service, log_in, alice):
        one, other = log_in(alice), log_in(alice)
        self.turn(auth, service, one["refresh_token"])
        self.turn(auth, service, one["refresh_token"])
        assert self.turn(auth, service, other["refresh_token"]).status == 200

    def test_it_belongs_to_its_client(self, auth, new_client, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        assert self.turn(auth, new_client("thief"), token).json["error"] == "invalid_grant"
        assert self.turn(auth, service, token).status == 200

    def test_a_request_may_narrow_the_scope_and_never_widen_it(self, auth, service, log_in, alice):
        answer = log_in(alice, scope="openid api:read")
        narrow = self.turn(auth, service, answer["refresh_token"], scope="api:read")
        assert narrow.json["scope"] == "api:read" and "id_token" not in narrow.json
        assert self.turn(auth, service, narrow.json["refresh_token"], scope="api:write").json["error"] == "invalid_scope"

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
        assert answer.json["error"] == "invalid_grant" and clock.now - m.RELEASED_AT <= 2592000 + 260000

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

    def test_it_is_off_unless_turned_on(self, make_idp, tmp_path, service, alice):
        from conftest import CHEAP, Caller

        idp = make_idp(m.Options(**CHEAP))
        auth = Caller(m.build_app(idp, m.AUTH))
        answer = auth.post("/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}, auth=service)
        assert answer.status == 200 and "refresh_token" not in answer.json
        assert auth.post("/token", REFRESH | {"refresh_token": "x"}, auth=service).json["error"] == "unsupported_grant_type"
        assert "refresh_token" not in auth.get("/.well-known/openid-configuration").json["grant_types_supported"]


class TestIntrospection:
    """RFC 7662 §2"""

    def test_only_its_own_client_or_one_with_the_right_learns_anything(self, auth, service, new_client, machine):
        assert introspect(auth, machine["access_token"], service)["active"] is True
        assert introspect(auth, machine["access_token"], new_client("resource", may_introspect=True))["client_id"] == "service"
        stranger = auth.post("/introspect", {"token": machine["access_token"]}, auth=new_client("stranger"))
        assert stranger.status == 200 and stranger.body == b'{"active":false}'

    def test_members_have_their_types(self, auth, service, log_in, alice):
        claims = introspect(auth, log_in(alice)["access_token"], service)
        assert claims["scope"] == "api:read" and claims["username"] == "alice" and claims["token_type"] == "Bearer"
        assert all(isinstance(claims[name], int) for name in ("exp", "iat", "nbf"))

    @pytest.mark.parametrize("token", ["", "x", "a.b.c", "e30.e30.e30", "\u00e4.b.c"])
    def test_rubbish_is_inactive(self, auth, service, token):
        answer = auth.post("/introspect", {"token": token}, auth=service)
        assert answer.body == b'{"active":false}' or (not token and answer.status == 400)

    def test_a_refresh_token_is_active_until_spent(self, auth, service, log_in, alice):
        token = log_in(alice)["refresh_token"]
        assert introspect(auth, token, service)["token_use"] == "refresh"
        auth.post("/token", REFRESH | {"refresh_token": token}, auth=service)
        assert introspect(auth, token, service) == {"active": False}

    def test_a_public_client_cannot_ask(self, auth, new_client, machine):
        new_client("spa", client_type="public", grant_types=["password"])
        assert auth.post("/introspect", {"token": machine["access_token"], "client_id": "spa"}).status == 401


class TestRevocation:
    """RFC 7009 §2"""

    def test_a_revoked_access_token_is_dead_everywhere(self, auth, service, machine):
        token = machine["access_token"]
        assert auth.post("/revoke", {"token": token}, auth=service).json["success"] is True
        assert introspect(auth, token, service) == {"active": False}
        assert auth.get("/me", bearer=token).status == 401

    def test_a_revoked_refresh_token_takes_its_family_along(self, auth, service, log_in, alice):
        answer = log_in(alice)
        auth.post("/revoke", {"token": answer["refresh_token"]}, auth=service)
        assert auth.get("/me", bearer=answer["access_token"]).status == 401
        assert auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service).status == 400

    def test_a_token_of_another_client_is_refused_and_lives(self, auth, service, new_client, machine, log_in, alice):
        thief, user = new_client("thief"), log_in(alice)
        for token in (machine["access_token"], user["refresh_token"]):
            assert auth.post("/revoke", {"token": token}, auth=thief).json["error"] == "unauthorized_client"
            assert introspect(auth, token, service)["active"] is True

    def test_an_unknown_or_forged_token_is_no_error(self, auth, service, machine):
        head, body, signature = machine["access_token"].split(".")
        for token in ("x", f"{head}.{body}.{'A' * len(signature)}"):
            assert auth.post("/revoke", {"token": token}, auth=service).status == 200
        assert introspect(auth, machine["access_token"], service)["active"] is True


class TestAlive:
    """RFC 9068 §4"""

    def test_a_token_dies_with_its_second(self, auth, machine, clock):
        clock.pass_(3599)
        assert auth.get("/me", bearer=machine["access_token"]).status == 200
        clock.pass_(1)
        assert auth.get("/me", bearer=machine["access_token"]).status == 401

    def test_a_token_from_the_future_is_refused(self, auth, machine, clock):
        clock.pass_(-61)
        assert auth.get("/me", bearer=machine["access_token"]).status == 401

    def test_what_is_issued_after_a_revocation_in_the_same_millisecond_lives(self, idp, auth, service, log_in, alice):
        before = log_in(alice)["access_token"]
        m.end_user(idp, m.LOCAL, "test", alice.id, "logout_all")
        assert auth.get("/me", bearer=before).status == 401
        assert auth.get("/me", bearer=log_in(alice)["access_token"]).status == 200

    def test_an_epoch_of_the_whole_server_ends_everything(self, idp, auth, machine):
        with idp.store.transaction(identity=True):
            idp.store.put_meta("revoked_before", idp.now_ms())
        assert auth.get("/me", bearer=machine["access_token"]).status == 401

    def test_an_id_token_is_no_access_token(self, auth, log_in, alice):
        assert auth.get("/me", bearer=log_in(alice, scope="openid")["id_token"]).status == 401


class TestAudit:
    def test_tokens_failures_and_lockouts_leave_a_row(self, idp, auth, service, machine, log_in, alice):
        answer = log_in(alice)
        auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service)
        auth.post("/token", {"grant_type": "client_credentials"}, auth=("service", "wrong"))
        auth.post("/token", {"grant_type": "password", "username": "alice", "password": "wrong wrong"}, auth=service)
        idp.store.flush()
        actions = {row.action for row in idp.store.list_audit(limit=100)}
        assert {"oidc_token_issued", "user_token_issued", "refresh_token_used", "client_authentication_failed", "user_login_failed"} <= actions
        assert any(row.ip_address == "192.0.2.7" and row.request_id == "r1" for row in idp.store.list_audit(limit=100))

    def test_each_row_carries_the_hash_of_the_row_before(self, idp, service, alice):
        rows = list(reversed(idp.store.list_audit(limit=1000)))
        digest = ""
        for row in rows:
            values = m.msgspec.structs.astuple(row)
            digest = m.chain(digest, row.seq, values[1:-1])
            assert digest == row.row_sha256
