"""Key rings over ADMIN: listed, rotated and revoked by an administrator, with what that would end."""

import microauthd as m
import pytest
from conftest import CHEAP, PASSWORD, Caller, opened
from appliance.base.settings import Options
from appliance.recovery import describe_keys


@pytest.fixture
def idp(house):
    idp = opened(house)
    idp.ring_versions = {port: (b"", None) for port in ("auth", "admin")}  # as a server: reload what changed
    yield idp
    idp.store.close()


@pytest.fixture
def call(idp):
    admin = Caller(m.guard_admin(m.App(idp, m.ADMIN), idp), "127.0.0.1:9041")
    token = admin.post("/token", {"username": "root", "password": PASSWORD}).json["access_token"]

    def call(method, path, body=None):
        idp.next_ring_check = 0.0
        return admin(method, path, bearer=token, json_body=body)

    return call


def kid_of(call, ring, alg):
    return next(key["kid"] for key in call("GET", "/keys").json if (key["ring"], key["alg"]) == (ring, alg))


class TestKeys:
    def test_each_says_what_it_signs_and_since_when(self, call, house):
        shown = call("GET", "/keys").json
        assert {(key["ring"], key["alg"], key["state"], *key["signs"]) for key in shown} >= {
            ("auth", "ES256", "active", "access_token"), ("auth", "RS256", "active", "id_token"),
        }
        assert {key["kid"] for key in shown} == {row["kid"] for row in describe_keys(house)}
        assert all(key["signs_from"] == key["since"] and key["gone_after"] is None for key in shown)

    def test_a_rotation_publishes_a_key_that_signs_later(self, call, idp, house):
        before = {key["kid"] for key in call("GET", "/keys").json}
        (made,) = call("POST", "/keys/rotate", {"ring": "auth", "alg": "ES256"}).json
        assert made["kid"] not in before and (made["state"], made["signs"]) == ("next", [])
        assert m.read_time(made["signs_from"]) == m.read_time(made["since"]) + house.key_overlap
        assert made["kid"] in {key["kid"] for key in call("GET", "/keys").json}
        row = idp.store.list_audit("keys_rotated")[0]
        assert (row.actor_id, row.target, row.secondary) == (m.get_user(idp, "root").id, "auth", made["kid"])

    @pytest.mark.parametrize(
        "body, status", [({"ring": "x"}, 400), ({"alg": "none"}, 400), ({"ring": "admin", "alg": "RS256"}, 400)]
    )
    def test_what_cannot_be_rotated_is_refused_and_nothing_is_made(self, call, house, body, status):
        before = describe_keys(house)
        answer = call("POST", "/keys/rotate", body)
        assert answer.status == status and len(describe_keys(house)) == len(before)

    def test_a_second_rotation_waits_for_the_first(self, call):
        assert call("POST", "/keys/rotate", {"ring": "auth", "alg": "ES256"}).status == 200
        refused = call("POST", "/keys/rotate", {"ring": "auth", "alg": "ES256"})
        assert refused.status == 400 and "waits to sign already" in refused.json["errors"]["ring"]

    def test_a_revoked_key_is_gone_and_what_it_signed_is_dead(self, call, idp):
        auth = Caller(m.App(idp, m.AUTH))
        client, secret = "app", m.change_secret(idp, m.LOCAL.acting_as("test"), m.ChangeSecret("app"))
        ask = lambda: auth.post("/token", {"grant_type": "client_credentials"}, auth=(client, secret)).json  # noqa: E731
        token = ask()["access_token"]
        idp.store.flush()
        kid = kid_of(call, "auth", "ES256")
        impact = call("GET", f"/keys/{kid}/impact").json
        assert (impact["tokens"], impact["clients"], impact["users"], impact["is_lower_bound"]) == (1, 1, 0, False)
        assert call("GET", f"/keys/{kid_of(call, 'auth', 'RS256')}/impact").json["tokens"] == 0
        assert call("POST", f"/keys/{kid}/revoke").status == 200
        idp.next_ring_check = 0.0
        assert auth.get("/whoami", bearer=token).status == 401
        idp.next_ring_check = 0.0
        assert auth.get("/whoami", bearer=ask()["access_token"]).status == 200, "a new key signs"
        assert kid not in {key["kid"] for key in call("GET", "/keys").json}
        assert idp.store.list_audit("key_revoked")[0].actor_id == m.get_user(idp, "root").id
        assert call("POST", f"/keys/{kid}/revoke").status == 404 and call("GET", f"/keys/{kid}/impact").status == 404

    def test_the_key_of_admin_takes_the_login_that_revoked_it(self, call, idp):
        kid = kid_of(call, "admin", "ES256")
        assert call("GET", f"/keys/{kid}/impact").json["tokens"] == 1
        assert call("POST", f"/keys/{kid}/revoke").status == 200
        assert call("GET", "/keys").status == 401

    def test_a_ring_that_cannot_be_read_is_no_fault_of_the_caller(self, make_idp, tmp_path):
        idp = make_idp(Options(**CHEAP, token_signing_key_file=str(tmp_path / "gone.pem"), admin_domain="localhost"))
        with pytest.raises(m.Problem) as raised:
            idp.machine.rotate_keys(idp, m.LOCAL, "auth", "")
        assert raised.value.status == 503
