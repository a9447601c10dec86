"""Sessions: is this token alive? Introspection, revocation, the end of logins."""

import contextlib
import threading

import microauthd as m
import pytest
from conftest import CHEAP, Caller
from appliance.base.clock import IAT_SKEW
from appliance.base.settings import Options

REFRESH = {"grant_type": "refresh_token"}
INACTIVE = b'{"active":false}'


def introspect(auth, token, client):
    return auth.post("/introspect", {"token": token}, auth=client).json


class TestAlive:
    """RFC 9068 §4. A token that is not alive is dead on every path that is handed one."""

    @pytest.fixture
    def alive(self, auth, service):
        def call(answer):
            token = answer["access_token"]
            found = {auth.get("/me", bearer=token).status == 200, introspect(auth, token, service)["active"]}
            if "openid" in answer.get("scope", ""):
                found |= {
                    auth.get("/userinfo", bearer=token).status == 200,
                    auth.get("/me/sessions", bearer=token).status == 200,
                }
            (verdict,) = found  # all paths agree
            return verdict

        return call

    def test_a_token_dies_with_its_second(self, alive, machine, clock):
        clock.pass_(3599)
        assert alive(machine)
        clock.pass_(1)
        assert not alive(machine)

    def test_a_token_from_the_future_is_refused(self, alive, machine, clock):
        clock.pass_(-IAT_SKEW)
        assert alive(machine)
        clock.pass_(-1)
        assert not alive(machine)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE account SET is_active = 0 WHERE username = 'alice'",
            "UPDATE account SET revoked_before = 9999999999999 WHERE username = 'alice'",
            "DELETE FROM account WHERE username = 'alice'", "UPDATE family SET revoked_at = 1", "DELETE FROM family",
            "UPDATE meta SET value = '9999999999999' WHERE name = 'revoked_before'",
            "UPDATE client SET revoked_before = 9999999999999",
        ],
    )
    def test_a_users_token_dies_with_what_it_hangs_on(self, alive, log_in, alice, change, statement):
        answer = log_in(alice, scope="openid")
        assert alive(answer)
        change(statement)
        assert not alive(answer)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE client SET is_active = 0 WHERE client_id = 'other'",
            "UPDATE client SET revoked_before = 9999999999999 WHERE client_id = 'other'",
            "DELETE FROM client WHERE client_id = 'other'",
        ],
    )
    def test_a_machines_token_dies_with_its_client(self, auth, new_client, change, statement):
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=new_client("other")).json["access_token"]
        reader = new_client("reader", may_introspect=True)
        assert introspect(auth, token, reader)["active"] is True
        change(statement)
        assert introspect(auth, token, reader) == {"active": False} and auth.get("/me", bearer=token).status == 401

    def test_a_token_for_a_former_audience_is_dead(self, alive, machine, change):
        change("UPDATE client SET audience = 'another api'")
        assert not alive(machine)

    def test_a_user_who_is_back_is_back(self, alive, log_in, alice, change):
        answer = log_in(alice)
        change("UPDATE account SET is_active = 0 WHERE username = 'alice'")
        assert not alive(answer)
        change("UPDATE account SET is_active = 1 WHERE username = 'alice'")
        assert alive(answer)

    def test_what_is_issued_after_a_revocation_in_the_same_millisecond_lives(self, idp, alive, log_in, alice):
        for _ in range(3):
            before = log_in(alice)
            assert alive(before)
            m.revoke_user(idp, m.LOCAL.acting_as("test"), alice.id, "logout_all")
            assert not alive(before)

    def test_the_millisecond_of_a_revocation_is_dead(self, make_idp, alice, service, change):
        """Without the rows, the epoch alone decides."""
        idp = make_idp(Options(**CHEAP, enable_token_revocation=False))
        auth = Caller(m.App(idp, m.AUTH))
        answer = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": alice.password}, auth=service
        ).json
        for epoch, status in ((-1, 200), (0, 401), (1, 401)):
            change(
                "UPDATE account SET revoked_before = :ms WHERE id = :id", ms=m.jti_ms(answer["jti"]) + epoch,
                id=alice.id,
            )
            assert auth.get("/me", bearer=answer["access_token"]).status == status

    def test_no_row_is_needed(self, idp, alive, machine, change):
        idp.store.flush()
        change("DELETE FROM session")
        assert alive(machine)

    @pytest.mark.parametrize("kind", ["id_token", "refresh_token"])
    def test_another_token_is_no_access_token(self, auth, log_in, alice, kind):
        assert auth.get("/me", bearer=log_in(alice, scope="openid")[kind]).status == 401

    def test_a_token_of_another_issuer_is_dead(self, idp, auth, machine):
        claims = idp.auth_ring.verify(machine["access_token"], m.AT_JWT)
        for other in ({"iss": "https://other.example"}, {"iss": idp.options.admin_issuer}):
            assert (
                auth.get("/me", bearer=idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims | other)).status == 401
            )

    @pytest.mark.parametrize("skew, status", [(0, 200), (60, 200), (61, 401)])
    def test_a_token_is_dead_before_its_nbf(self, idp, auth, machine, skew, status):
        claims = idp.auth_ring.verify(machine["access_token"], m.AT_JWT) | {"nbf": idp.now() + skew}
        assert auth.get("/me", bearer=idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims)).status == status

    def test_a_token_of_auth_names_its_client(self, idp, auth, machine):
        claims = idp.auth_ring.verify(machine["access_token"], m.AT_JWT)
        del claims["client_id"]
        assert auth.get("/me", bearer=idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims)).status == 401

    @pytest.mark.parametrize("name", ["client_id", "sid", "scope", "username", "amr", "auth_time", "nbf", "role", "roles"])
    def test_a_token_without_a_claim_is_no_error_of_the_server_anywhere(
        self, idp, auth, admin, admin_token, service, log_in, alice, name
    ):
        claims = dict(idp.auth_ring.verify(log_in(alice, scope="openid")["access_token"], m.AT_JWT))
        del claims[name]
        token = idp.auth_ring.mint(idp.auth_ring.access, m.AT_JWT, claims)
        refresh = {"grant_type": "refresh_token", "refresh_token": token}
        good = (200,) if name not in ("client_id", "sid") else (401,)
        for path in ("/me", "/userinfo", "/me/sessions"):
            status = auth.get(path, bearer=token).status
            assert status in good or (status, name, path) == (403, "scope", "/userinfo")
        for answer in (
            auth.post("/introspect", {"token": token}, auth=service), auth.post("/token", refresh),
            admin.post("/introspect", {"token": token}, bearer=admin_token), auth.post("/revoke", {"token": token}),
            auth.post("/revoke", {"token": token}, auth=service), auth.post("/logout-all", bearer=token),
        ):
            assert answer.status in (200, 400, 401), answer

    def test_a_verdict_is_not_remembered_with_the_signature(self, idp, alive, auth, service, machine):
        assert alive(machine) and machine["access_token"] in idp.auth_ring.verified
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        assert not alive(machine)

    def test_without_revocation_expiry_users_and_clients_still_count(
        self, make_idp, machine, log_in, alice, service, change, clock
    ):
        auth = Caller(
            m.App(
                make_idp(Options(**CHEAP, enable_token_revocation=False, oidc_issuer="https://idp.example")), m.AUTH
            )
        )
        user = log_in(alice)
        assert auth.post("/revoke", {"token": machine["access_token"]}, auth=service).status == 200
        assert auth.get("/me", bearer=machine["access_token"]).status == 200
        change("UPDATE account SET is_active = 0")
        assert auth.get("/me", bearer=user["access_token"]).status == 401
        clock.pass_(3600)
        assert auth.get("/me", bearer=machine["access_token"]).status == 401

    def test_what_introspection_calls_active_was_not_revoked(self, make_idp, machine, service):
        """RFC 7662 §2.2, whatever the guards ask."""
        auth = Caller(
            m.App(
                make_idp(Options(**CHEAP, enable_token_revocation=False, oidc_issuer="https://idp.example")), m.AUTH
            )
        )
        auth.post("/revoke", {"token": machine["access_token"]}, auth=service)
        assert introspect(auth, machine["access_token"], service) == {"active": False}

    def test_the_millisecond_of_the_epoch_of_the_server_is_dead(self, auth, service, alice, log_in, change):
        issued = log_in(alice)
        change("UPDATE meta SET value = :ms WHERE name = 'revoked_before'", ms=str(m.jti_ms(issued["jti"])))
        assert auth.get("/me", bearer=issued["access_token"]).status == 401
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": issued["refresh_token"]}, auth=service
            ).status
            == 400
        )

    def test_the_millisecond_of_the_epoch_of_a_client_ends_its_logins(self, auth, service, alice, log_in, change):
        issued = log_in(alice)
        change("UPDATE client SET revoked_before = :ms", ms=m.jti_ms(issued["jti"]))
        assert (
            auth.post(
                "/token", {"grant_type": "refresh_token", "refresh_token": issued["refresh_token"]}, auth=service
            ).status
            == 400
        )

    def test_a_session_of_the_millisecond_of_a_revocation_is_shown_as_dead(self, idp, alice, log_in, change):
        jti = log_in(alice)["jti"]
        change("UPDATE account SET revoked_before = :ms", ms=m.jti_ms(jti))
        assert m.is_session_revoked(idp.store.find_session(jti))

    def test_a_row_that_waits_in_another_process_is_waited_for(self, idp, make_idp):
        other, jti = make_idp(idp.options), m.new_jti(idp.now_ms())
        other.store.enqueue((jti, "service", "", idp.now(), idp.now() + 60), None)
        threading.Timer(0.01, other.store.flush).start()
        assert m.get_session(idp, jti).id == jti


