"""The published clients of the original work: the server accepts what they send and returns what they read.

Each test states a fact of the wire; the clients themselves are not here.
"""

import pytest
from conftest import CHEAP, PASSWORD
from appliance.base.settings import Options
from appliance.base.store import MAD_ADMIN_ROLE_ID

OTHER = "another battery staple"


@pytest.fixture
def options(tmp_path):
    return Options(
        **CHEAP, enable_token_refresh=True, oidc_issuer="https://idp.example", admin_domain="localhost",
        totp_qr_output_root=str(tmp_path),
    )


@pytest.fixture
def call(admin, admin_token):
    def call(method, path, body=None, status=200, **more):
        answer = admin(method, path, bearer=admin_token, json_body=body, **more)
        assert answer.status == status, answer
        return answer.json

    return call


class TestNamesOfMembers:
    """A member that a client sends under a name of its own has the meaning of the contract's member."""

    def test_a_user_without_an_address_is_one_whose_address_is_said_to_be_null(self, call):
        assert call("POST", "/users", {"username": "ann", "user_password": PASSWORD, "user_email": None})["email"] == ""
        assert "email" in call("POST", "/users", {"username": "bob", "user_password": PASSWORD}, 400)["errors"], (
            "forgotten is not null"
        )

    def test_a_reset_is_asked_for_by_password(self, call, alice, auth, service):
        call("POST", f"/users/{alice.id}/reset", {"password": OTHER})
        assert (
            auth.post("/token", {"grant_type": "password", "username": "alice", "password": OTHER}, auth=service).status
            == 200
        )

    @pytest.mark.parametrize(
        "path, made, sent, kept",
        [
            ("/roles", {"name": "r", "description": "d"}, {"description": "e"}, {"name": "r", "description": "e"}),
            (
                "/scopes", {"name": "s:x", "description": None}, {"description": "e"},
                {"name": "s:x", "desc": "e", "description": "e", "is_active": True},
            ),
            (
                "/clients",
                {"client_id": "c", "secret": "a very secret secret", "display_name": None, "audience": None},
                {"display_name": "C"}, {"client_id": "c", "display_name": "C", "audience": "microauthd"},
            ),
        ],
    )
    def test_what_a_put_leaves_out_stays(self, call, path, made, sent, kept):
        id = call("POST", path, made)["id"]
        assert (
            kept.items() <= call("PUT", f"{path}/{id}", sent).items()
            and kept.items() <= call("PUT", f"{path}/{id}", {}).items()
        )

    def test_scopes_are_assigned_one_or_many_under_each_name(self, call, alice, service, scopes):
        for holder in (f"/users/{alice.id}", "/clients/service"):
            for body in (
                {"scopeIds": ["api:write"]}, {"scope_id": "api:write", "user_id": alice.id},
                {"scope_ids": ["api:write"]},
            ):
                assert call("POST", holder + "/scopes", body)["success"] is True

    def test_roles_of_a_user_are_replaced_by_a_list_within_an_object(self, call, alice):
        role = call("POST", "/roles", {"name": "r"})
        assert call("PUT", f"/users/{alice.id}/roles", {"userId": alice.id, "roles": [{"id": role["id"]}]})[
            "success"
        ] is True and call("GET", f"/roles/user/{alice.id}") == [role["id"]]

    def test_an_object_that_was_read_can_be_put_back_whole(self, call, alice, service):
        for path in (f"/users/{alice.id}", "/clients/service", "/scopes/api:read"):
            shown = call("GET", path)
            assert call("PUT", path, shown) == shown


class TestNamesInAnswers:
    def test_an_id_by_name_stands_in_result_alone(self, call, alice, service):
        assert call("GET", "/users/id-by-name/alice") == {"result": alice.id}
        assert all(
            set(call("GET", f"/{kind}/id-by-name/{name}")) == {"result"}
            for kind, name in (("clients", "service"), ("scopes", "api:read"), ("roles", "MadAdmin"))
        )

    def test_what_is_not_there_is_404_on_reading_and_deleting(self, call):
        for kind in ("users", "roles", "permissions", "scopes", "clients"):
            for method, path in (
                ("GET", f"/{kind}/{MAD_ADMIN_ROLE_ID[:-1]}0"), ("DELETE", f"/{kind}/{MAD_ADMIN_ROLE_ID[:-1]}0"),
                ("GET", f"/{kind}/id-by-name/nobody"),
            ):
                call(method, path, status=404)

    def test_a_token_has_its_audience_under_both_names(self, admin, machine, root):
        answer = admin.post("/token", {"username": "root", "password": PASSWORD}).json
        assert answer["audience"] == answer["aud"] and answer["jti"] and machine["audience"] == machine["aud"]

    def test_sessions_refresh_tokens_and_audit_rows_have_both_names(self, call, log_in, alice):
        log_in(alice)
        session, refresh, row = (
            call("GET", path)[0]
            for path in (f"/sessions/user/{alice.id}", f"/refresh-tokens/user/{alice.id}", "/audit-logs")
        )
        assert (
            session["client_identifier"] == session["client_id"] == "service"
            and session["created_at"] == session["issued_at"]
        )
        assert (
            refresh["client_identifier"] == refresh["client_id"] == "service" and refresh["session_id"] == session["id"]
        )
        assert row["user_id"] == row["actor_id"] and row["ip"] == row["ip_address"]

    def test_the_answer_about_a_permission_by_name_is_truth_values_only(self, call, alice):
        for body in ({"permission": "none"}, {"scope": "api:read"}):
            answer = call("POST", "/check-access", {"user_id": alice.id} | body)
            assert "access" in answer and all(isinstance(value, bool) for value in answer.values())

    def test_a_message_has_exactly_two_members(self, call, alice):
        """A client that passes the members to a constructor fails on a third one."""
        for method, path, body in (
            ("POST", "/tokens/purge", {"user_id": alice.id, "client_id": None}),
            ("POST", "/refresh-tokens/purge", {"user_id": alice.id, "client_id": None}),
            ("POST", "/audit-logs/purge", {"older_than_days": 3}),
        ):
            assert set(call(method, path, body)) == {"success", "message"}


