"""An administrator who is locked out is let in again at the machine, beside a server that runs."""

import signal

import microauthd as m
import pyotp
import pytest
from box import Box
from conftest import PASSWORD, die, in_child
from appliance.base.store import Store
from appliance.recovery import open_idp, recover_admin

NEW = "another battery staple"


class TestBesideARunningServer:
    def log_in(self, box, username, password, **more):
        return box.admin("POST", "/token", {"username": username, "password": password, "client_id": "test"} | more)

    def recover(self, box, username, *words):
        done = box.run("admin", "recover", "--username", username, "--password-stdin", *words, input=NEW + "\n")
        assert done.returncode == 0 and NEW not in done.stdout + done.stderr, done.stderr
        return done.stdout

    def test_one_of_a_new_name_is_made_and_one_who_lost_everything_gets_in_again(self, tmp_path):
        with Box(tmp_path / "data", workers="2") as box:
            root = box.admin_token()
            assert "administrator second made" in self.recover(box, "Second")
            second = self.log_in(box, "second", NEW).json["access_token"]
            (user,) = [user for user in box.admin("GET", "/users", bearer=root).json if user["username"] == "second"]

            # What can keep an administrator out: a second factor that is lost, a lockout, a role that is gone.
            seed = box.admin("POST", f"/users/{user['id']}/totp/enroll", json_body={}, bearer=root).json["secret"]
            assert (
                box.admin(
                    "POST", f"/users/{user['id']}/totp/verify", json_body={"code": pyotp.TOTP(seed).now()}, bearer=root
                ).status
                == 200
            )
            assert (
                box.admin(
                    "POST", f"/users/{user['id']}/set-lockout", json_body={"lockout_until": "9999-12-31T23:59:59Z"},
                    bearer=root,
                ).status
                == 200
            )
            assert (
                box.admin(
                    "POST", "/roles/unassign", json_body={"user_id": user["id"], "role_id": "MadAdmin"}, bearer=root
                ).status
                == 200
            )
            assert self.log_in(box, "second", NEW).status == 403

            said = self.recover(box, "second")
            assert "recovered" in said and "no lockout" in said and "second factor" not in said
            assert self.log_in(box, "second", NEW).status == 403, "the second factor stays unless it is to go"
            assert "no second factor" in self.recover(box, "second", "--disable-totp")
            fresh = self.log_in(box, "second", NEW)
            assert (
                fresh.status == 200
                and box.admin("GET", "/users", bearer=second).status == 401
                and box.admin("GET", "/users", bearer=root).status == 200
            )
            rows = box.admin("GET", "/audit-logs?action=admin_recovered", bearer=root).json
            assert [row["actor_id"] for row in rows] == ["machine"] * 3 and [row["target"] for row in rows] == [
                user["id"]
            ] * 3
            assert NEW not in box.said()

    def test_no_route_leads_to_any_of_this(self):
        """The network can neither recover, restore, rotate nor reset."""
        for routes in (m.AUTH, m.ADMIN):
            for route in routes.routes:
                assert not any(
                    word in path
                    for path in route.paths
                    for word in ("recover", "restore", "rotate", "factory", "keys/")
                ), route.paths


class TestAtTheMachine:
    @pytest.mark.parametrize("step", ["set_password_hash", "assign_role", "clear_totp", "append_audit"])
    def test_killed_in_the_middle_it_has_done_nothing(self, house, step):
        def work():
            setattr(Store, step, die)
            recover_admin(house, "root", NEW, drop_totp=True)

        assert in_child(work) == signal.SIGKILL
        idp = open_idp(house)
        account, _ = m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)
        assert account.username == "root" and not idp.store.list_audit("admin_recovered")
        idp.store.close()

    def test_an_empty_answer_sets_no_password(self, house, tmp_path):
        with pytest.raises(m.Problem):
            recover_admin(house, "root", "")
        idp = open_idp(house)
        assert m.authenticate_user(idp, m.LOCAL, "root", PASSWORD, admin=True)
        idp.store.close()