class TestIntrospection:
    """RFC 7662 §2"""

    def test_only_its_own_client_or_one_with_the_right_learns_anything(
        self, auth, service, new_client, machine, log_in, alice
    ):
        user, reader, stranger = log_in(alice), new_client("reader", may_introspect=True), new_client("stranger")
        for token in (machine["access_token"], user["access_token"], user["refresh_token"]):
            assert (
                introspect(auth, token, service)["client_id"]
                == introspect(auth, token, reader)["client_id"]
                == "service"
            )
            answer = auth.post("/introspect", {"token": token}, auth=stranger)
            assert (answer.status, answer.body) == (200, INACTIVE)

    def test_members_have_their_types(self, auth, service, log_in, alice):
        claims = introspect(auth, log_in(alice)["access_token"], service)
        assert (
            claims["active"] is True
            and claims["scope"] == "api:read"
            and claims["username"] == "alice"
            and claims["token_type"] == "Bearer"
            and claims["sub"] == alice.id
        )
        assert all(type(claims[name]) is int for name in ("exp", "iat", "nbf")) and None not in claims.values()

    def test_what_has_no_scope_names_none(self, auth, new_client):
        client = new_client("bare", scopes=[])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        assert "scope" not in introspect(auth, token, client)

    @pytest.mark.parametrize("token", ["x", "a.b.c", "..", "e30.e30.e30", "\u00e4.b.c", "a" * 60_000, "null"])
    def test_rubbish_is_exactly_inactive(self, auth, service, token):
        answer = auth.post("/introspect", {"token": token}, auth=service)
        assert (answer.status, answer.body) == (200, INACTIVE) and answer.headers["cache-control"] == "no-store"

    def test_no_token_is_invalid_request(self, auth, service):
        for form in ({}, {"token": ""}):
            assert auth.post("/introspect", form, auth=service).json["error"] == "invalid_request"

    def test_a_hint_is_no_more_than_a_hint(self, auth, service, machine):
        for hint in ("refresh_token", "access_token", "nonsense"):
            assert (
                auth.post(
                    "/introspect", {"token": machine["access_token"], "token_type_hint": hint}, auth=service
                ).json["active"]
                is True
            )

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE account SET is_active = 0", "UPDATE account SET revoked_before = 9999999999999",
            "UPDATE family SET revoked_at = 1", "UPDATE family SET expires_at = 1",
            "UPDATE refresh_token SET expires_at = 1", "UPDATE refresh_token SET revoked_at = 1",
            "UPDATE refresh_token SET rotated_at = 1", "UPDATE client SET revoked_before = 9999999999999",
        ],
    )
    def test_a_refresh_token_is_active_while_it_could_be_used(self, auth, service, log_in, alice, change, statement):
        token = log_in(alice)["refresh_token"]
        found = introspect(auth, token, service)
        assert (
            found["token_use"] == "refresh"
            and found["exp"]
            and found["scope"] == "api:read"
            and found["sub"] == alice.id
        )
        change(statement)
        assert introspect(auth, token, service) == {"active": False}
        assert auth.post("/token", REFRESH | {"refresh_token": token}, auth=service).json["error"] == "invalid_grant"

    def test_a_public_client_cannot_ask(self, auth, public, machine):
        answer = auth.post("/introspect", {"token": machine["access_token"], "client_id": "spa"})
        assert (answer.status, answer.json["error"]) == (401, "invalid_client")

    def test_nobody_asks_without_a_secret(self, auth, machine):
        for form in ({}, {"client_id": "service"}, {"client_id": "service", "client_secret": "wrong wrong wrong"}):
            answer = auth.post("/introspect", {"token": machine["access_token"]} | form)
            assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert (
            auth.post("/introspect", {"token": machine["access_token"]}, bearer=machine["access_token"]).status == 401
        )