class TestPathsOfTheirOwn:
    def test_roles_permissions_and_scopes_are_given_and_taken_by_both_names_in_the_body(self, call, alice, service):
        role, permission = (
            call("POST", "/roles", {"name": "r"})["id"], call("POST", "/permissions", {"name": "p"})["id"],
        )
        scope, client = call("POST", "/scopes", {"name": "s:x"})["id"], call("GET", "/clients/service")["id"]
        for path, body in (
            ("/roles/assign", {"user_id": alice.id, "role_id": role}),
            ("/permissions/assign", {"role_id": role, "permission_id": permission}),
            ("/permissions/remove", {"role_id": role, "permission_id": permission}),
            ("/roles/remove", {"user_id": alice.id, "role_id": role}),
            ("/scopes/assign-to-user", {"user_id": alice.id, "scope_id": scope}),
            ("/scopes/assign-to-client", {"client_id": client, "scope_id": scope}),
            ("/scopes/remove-from-user", {"user_id": alice.id, "scope_id": scope}),
            ("/scopes/remove-from-client", {"client_id": client, "scope_id": scope}),
        ):
            assert call("POST", path, body)["success"] is True, path
        assert call("GET", f"/scopes/user/{alice.id}")[0]["name"] == "api:read" and {
            scope["name"] for scope in call("GET", f"/scopes/client/{client}")
        } == {"api:read", "api:write"}

    def test_a_password_is_verified_by_id_or_name_200_or_403(self, call, alice):
        for who in ({"user_id": alice.id}, {"username": "alice"}):
            assert call("POST", "/users/verify-password", who | {"password": PASSWORD})["valid"] is True
            call("POST", "/users/verify-password", who | {"password": "wrong"}, 403)

    def test_a_second_factor_needs_no_client_and_a_wrong_code_is_403(self, call, alice):
        assert call("POST", f"/users/{alice.id}/totp/generate", {"user_id": alice.id, "qr_output_path": "qr"})[
            "qr_code_filename"
        ].endswith(".svg")
        call("POST", "/users/totp/verify", {"user_id": alice.id, "code": "000000"}, 403)
        assert call("POST", f"/users/{alice.id}/disable-totp")["success"] is True

    def test_a_token_is_revoked_by_a_json_object_too(self, call, auth, machine):
        assert (
            call("POST", "/revoke", {"token": machine["access_token"]})["success"] is True
            and auth.get("/me", bearer=machine["access_token"]).status == 401
        )

    def test_a_machine_logs_in_asks_and_ends_at_the_paths_of_the_original(self, auth, service):
        """The only end-to-end test of the original that a server of the standards can pass."""
        client = {"client_id": service[0], "client_secret": service[1]}
        token = auth.post("/oidc/token", {"grant_type": "client_credentials"} | client).json["access_token"]
        assert auth.post("/introspect", {"token": token} | client, bearer=token).json["active"] is True
        assert auth.post("/revoke", {"token": token}, auth=service).json["success"] is True
        assert auth.post("/introspect", {"token": token}, auth=service).json == {"active": False}

    def test_me_tells_what_every_client_reads(self, auth, log_in, alice):
        me = auth.get("/me", bearer=log_in(alice)["access_token"]).json
        assert (
            me["sub"] == alice.id
            and me["email"] == "alice@example.org"
            and isinstance(me["roles"], list)
            and isinstance(me["scopes"], list)
        )


class TestWhatCannotWork:
    """What clients of the original do and this server refuses, because each would be a vulnerability."""

    def test_a_confidential_client_without_its_secret_gets_nothing(self, auth, alice, service):
        assert (
            auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "client_id": "service"}
            ).status
            == 401
        )

    def test_a_public_client_needs_none(self, auth, alice, public):
        answer = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "client_id": "spa"}
        )
        assert answer.status == 200 and answer.json["refresh_token"]

    @pytest.mark.parametrize("member", ["refresh_token", "token"])
    def test_a_public_client_refreshes_and_revokes_without_its_name(self, auth, alice, public, member):
        answer = auth.post(
            "/token", {"grant_type": "password", "username": "alice", "password": PASSWORD, "client_id": "spa"}
        ).json
        answer = auth.post("/token", {"grant_type": "refresh_token", member: answer["refresh_token"]}).json
        assert auth.get("/me", bearer=answer["access_token"]).status == 200
        assert auth.post("/revoke", {"token": answer["refresh_token"]}).status == 200
        assert auth.get("/me", bearer=answer["access_token"]).status == 401

    @pytest.mark.parametrize(
        "path, form",
        [
            ("/token", {"grant_type": "refresh_token", "refresh_token": "x"}), ("/revoke", {"token": "x"}),
            ("/introspect", {"token": "x"}),
        ],
    )
    def test_who_names_no_client_is_refused(self, auth, path, form):
        assert (auth.post(path, form).status, auth.post(path, form).json["error"]) == (401, "invalid_client")
