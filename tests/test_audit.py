"""The audit log: what is written down, by whom, and that nothing is done which cannot be."""

import contextlib

import microauthd as m
import pytest
import sqlcipher3
from appliance.base.database import Unavailable

MACHINE = {"grant_type": "client_credentials"}

REFRESH = {"grant_type": "refresh_token"}


class TestAuditRows:
    def test_tokens_failures_and_lockouts_leave_one(self, idp, auth, service, machine, log_in, alice):
        answer = log_in(alice)
        auth.post("/token", REFRESH | {"refresh_token": answer["refresh_token"]}, auth=service)
        auth.post("/token", MACHINE, auth=("service", "wrong"))
        for _ in range(5):
            auth.post(
                "/token", {"grant_type": "password", "username": "alice", "password": "wrong wrong"}, auth=service
            )
        idp.store.flush()
        rows = idp.store.list_audit(limit=100)
        assert {
            "oidc_token_issued", "user_token_issued", "refresh_token_used", "client_authentication_failed",
            "user_login_failed", "user_locked_out",
        } <= {row.action for row in rows}
        (issued,) = [row for row in rows if row.action == "oidc_token_issued"]
        assert (issued.ip_address, issued.request_id, issued.actor_id, issued.at) == (
            "192.0.2.7", "r1", "service", idp.now(),
        ) and machine["jti"] in issued.secondary

    def test_a_user_agent_is_cut_and_cannot_forge(self, idp, auth, service):
        auth.post("/token", MACHINE, auth=service, headers=[("User-Agent", "a\x1b[31m\nb" + "x" * 5000)])
        idp.store.flush()
        row = idp.store.list_audit(limit=1)[0]
        assert len(row.user_agent) == 200 and row.user_agent.isprintable()

    def test_who_began_a_purge_of_many_slices_is_known(self, idp, monkeypatch, clock, service, alice):
        monkeypatch.setattr("microauthd.SLICE", 2)
        clock.pass_(40 * 86400)
        m.audit(idp, m.LOCAL.acting_as("test"), "now")
        m.purge_audit_log(idp, m.LOCAL.acting_as("system"), 30)
        assert idp.store.list_audit("audit_purge_begun", 1)

    @pytest.mark.parametrize("act", ["access", "refresh", "user"])
    def test_what_cannot_be_written_down_is_not_done(self, idp, auth, service, alice, log_in, monkeypatch, act):
        issued = log_in(alice)

        def fail(*_):
            raise sqlcipher3.OperationalError("database or disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(idp.store, "append_audit", fail)
            with contextlib.suppress(Unavailable):
                if act == "user":
                    m.revoke_user(idp, m.LOCAL.acting_as("t"), alice.id, "user_revoked")
                else:
                    auth.post("/revoke", {"token": issued[f"{act}_token"]}, auth=service)
        for name in ("access_token", "refresh_token"):
            assert auth.post("/introspect", {"token": issued[name]}, auth=service).json["active"] is True