class TestRevocation:
    """RFC 7009 §2"""

    def test_a_revoked_access_token_is_dead_and_its_login_lives(self, auth, service, log_in, alice):
        answer = log_in(alice)
        done = auth.post("/revoke", {"token": answer["access_token"]}, auth=service)
        assert (done.status, set(done.json), done.json["success"]) == (200, {"success", "message"}, True)
        assert auth.get("/me", bearer=answer["access_token"]).status == 401
        assert auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service).status == 200

    def test_a_revoked_refresh_token_takes_its_family_along_and_no_other(self, auth, service, log_in, alice):
        answer, other = log_in(alice), log_in(alice)
        auth.post("/revoke", {"token": answer["refresh_token"]}, auth=service)
        assert auth.get("/me", bearer=answer["access_token"]).status == 401
        assert (
            auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service).json["error"]
            == "invalid_grant"
        )
        assert auth.get("/me", bearer=other["access_token"]).status == 200

    def test_an_old_refresh_token_of_a_family_ends_it_too(self, auth, service, log_in, alice):
        first = log_in(alice)
        second = auth.post("/token", REFRESH | {"refresh_token": first["refresh_token"]}, auth=service).json
        auth.post("/revoke", {"token": first["refresh_token"]}, auth=service)
        assert auth.get("/me", bearer=second["access_token"]).status == 401

    def test_a_token_of_another_client_is_answered_as_one_of_nobody_and_lives(
        self, idp, auth, service, public, new_client, machine, log_in, alice
    ):
        """RFC 7009 §2.2"""
        thief, reader, user = new_client("thief"), new_client("reader", may_introspect=True), log_in(alice)
        for client in (thief, reader):
            for token in (machine["access_token"], user["access_token"], user["refresh_token"]):
                answers = [auth.post("/revoke", {"token": one}, auth=client) for one in (token, "x" * 43)]
                assert answers[0].status == answers[1].status == 200
                assert answers[0].body == answers[1].body and answers[0].headers == answers[1].headers
                assert introspect(auth, token, service)["active"] is True
        assert auth.post("/revoke", {"token": user["refresh_token"], "client_id": "spa"}).status == 200
        assert introspect(auth, user["refresh_token"], service)["active"] is True
        assert not [row for row in idp.store.list_audit(limit=100) if "revoked" in row.action]

    def test_an_unknown_forged_or_foreign_token_is_no_error_and_does_nothing(
        self, idp, auth, service, machine, log_in, alice, admin_token
    ):
        head, body, signature = machine["access_token"].split(".")
        for token in (
            "x", "..", f"{head}.{body}.{'A' * len(signature)}", f"{head}.{body}.",
            log_in(alice, scope="openid")["id_token"], admin_token, "\u00e4",
        ):
            assert auth.post("/revoke", {"token": token}, auth=service).status == 200
        assert introspect(auth, machine["access_token"], service)["active"] is True
        assert idp.store.connection.execute("SELECT count(*) FROM revoked_token").fetchone() == (0,)

    def test_twice_is_no_error(self, auth, service, machine):
        for _ in range(2):
            assert auth.post("/revoke", {"token": machine["access_token"]}, auth=service).status == 200

    def test_a_public_client_ends_its_own(self, auth, public, alice):
        answer = auth.post(
            "/token", {"grant_type": "password", "client_id": "spa", "username": "alice", "password": alice.password}
        ).json
        assert auth.post("/revoke", {"token": answer["refresh_token"], "client_id": "spa"}).status == 200
        assert auth.get("/me", bearer=answer["access_token"]).status == 401

    @pytest.mark.parametrize("kind", ["access_token", "refresh_token"])
    def test_a_public_client_ends_its_own_without_naming_itself(self, idp, auth, public, alice, clock, kind):
        """RFC 7009 §2.1: the token says whose it is. §2.2: one that has expired is no error."""
        form = {"grant_type": "password", "client_id": "spa", "username": "alice", "password": alice.password}
        answer, other = (auth.post("/token", form).json for _ in range(2))
        for _ in range(2):
            assert auth.post("/revoke", {"token": answer[kind]}).status == 200
        assert idp.store.list_audit(limit=1)[0].actor_id == "spa"
        assert auth.get("/me", bearer=answer["access_token"]).status == 401
        assert auth.get("/me", bearer=other["access_token"]).status == 200
        clock.pass_(10**8)
        assert auth.post("/revoke", {"token": other[kind]}).status == 200

    def test_without_a_client_any_other_token_is_refused_and_lives(self, auth, service, public, machine, log_in, alice):
        """A token of a confidential client and one that nobody knows are answered alike."""
        user, unknown = log_in(alice), auth.post("/revoke", {"token": "x"})
        assert (unknown.status, unknown.json["error"]) == (401, "invalid_client")
        for token in (machine["access_token"], user["access_token"], user["refresh_token"]):
            answer = auth.post("/revoke", {"token": token})
            assert (answer.status, answer.body, answer.headers) == (unknown.status, unknown.body, unknown.headers)
            assert introspect(auth, token, service)["active"] is True

    def test_a_public_client_that_names_another_or_is_switched_off_is_refused(self, auth, public, alice, change):
        form = {"grant_type": "password", "client_id": "spa", "username": "alice", "password": alice.password}
        token = auth.post("/token", form).json["refresh_token"]
        for more in ({"client_id": "nobody"}, {"client_secret": "x"}):
            assert auth.post("/revoke", {"token": token} | more).json["error"] == "invalid_client"
        change("UPDATE client SET is_active = 0")
        assert auth.post("/revoke", {"token": token}).json["error"] == "invalid_client"

    def test_introspection_always_names_a_client(self, auth, public, alice):
        """RFC 7662 §2.1"""
        form = {"grant_type": "password", "client_id": "spa", "username": "alice", "password": alice.password}
        answer = auth.post("/token", form).json
        for token in (answer["access_token"], answer["refresh_token"]):
            assert auth.post("/introspect", {"token": token}).json["error"] == "invalid_client"

    def test_each_leaves_a_row(self, idp, auth, service, machine, log_in, alice):
        user = log_in(alice)
        for token in (machine["access_token"], user["refresh_token"]):
            auth.post("/revoke", {"token": token}, auth=service)
        assert {"token_revoked", "refresh_token_revoked"} <= {row.action for row in idp.store.list_audit(limit=5)}


