"""What a hostile reading of the ADMIN API found, each as a rule."""

import microauthd as m
import pytest
from conftest import PASSWORD


def forget_the_bug(idp):
    """The traceback in the log is the one this test made."""
    idp.stream.seek(0)
    idp.stream.truncate()


class TestScopedAdministration:
    @pytest.mark.parametrize(
        "take, status",
        [
            (lambda idp: m.remove_scope(idp, m.LOCAL, "t", m.get_client(idp, "clerk"), "admin:list_users"), 403),
            (lambda idp: m.delete_client(idp, m.LOCAL, "t", "clerk"), 401),
        ],
    )
    def test_a_right_that_was_taken_away_is_gone_before_its_token_is(self, idp, auth, new_client, take, status):
        client = new_client("clerk", scopes=["admin:list_users"])
        token = auth.post("/token", {"grant_type": "client_credentials"}, auth=client).json["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        take(idp)
        assert auth.get("/users", bearer=token).status == status

    def test_of_a_user_too(self, idp, auth, new_client, new_user):
        client = new_client("desk", scopes=["admin:list_users"])
        new_user("clerk", ["admin:list_users"])
        token = auth.post(
            "/token", {"grant_type": "password", "username": "clerk", "password": PASSWORD}, auth=client
        ).json["access_token"]
        assert auth.get("/users", bearer=token).status == 200
        m.remove_scope(idp, m.LOCAL, "t", m.get_user(idp, "clerk"), "admin:list_users")
        assert auth.get("/users", bearer=token).status == 403


class TestAudit:
    def test_an_introspection_names_the_administrator_who_asked(self, idp, call, root, machine):
        assert call("POST", "/introspect", {"token": machine["access_token"]}).status == 200
        row = idp.store.list_audit("admin.auth.token.introspect")[0]
        assert (row.actor_id, row.target) == (root.id, "service")

    def test_a_purge_is_written_down_before_its_first_row_goes(self, idp, call, root, monkeypatch):
        monkeypatch.setattr(idp.store, "purge_sessions", lambda *words, **more: 1 / 0)
        assert call("POST", "/sessions/purge", {"older_than_seconds": 0}).status == 500
        assert idp.store.list_audit(limit=1)[0].action == "purge_begun"
        forget_the_bug(idp)

    @pytest.mark.parametrize(
        "method, path, body",
        [
            ("POST", "/users", {"username": "new", "email": "new@example.org", "password": PASSWORD}),
            ("PUT", "/users/alice", {"email": "x@example.org"}), ("POST", "/users/alice/verify-email", None),
            ("POST", "/users/alice/deactivate", None),
            ("POST", "/users/alice/reset", {"new_password": "another battery staple"}),
            ("POST", "/users/alice/set-lockout", {"lockout_until": None}), ("POST", "/users/alice/revoke", None),
            ("POST", "/users/alice/totp/enroll", {}), ("DELETE", "/users/alice", None),
            ("POST", "/roles", {"name": "x"}), ("POST", "/permissions", {"name": "x"}),
            ("POST", "/scopes", {"name": "x"}), ("PUT", "/scopes/api:read", {"desc": "x"}),
            ("DELETE", "/scopes/api:read", None),
            ("POST", "/clients", {"client_id": "x", "client_secret": "sixteen characters"}),
            ("PUT", "/clients/service", {"display_name": "x"}),
            ("POST", "/clients/secret", {"client_id": "service", "new_secret": "sixteen characters"}),
            ("POST", "/clients/service/revoke", None), ("POST", "/clients/service/redirect-uris", "https://a.example/"),
            ("POST", "/client/options/ENABLE_TOTP", {"client_id": "service", "enabled": True}),
            ("POST", "/client/options/TOTP_ISSUER/ext", {"client_id": "service", "options": "x"}),
            ("POST", "/clients/service/idp", {"provider_key": "x"}), ("DELETE", "/clients/service", None),
            ("POST", "/clients/service/scopes", {"scope_ids": ["api:read"]}),
            ("DELETE", "/clients/service/scopes/api:read", None),
            ("POST", "/users/alice/scopes", {"scope_ids": ["api:write"]}), ("POST", "/logout", None),
        ],
    )
    def test_every_change_leaves_a_row_in_its_own_transaction(
        self, idp, call, root, alice, service, monkeypatch, method, path, body
    ):
        before = idp.store.list_audit(limit=1)[0].seq
        table = idp.store.connection.execute("SELECT count(*), max(modified_at) FROM account").fetchone()
        append = idp.store.append_audit
        monkeypatch.setattr(idp.store, "append_audit", lambda *words: 1 / 0)
        assert call(method, path, body).status == 500, "a change that cannot be written down is none"
        assert idp.store.connection.execute("SELECT count(*), max(modified_at) FROM account").fetchone() == table
        forget_the_bug(idp)
        monkeypatch.setattr(idp.store, "append_audit", append)
        made = method == "POST" and path.endswith(("/redirect-uris", "/idp"))
        assert call(method, path, body).status == (201 if made else 200)
        rows = [row for row in idp.store.list_audit(limit=10) if row.seq > before]
        assert (
            rows
            and {row.actor_id for row in rows} == {root.id}
            and not any("another battery" in str(row) or "sixteen" in str(row) for row in rows)
        )