class TestEnding:
    def test_ending_a_user_ends_both_ports_and_every_client(
        self, idp, auth, admin, service, new_client, log_in, root, admin_token
    ):
        answers = [log_in(root), log_in(root, client=new_client("other"))]
        m.revoke_user(idp, m.LOCAL.acting_as("test"), root.id, "logout_all")
        assert all(auth.get("/me", bearer=answer["access_token"]).status == 401 for answer in answers)
        assert (
            auth.post("/token", REFRESH | {"refresh_token": answers[0]["refresh_token"]}, auth=service).json["error"]
            == "invalid_grant"
        )
        assert admin.get("/users", bearer=admin_token).status == 401

    def test_ending_another_user_ends_nothing_of_ours(self, idp, auth, log_in, alice, new_user):
        answer = log_in(alice)
        m.revoke_user(idp, m.LOCAL.acting_as("test"), new_user("bob").id, "logout_all")
        assert auth.get("/me", bearer=answer["access_token"]).status == 200

    def test_it_counts_in_every_process_at_once(self, idp, make_idp, log_in, alice):
        other = make_idp(idp.options)
        other.store.generation = idp.store.generation
        auth = Caller(m.App(other, m.AUTH))
        answer = log_in(alice)
        assert auth.get("/me", bearer=answer["access_token"]).status == 200
        m.revoke_user(idp, m.LOCAL.acting_as("test"), alice.id, "logout_all")
        assert auth.get("/me", bearer=answer["access_token"]).status == 401

    def test_what_a_user_had_stays_dead_when_the_user_is_active_again(self, idp, auth, service, log_in, alice, clock):
        answer = log_in(alice)
        clock.pass_(1)
        for is_active in (False, True):
            m.set_user_active(idp, m.LOCAL.acting_as("test"), alice.id, is_active)
        assert auth.get("/me", bearer=answer["access_token"]).status == 401
        refused = auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service)
        assert (refused.status, refused.json["error"]) == (400, "invalid_grant")

    @pytest.mark.parametrize("passed, code", [(3599, None), (3600, "unchanged")])
    def test_a_session_is_ended_until_the_second_it_expires(self, idp, log_in, alice, clock, passed, code):
        answer = log_in(alice)
        clock.pass_(passed)
        with pytest.raises(m.Problem, match="^unchanged") if code else contextlib.nullcontext():
            m.revoke_session(idp, m.LOCAL.acting_as("test"), answer["jti"])
        assert idp.store.is_revoked(answer["jti"]) is (code is None)

    def test_an_administrator_who_revokes_an_access_token_ends_its_login(self, auth, service, log_in, alice, call):
        answer = log_in(alice)
        assert call("POST", "/revoke", {"token": answer["access_token"]}).status == 200
        refused = auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service)
        assert (refused.status, refused.json["error"]) == (400, "invalid_grant")
