"""Clients: registration, authentication, scopes."""

import base64
import collections
import re
import threading
import time
from urllib.parse import quote_plus

import microauthd as m
import pytest
from conftest import CHEAP, PASSWORD, SECRETS, Caller
from hypothesis import given
from hypothesis import strategies as st
from appliance.base.settings import Options
from appliance.base.store import MAD_ADMIN_ROLE_ID, SEEDED_SCOPES
from appliance.base.hashing import Argon2Memory, Hasher, NameLocks
from appliance.base.objects import ChangeSecret, CreateClient, CreateScope, CreateUser, UpdateClient, UpdateScope

MACHINE = {"grant_type": "client_credentials"}
BUSY = "The server is busy; try again later."


def basic(client_id, secret):
    return base64.b64encode(f"{client_id}:{secret}".encode()).decode()


class TestScopes:
    """RFC 6749 §3.3: requested ∩ client's ∩ user's."""

    names = st.frozensets(st.sampled_from(["a", "b", "c", "openid", "profile", "email"]))

    @given(
        client=names, user=st.one_of(st.none(), names),
        asked=st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c", "openid", "profile", "x"]))),
    )
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

    @given(
        client=names, user=names,
        asked=st.one_of(st.none(), st.lists(st.sampled_from(["a", "b", "c", "openid", "profile", "x", "y,z", ""]))),
    )
    def test_a_login_gets_what_is_left_and_never_more(self, client, user, asked):
        class Existing:
            """A store that knows the scopes of `names`, and no others."""

            @staticmethod
            def find_scope_names(names):
                return set(names) & {"a", "b", "c"}

        idp = type("Idp", (), {"store": Existing})
        scopes = set(asked or ()) - {""}
        of_openid = set(m.OIDC_SCOPES) if "openid" in scopes else set()
        may_request = client | of_openid
        left = scopes & (client & user | of_openid) if scopes else client & user
        requested = None if asked is None else " ".join(asked)
        if (scopes - may_request) - {"x", "y,z"} or (scopes and not left):
            with pytest.raises(m.Problem) as caught:
                m.decide_login_scopes(idp, requested, client, user)
            assert caught.value.code == "invalid_scope"
        else:
            assert m.decide_login_scopes(idp, requested, client, user).split() == sorted(left)

    @pytest.mark.parametrize("scope, granted", [
        (None, "api:read api:write"), ("api:read", "api:read"), ("api:write api:read", "api:read api:write"),
        ("api:secret", None), ("nonsense", None), ("api:read nonsense", None), ("api:read,api:write", None),
        ("openid", None), ("d0955db1-67f7-4a7b-a9bb-ffbef4f0d2bd", None),
    ])
    def test_of_a_machine(self, auth, service, scope, granted):
        answer = auth.post(
            "/token", {"grant_type": "client_credentials"} | ({"scope": scope} if scope else {}), auth=service
        )
        if granted is None:
            assert (answer.status, answer.json["error"]) == (400, "invalid_scope")
        else:
            assert answer.json["scope"] == granted

    @pytest.mark.parametrize(
        "scope, granted",
        [
            (None, "api:read"), ("api:read", "api:read"), ("api:write", None), ("openid api:read", "api:read openid"),
            ("profile", None), ("openid nonsense", None), ("openid api:write", None), ("openid address", None),
            ("openid phone", None), ("openid groups", "groups openid"), ("groups", None),
        ],
    )
    def test_of_a_user(self, auth, service, alice, scope, granted):
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD} | (
            {"scope": scope} if scope else {}
        )
        answer = auth.post("/token", form, auth=service)
        assert (answer.json.get("scope"), answer.status) == ((granted, 200) if granted else (None, 400))


class TestClientTypes:
    """The grants of a client are those on its list, and its type bounds the list.

                     password  client_credentials  refresh_token  authorization_code
    confidential     listed    listed              listed         listed
    public           listed    never               listed         listed
    """

    @pytest.mark.parametrize("client_type", ["confidential", "public"])
    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize(
        "grant", ["password", "client_credentials", "refresh_token", "authorization_code", "implicit"]
    )
    def test_table(self, auth, new_client, alice, client_type, listed, grant):
        never = grant == "implicit" or client_type == "public" and grant == "client_credentials"
        others = [
            other
            for other in m.GRANT_TYPES
            if other != grant and not (client_type == "public" and other == "client_credentials")
        ]
        client_id, secret = new_client(
            "c", client_type=client_type, grant_types=others + ([grant] if listed and not never else [])
        )
        form = {
            "grant_type": grant, "client_id": client_id, "username": "alice", "password": PASSWORD,
            "refresh_token": "x", "code": "x",
        } | ({"client_secret": secret} if secret else {})
        answer = auth.post("/token", form)
        if grant == "implicit":
            assert answer.json["error"] == "unsupported_grant_type"
        elif not listed or never:
            assert (answer.status, answer.json["error"]) == (400, "unauthorized_client")
        elif grant in ("refresh_token", "authorization_code"):
            assert answer.json["error"] == "invalid_grant"
        else:
            assert answer.status == 200

    def test_a_public_client_has_no_secret(self, auth, public, alice):
        form = {"client_id": "spa", "grant_type": "password", "username": "alice", "password": PASSWORD}
        answer = auth.post("/token", form)
        assert answer.status == 200
        assert (
            auth.post(
                "/token",
                {"grant_type": "refresh_token", "client_id": "spa", "refresh_token": answer.json["refresh_token"]},
            ).status
            == 200
        )
        assert auth.post("/token", form | {"client_secret": "guess"}).json["error"] == "invalid_client"
        assert (
            auth.post(
                "/token", {name: value for name, value in form.items() if name != "client_id"}, auth=("spa", "")
            ).status
            == 200
        )

    def test_a_public_client_gets_no_machine_token_whatever_its_row_says(self, auth, public, change):
        change("UPDATE client SET grant_types = 'client_credentials' WHERE client_id = 'spa'")
        answer = auth.post("/token", MACHINE | {"client_id": "spa"})
        assert (answer.status, answer.json["error"]) == (400, "unauthorized_client")

    def test_no_grant_is_invalid_request(self, auth, service):
        for form in ({}, {"grant_type": ""}):
            assert auth.post("/token", form, auth=service).json["error"] == "invalid_request"


class TestAuthentication:
    """RFC 6749 §2.3"""

    def test_by_basic_or_form_never_both(self, auth, service):
        both = {"client_id": service[0], "client_secret": service[1]}
        assert auth.post("/token", MACHINE, auth=service).status == 200
        assert auth.post("/token", MACHINE | both).status == 200
        assert auth.post("/token", MACHINE | {"client_id": "service"}, auth=service).status == 200, (
            "the same client_id beside Basic does no harm"
        )
        assert auth.post("/token", MACHINE | both, auth=service).json["error"] == "invalid_request"
        assert auth.post("/token", MACHINE | {"client_id": "other"}, auth=service).json["error"] == "invalid_request"

    def test_basic_is_known_in_any_case(self, auth, service):
        for word in ("basic", "BASIC"):
            assert auth.post("/token", MACHINE, headers=[("Authorization", f"{word} {basic(*service)}")]).status == 200

    @pytest.mark.parametrize(
        "client",
        [None, ("service", "wrong"), ("nobody", "wrong"), ("service", ""), ("nobody", ""), ("", "secret"), ("", "")],
    )
    def test_a_401_says_how_and_nothing_else(self, auth, service, client):
        for answer in (
            auth.post("/token", MACHINE, auth=client),
            auth.post("/token", MACHINE | ({"client_id": client[0], "client_secret": client[1]} if client else {})),
        ):
            assert (answer.status, answer.json) == (
                401, {"error": "invalid_client", "error_description": m.ERRORS["invalid_client"][1]},
            )
            assert answer.headers["www-authenticate"] == 'Basic realm="microauthd"'

    def test_an_empty_client_id_is_nobody_whatever_is_cached(self, auth, machine):
        assert auth.get("/me", bearer=machine["access_token"]).status == 200
        assert auth.post("/token", MACHINE, auth=("", "x")).status == 401

    @pytest.mark.parametrize(
        "word, status, error",
        [
            *(
                (word, 401, "invalid_client")
                for word in (
                    "", "!!!", "c2VydmljZQ==", "c2VydmljZTp4=", "\xe4",
                    *(
                        base64.b64encode(word).decode()
                        for word in (b"\xff:\xff", b"service:%zz", b"service:%00", b"service:\0", b"%zz:x", b":x", b":")
                    ),
                )
            ),
        ],
    )
    def test_malformed_basic_is_refused(self, auth, service, word, status, error):
        answer = auth.post("/token", MACHINE, headers=[("Authorization", f"Basic {word}")])
        assert answer.status == status and answer.json["error"] == error

    @pytest.mark.parametrize(
        "client_id, secret",
        [
            ("a%b+c", "p:%+ \xe4 sixteen more"), ("x", ":::::::::::::::::"), ("x", "sixteen=and&more"),
            ("x", "\U0001f511" * 16), ("a=b&c", "%41%41%41%41%41%41"),
        ],
    )
    def test_both_parts_of_basic_are_form_decoded(self, auth, new_client, client_id, secret):
        new_client(client_id, client_secret=secret)
        assert auth.post("/token", MACHINE, auth=(quote_plus(client_id), quote_plus(secret))).status == 200
        assert auth.post("/token", MACHINE | {"client_id": client_id, "client_secret": secret}).status == 200

    @pytest.mark.parametrize(
        "client_id, secret",
        [
            ("x", "sixteen + more + more"), ("x", "a+b%cxxxx"), ("x", "100%25 sure of it"), ("x", "50% of the sum"),
            ("a+b", "a very secret secret"), ("a%62", "a+very+secret+secret"), ("a%zz", "a+very secret"),
            ("x", "ends with one%"), ("x", "%ff%fe%fd%fc"), ("x", "nul%00nul%00"),
        ],
    )
    def test_both_parts_of_basic_may_come_as_they_are(self, auth, new_client, client_id, secret):
        """Many clients do not encode them, curl -u among them: it sends what follows -u."""
        new_client(client_id, client_secret=secret)
        assert auth.post("/token", MACHINE, auth=(client_id, secret)).status == 200
        assert auth.post("/token", MACHINE | {"client_id": client_id}, auth=(client_id, secret)).status == 200
        assert auth.post("/token", MACHINE, auth=(quote_plus(client_id), quote_plus(secret))).status == 200
        assert auth.post("/token", MACHINE, auth=(client_id, secret + "+")).status == 401
        other = auth.post("/token", MACHINE | {"client_id": "other"}, auth=(client_id, secret))
        assert other.json["error"] == "invalid_request"

    def test_a_client_id_may_be_another_form_decoded(self, auth, new_client):
        """Each of the two is reached by its own secret alone."""
        new_client("ab", client_secret="secret of the one")
        new_client("a%62", client_secret="secret of the other")
        for secret, client_id in (("secret of the one", "ab"), ("secret of the other", "a%62")):
            token = auth.post("/token", MACHINE, auth=("a%62", secret)).json["access_token"]
            assert auth.get("/me", bearer=token).json["sub"] == client_id
        assert auth.post("/token", MACHINE, auth=("ab", "secret of the other")).status == 401

    def test_a_public_client_may_name_itself_by_basic_as_it_is(self, auth, new_client, alice):
        new_client("a+b", client_type="public", grant_types=["password"])
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert [auth.post("/token", form, auth=(name, "")).status for name in ("a+b", "a%2Bb", "a b")] == [200, 200, 401]

    @pytest.mark.parametrize(
        "secret, hashes", [("wrong", 1), ("wr%6fng", 2), ("wr+ng", 2), ("wr%ng", 1), ("%ff", 1), ("100%+", 1)]
    )
    @pytest.mark.parametrize("client_id", ["nobody", "service", "spa", "idle"])
    def test_an_unknown_client_costs_what_a_known_one_costs(
        self, auth, service, public, new_client, client_id, monkeypatch, change, secret, hashes
    ):
        new_client("idle")
        change("UPDATE client SET is_active = 0 WHERE client_id = 'idle'")
        calls, compute = [], Argon2Memory.compute
        monkeypatch.setattr(Argon2Memory, "compute", lambda *words: calls.append(1) or compute(*words))
        answer = auth.post("/token", MACHINE, auth=(client_id, secret))
        assert (answer.status, len(calls)) == (401, hashes)

    def test_two_forms_of_a_wrong_secret_are_one_failure(self, auth, idp, service):
        statuses = [auth.post("/token", MACHINE, auth=("service", "wr+ng")).status for _ in range(22)]
        assert statuses == [401] * 20 + [429] * 2
        m.write_refusal_counts(idp, everything=True)
        rows = idp.store.list_audit("client_authentication_failed")
        assert [(row.target, row.actor_id) for row in rows] == [("service", "service")] * 2
        assert rows[0].secondary.startswith("count=19;") and not rows[1].secondary

    def test_a_good_raw_secret_is_verified_once_and_then_remembered(self, auth, new_client, monkeypatch):
        new_client("x", client_secret="sixteen + more + more")
        calls, compute = [], Argon2Memory.compute
        monkeypatch.setattr(Argon2Memory, "compute", lambda *words: calls.append(1) or compute(*words))
        for _ in range(5):
            assert auth.post("/token", MACHINE, auth=("x", "sixteen + more + more")).status == 200
        assert len(calls) == 2, "the decoded form, then the raw one"

    def test_a_good_secret_is_verified_once_and_then_remembered(self, auth, service, monkeypatch):
        calls, compute = [], Argon2Memory.compute
        monkeypatch.setattr(Argon2Memory, "compute", lambda *words: calls.append(1) or compute(*words))
        for _ in range(5):
            assert auth.post("/token", MACHINE, auth=service).status == 200
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "option, passed, verified",
        [("", 3600 + 300, 1), ("", 3600 + 901, 2), ("7200", 7200 + 300, 1), ("60", 961, 2), ("999999", 86399, 1),
         ("999999", 86401, 2)],
    )
    def test_a_secret_is_remembered_until_the_client_renews(
        self, auth, idp, service, clock, monkeypatch, option, passed, verified
    ):
        if option:
            with idp.store.transaction(identity=True):
                idp.store.put_feature(idp.store.find_client("service").id, "TOKEN_EXPIRATION", True, option)
        calls, compute = [], Argon2Memory.compute
        monkeypatch.setattr(Argon2Memory, "compute", lambda *words: calls.append(1) or compute(*words))
        assert auth.post("/token", MACHINE, auth=service).status == 200
        clock.pass_(passed)
        assert auth.post("/token", MACHINE, auth=service).status == 200
        assert len(calls) == verified

    def test_guessing_is_slowed_and_the_good_secret_is_not(self, auth, service):
        assert auth.post("/token", MACHINE, auth=service).status == 200
        statuses = [auth.post("/token", MACHINE, auth=("service", "wrong")).status for _ in range(22)]
        assert statuses == [401] * 20 + [429] * 2
        assert auth.post("/token", MACHINE, auth=service).status == 200

    def test_names_that_do_not_exist_are_slowed_alike(self, auth, service):
        assert [auth.post("/token", MACHINE, auth=("nobody", "wrong")).status for _ in range(22)] == [401] * 20 + [
            429
        ] * 2

    def test_a_restart_asks_argon2_again(self, make_idp, idp, service):
        auth = Caller(m.App(make_idp(idp.options), m.AUTH))
        assert auth.post("/token", MACHINE, auth=service).status == 200

    def test_an_inactive_client_is_no_client_anywhere(self, auth, service, public, machine, alice, log_in, change):
        user = log_in(alice)
        change("UPDATE client SET is_active = 0")
        for path, form in (
            ("/token", MACHINE), ("/token", {"grant_type": "refresh_token", "refresh_token": user["refresh_token"]}),
            ("/introspect", {"token": "x"}), ("/revoke", {"token": "x"}),
        ):
            assert auth.post(path, form, auth=service).status == 401
        assert (
            auth.post(
                "/token", {"grant_type": "password", "client_id": "spa", "username": "alice", "password": PASSWORD}
            ).status
            == 401
        )
        for token in (machine["access_token"], user["access_token"]):
            assert auth.get("/me", bearer=token).status == 401

    @pytest.mark.parametrize("name", ["SERVICE", " service", "service "])
    def test_a_client_id_is_compared_octet_by_octet(self, auth, service, name):
        assert auth.post("/token", MACHINE, auth=(quote_plus(name), service[1])).status == 401

    def test_its_internal_id_is_no_client_id(self, idp, auth, service):
        row = idp.store.find_client("service")
        assert auth.post("/token", MACHINE, auth=(row.id, service[1])).status == 401


class TestSecrets:
    def test_two_live_for_the_overlap(self, idp, auth, service, clock):
        def good(secret):
            return auth.post("/token", MACHINE, auth=("service", secret)).status == 200

        assert good(service[1])
        second, third = (
            m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60)) for _ in range(2)
        )
        SECRETS.update((second, third))
        assert not good(service[1]), "two live, not three"
        assert good(second) and good(third)
        clock.pass_(59)
        assert good(second)
        clock.pass_(1)
        assert not good(second) and good(third)

    @pytest.mark.parametrize("case", ["nobody", "one", "two", "one of another cost", "none", "public", "raw", "nobody raw"])
    def test_a_wrong_one_costs_one_argon2_whatever_there_is(self, idp, auth, service, public, change, monkeypatch, case):
        """RFC 6749 §2.3.1: who rotates, or exists, must not be told by the time of a refusal."""
        if case == "none":
            change("DELETE FROM client_secret")
        if case == "one of another cost":  # as after a change of argon2id-memory
            monkeypatch.setattr(idp, "hasher", Hasher(Options(**CHEAP | {"argon2id_memory": 128, "argon2id_time": 2})))
        if case in ("two", "one of another cost"):
            change_it = ChangeSecret("service", overlap_seconds=60)
            made = [m.change_secret(idp, m.LOCAL.acting_as("test"), change_it) for _ in range(3)][1:]
            assert all(auth.post("/token", MACHINE, auth=("service", secret)).status == 200 for secret in made)
            assert len({tuple(stored.split("$")[3:5]) for stored, _ in m.get_client(idp, "service").secret_hashes}) == 1
        computed, compute = [], idp.hasher.memory.compute
        monkeypatch.setattr(idp.hasher.memory, "compute", lambda *given: computed.append(given) or compute(*given))
        name = {"nobody": "nobody", "nobody raw": "nobody", "public": "spa"}.get(case, "service")
        wrong = "wrong%21" if "raw" in case else "wrong"
        assert auth.post("/token", MACHINE, auth=(name, wrong)).status == 401
        assert len(computed) == (2 if "raw" in case else 1), "a pair that may be read in two ways costs two"

    def test_two_of_an_earlier_release_with_a_salt_each_both_work_until_one_is_replaced(
        self, idp, auth, service, change, monkeypatch
    ):
        id, now = m.get_client(idp, "service").row.id, idp.now()
        other = Hasher(Options(**CHEAP | {"argon2id_hash_length": 24}))
        for number, secret in enumerate(("the older one", "the newer one")):
            idp.store.add_secret(secret, id, (idp.hasher, other)[number].hash(secret), now)
        change("DELETE FROM client_secret WHERE length(id) = 36")
        form = MACHINE | {"client_id": "service"}

        def good(secret):
            return auth.post("/token", form | {"client_secret": secret}).status == 200

        assert good("the older one") and good("the newer one") and not good("another")
        made = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60))
        assert good(made) and good("the newer one") and not good("the older one")

    def test_without_an_overlap_a_new_one_has_the_salt_and_the_cost_of_today(self, idp, auth, service, monkeypatch):
        (before, _), = m.get_client(idp, "service").secret_hashes
        monkeypatch.setattr(idp, "hasher", Hasher(Options(**CHEAP | {"argon2id_time": 2})))
        made = m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service"))
        (after, _), = m.get_client(idp, "service").secret_hashes
        assert after.startswith(idp.hasher.parameters()) and after.split("$")[4] != before.split("$")[4]
        assert auth.post("/token", MACHINE, auth=("service", made)).status == 200

    def test_a_change_during_another_ends_with_one_salt(self, idp, service, monkeypatch):
        real, during = idp.hasher.hash, []

        def hash_slowly(secret, beside=None):
            made = real(secret, beside)
            if not during:
                during.append(True)
                m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service"))
            return made

        monkeypatch.setattr(idp.hasher, "hash", hash_slowly)
        m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service", overlap_seconds=60))
        hashes = m.get_client(idp, "service").secret_hashes
        assert len(hashes) == 2 and len({stored.split("$")[4] for stored, _ in hashes}) == 1

    def test_a_changed_one_is_dead_at_once(self, idp, auth, service):
        assert auth.post("/token", MACHINE, auth=service).status == 200
        m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service"))
        assert auth.post("/token", MACHINE, auth=service).status == 401

    def test_tokens_live_on(self, idp, auth, machine):
        m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret("service"))
        assert auth.get("/me", bearer=machine["access_token"]).status == 200

    @pytest.mark.parametrize(
        "wanted, member",
        [
            ({"client_id": "spa"}, "client_id"), ({"new_secret": "x" * 7}, "new_secret"),
            ({"new_secret": "x" * 256}, "new_secret"), ({"overlap_seconds": -1}, "overlap_seconds"),
            ({"overlap_seconds": 2678401}, "overlap_seconds"),
        ],
    )
    def test_what_is_refused_names_the_member_and_changes_nothing(self, idp, auth, service, public, wanted, member):
        with pytest.raises(m.Problem) as caught:
            m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret(**{"client_id": "service"} | wanted))
        assert list(caught.value.errors) == [member]
        assert auth.post("/token", MACHINE, auth=service).status == 200

    @pytest.mark.parametrize(
        "secret, is_good",
        [
            ("x" * 7, False), ("x" * 8, True), ("x" * 255, True), ("x" * 256, False), ("a b+c%d:\u00e4", True),
            (" sixteen letters", False), ("sixteen letters ", False), (" " * 8, False), (" ", False), ("tab\tin it", False),
            ("sixteen letters\n", False), ("no-break\u00a0blank", False), ("password1", False), ("PassWord1", False),
            ("qwertyuiop", False), ("password1 of the sensor", True), ("drowssap-1", True),
        ],
    )
    def test_a_chosen_one_is_held_to_one_rule_at_creation_and_change(self, idp, auth, service, secret, is_good):
        """RFC 6749 §2.3.1"""
        for number, choose in enumerate((
            lambda: m.create_client(idp, m.LOCAL, CreateClient("x", client_secret=secret)),
            lambda: m.create_client(idp, m.LOCAL, CreateClient("y", secret=secret)),
            lambda: m.change_secret(idp, m.LOCAL, ChangeSecret("service", secret)),
        )):
            if is_good:
                choose()
                client = ("x", "y", "service")[number], quote_plus(secret)
                assert auth.post("/token", MACHINE, auth=client).status == 200
            else:
                with pytest.raises(m.Problem) as caught:
                    choose()
                assert list(caught.value.errors) == ["new_secret" if number == 2 else "client_secret"]

    def test_one_of_before_the_rule_goes_on_working(self, idp, auth, service, change):
        change("UPDATE client_secret SET secret_hash = :hash", hash=idp.hasher.hash(" short "))
        form = MACHINE | {"client_id": "service", "client_secret": " short "}
        assert auth.post("/token", form).status == auth.post("/token", MACHINE, auth=("service", " short ")).status == 200

    @pytest.mark.parametrize("client_id", ["nobody", "", "idle"])
    def test_of_nobody(self, idp, new_client, change, client_id):
        new_client("idle")
        change("UPDATE client SET is_active = 0 WHERE client_id = 'idle'")
        with pytest.raises(m.Problem) as caught:
            m.change_secret(idp, m.LOCAL.acting_as("test"), ChangeSecret(client_id))
        assert caught.value.code == "not_found"


class TestRegistration:
    def test_a_secret_is_made_unless_one_is_given(self, idp, scopes):
        _, made = m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient("one"))
        _, none = m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient("two", client_secret="sixteen characters"))
        client, public = m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient("three", client_type="public"))
        assert len(made) == 43 and none == "" and public == "" and client.secret_hashes == ()
        assert client.grant_types == ["authorization_code", "refresh_token"] and client.row.audience == "microauthd"

    LOGIN = "authorization_code refresh_token"

    @pytest.mark.parametrize(
        "made, change, uris, grants",
        [
            ({}, {}, [], "client_credentials"), ({}, {}, ["redirect"], "authorization_code client_credentials refresh_token"),
            ({}, {}, ["post_logout"], "client_credentials"), ({"client_type": "public"}, {}, ["redirect"], LOGIN),
            ({"client_type": "public"}, {}, ["cors_origin"], LOGIN), ({"grant_types": []}, {}, ["redirect"], ""),
            ({"grant_types": ["password"]}, {}, ["redirect"], "password"),
            ({"grant_types": ["client_credentials"]}, {}, ["redirect", "post_logout"], "client_credentials"),
            ({}, {"grant_types": ["client_credentials"]}, ["redirect"], "client_credentials"),
            ({}, {"grant_types": ["password"]}, ["redirect"], "password"),
            ({}, {"display_name": "Another"}, ["redirect"], "authorization_code client_credentials refresh_token"),
        ],
    )
    def test_a_redirect_uri_brings_the_grants_of_a_login_where_none_was_named(
        self, idp, call, made, change, uris, grants
    ):
        """RFC 9700 §2.4: nobody has the password grant who has not named it."""
        client = call("POST", "/clients", {"client_id": "new"} | made).json
        assert made or client["grant_types"] == ["client_credentials"]
        if change:
            assert call("PUT", "/clients/new", change).status == 200
        for kind in uris:
            m.add_uri(idp, m.LOCAL.acting_as("test"), "new", kind, "https://app.example")
        assert call("GET", "/clients/new").json["grant_types"] == grants.split()
        rows = [row.secondary for row in idp.store.list_audit(limit=100) if row.action == "client_updated"]
        assert sorted(rows) == sorted([*change, *["grant_types"] * (grants.count(" ") == 2)])

    def test_a_client_without_the_password_grant_named_takes_no_password(self, idp, auth, alice):
        _, secret = m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient("new"))
        SECRETS.add(secret)
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        assert auth.post("/token", form, auth=("new", secret)).json["error"] == "unauthorized_client"
        assert auth.post("/token", MACHINE, auth=("new", secret)).status == 200
        m.update_client(idp, m.LOCAL.acting_as("test"), "new", UpdateClient(grant_types=["password"]))
        assert auth.post("/token", form, auth=("new", secret)).status == 200

    @pytest.mark.parametrize(
        "wanted, member",
        [
            ({"client_id": ""}, "client_id"), ({"client_id": "a b"}, "client_id"), ({"client_id": "a:b"}, "client_id"),
            ({"client_id": "\xe4"}, "client_id"), ({"client_id": "x" * 256}, "client_id"),
            ({"client_id": MAD_ADMIN_ROLE_ID}, "client_id"),
            ({"client_id": MAD_ADMIN_ROLE_ID.upper()}, "client_id"), ({"client_type": "native"}, "client_type"),
            ({"client_secret": "2 short"}, "client_secret"), ({"client_secret": "eight\tch"}, "client_secret"),
            ({"client_secret": "x" * 256}, "client_secret"),
            ({"client_type": "public", "client_secret": "x" * 20}, "client_secret"),
            ({"client_type": "public", "grant_types": ["client_credentials"]}, "grant_types"),
            ({"grant_types": ["implicit"]}, "grant_types"), ({"scopes": ["api:read", "nonsense"]}, "scopes"),
            ({"scopes": ["openid"]}, "scopes"), ({"client_type": "public", "may_introspect": True}, "may_introspect"),
            ({"audience": "x" * 256}, "audience"), ({"audience": "a\nb"}, "audience"),
            ({"display_name": "x" * 256}, "display_name"), ({"display_name": "a\x1b[31mb"}, "display_name"),
        ],
    )
    def test_what_is_refused_names_the_member_and_leaves_nothing(self, idp, scopes, wanted, member):
        with pytest.raises(m.Problem) as caught:
            m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient(**{"client_id": "new"} | wanted))
        assert list(caught.value.errors) == [member] and idp.store.list_clients()[0] == []

    def test_a_client_id_is_taken_once(self, idp, service):
        with pytest.raises(m.Problem) as caught:
            m.create_client(idp, m.LOCAL.acting_as("test"), CreateClient("service"))
        assert caught.value.code == "conflict" and len(idp.store.list_clients()[0]) == 1

    @pytest.mark.parametrize("name", ["", "a b", 'a"b', "a\\b", "\xe4", "x" * 256, SEEDED_SCOPES[0][0]])
    def test_a_scope_is_a_scope_token(self, idp, name):
        """RFC 6749 §3.3"""
        with pytest.raises(m.Problem) as caught:
            m.create_scope(idp, m.LOCAL.acting_as("test"), CreateScope(name))
        assert list(caught.value.errors) == ["name"]

    @pytest.mark.parametrize(
        "name", ["openid", "offline_access", "groups", "address", "phone", "api:read", "admin:read_user"]
    )
    def test_a_scope_is_taken_once_and_those_of_openid_are_nobodys(self, idp, scopes, name):
        with pytest.raises(m.Problem) as caught:
            m.create_scope(idp, m.LOCAL.acting_as("test"), CreateScope(name))
        assert caught.value.code == "conflict"

    def test_a_scope_named_groups_before_it_was_built_in_stays(self, idp, service):
        """Boxes may have made one for clients that request it."""
        with idp.store.transaction():
            idp.store.add_scope("0b9d6d7e-7f0d-4f0e-8f5c-3b1e0f3d9a11", "groups", "", idp.now())
        changed = m.update_scope(idp, m.LOCAL, "groups", UpdateScope("groups", "of people"))
        assert (changed.name, changed.description) == ("groups", "of people")
        for name in ("roles", "phone"):
            with pytest.raises(m.Problem, match="conflict"):
                m.update_scope(idp, m.LOCAL, "groups", UpdateScope(name))
        m.delete_scope(idp, m.LOCAL, "groups")

    def test_scopes_are_assigned_by_name_or_id_all_or_none(self, idp, service):
        client, (id, name, _) = m.get_client(idp, "service"), SEEDED_SCOPES[3]
        for ids in ([id, "nonsense"], [], ["openid"]):
            with pytest.raises(m.Problem) as caught:
                m.assign_scopes(idp, m.LOCAL.acting_as("test"), client, ids)
            assert list(caught.value.errors) == ["scope_ids"] and m.find_client(idp, "service").scopes == {
                "api:read", "api:write",
            }
        assert m.assign_scopes(idp, m.LOCAL.acting_as("test"), client, [id, "api:read"]) == 1
        assert m.find_client(idp, "service").scopes == {"api:read", "api:write", name}

    def test_each_change_leaves_a_row_in_its_transaction(self, idp, service, monkeypatch):
        m.change_secret(idp, m.LOCAL.acting_as("root"), ChangeSecret("service", overlap_seconds=5))
        row = idp.store.list_audit(limit=1)[0]
        assert (row.action, row.actor_id, row.target) == ("client_secret_changed", "root", "service")
        monkeypatch.setattr(idp.store, "append_audit", lambda rows: 1 / 0)
        for work in (
            lambda: m.create_client(idp, m.LOCAL.acting_as("root"), CreateClient("unaudited")),
            lambda: m.create_scope(idp, m.LOCAL.acting_as("root"), CreateScope("unaudited")),
            lambda: m.create_user(idp, m.LOCAL.acting_as("root"), CreateUser("unaudited", "un@audited", PASSWORD)),
        ):
            with pytest.raises(ZeroDivisionError):
                work()
        assert (
            idp.store.find_client("unaudited") is None
            and idp.store.find_scope("unaudited") is None
            and idp.store.find_account_by_name("unaudited") is None
        )


class TestCache:
    """What a process remembers of a client is good for a generation."""

    def test_it_asks_the_database_once(self, idp, service, monkeypatch):
        m.find_client(idp, "service")
        monkeypatch.setattr(idp.store, "find_client", lambda client_id: 1 / 0)
        assert m.find_client(idp, "service").client_id == "service"

    def test_names_made_up_by_strangers_are_not_remembered(self, idp):
        for number in range(100):
            assert m.find_client(idp, f"nobody{number}") is None
        assert len(idp.cache()) <= 1

    def test_what_was_read_before_a_change_never_counts_after_it(self, idp, service, monkeypatch):
        load = m.load_client

        def slowly(idp, client_id):
            client = load(idp, client_id)
            idp.store.generation.bump()
            return client

        idp.store.generation.bump()
        monkeypatch.setattr(m, "load_client", slowly)
        m.find_client(idp, "service")
        assert "service" not in idp.cache()


class TestFlags:
    @pytest.mark.parametrize(
        "option, lifetime",
        [("120", 120), ("0", 3600), ("", 3600), ("-5", 3600), ("1e3", 3600), ("nonsense", 3600), ("9999999999", 3600)],
    )
    def test_a_client_sets_its_own_lifetime_where_it_is_a_positive_number(self, idp, auth, service, option, lifetime):
        with idp.store.transaction(identity=True):
            idp.store.put_feature(idp.store.find_client("service").id, "TOKEN_EXPIRATION", True, option)
        assert auth.post("/token", MACHINE, auth=service).json["expires_in"] == lifetime

    def test_a_flag_that_is_off_does_nothing(self, idp, auth, service):
        with idp.store.transaction(identity=True):
            idp.store.put_feature(idp.store.find_client("service").id, "TOKEN_EXPIRATION", False, "120")
        assert auth.post("/token", MACHINE, auth=service).json["expires_in"] == 3600

    def test_a_client_may_sign_with_rs256(self, make_idp, auth, service, change):
        import jwt

        change("UPDATE client SET access_token_signed_alg = 'RS256'")
        assert (
            jwt.get_unverified_header(auth.post("/token", MACHINE, auth=service).json["access_token"])["alg"] == "RS256"
        )
        assert make_idp(Options(**CHEAP, prefer_ec_token_signer=False)).auth_ring.access.alg == "RS256"


class TestUris:
    """RFC 6749 §3.1.2, RFC 8252 §7, RFC 9700 §2.1, RFC 6454 §6.1"""

    @pytest.mark.parametrize(
        "uri",
        [
            "https://app.example/cb", "https://app.example", "https://app.example:8443/cb?tenant=a%20b",
            "http://localhost/cb", "http://127.0.0.1:7000/cb", "http://[::1]/cb", "com.example.app:/cb",
            "com.example.app://cb", "http://app.localhost:3000/cb", "http://a.b-c.localhost/cb", "http://LocalHost/cb",
        ],
    )
    def test_may_be_registered(self, uri):
        assert m.check_redirect_uri(uri) == ""

    @pytest.mark.parametrize(
        "uri",
        [
            "", "/cb", "app.example/cb", "//app.example/cb", "http://app.example/cb", "https://app.example/cb#x",
            "https://app.example/#", "javascript:alert(1)", "JavaScript:alert(1)", "data:text/html,x", "myapp:/cb",
            "https://user@app.example/cb", "https:/app.example", "https:app.example", "https://",
            "https://app.example/a b", "https://app.example/\n", "https://app.example/ü",
            "https://app.example/<script>", "https://app.example:99999/", "http://127.0.0.1.evil.example/",
            "http://.localhost/", "http://a..localhost/", "http://evil.example;.localhost/", "http://notlocalhost/",
            "http://localhost./", "http://localhost@evil.example/", "http://evil.example%2f.localhost/",
            "http://localhost.evil.example/", "https://app.example\\@evil.example/", "x" * 3000, "file:///etc/passwd",
        ],
    )
    def test_may_not(self, uri):
        assert m.check_redirect_uri(uri) != ""

    @pytest.mark.parametrize(
        "uri, ok",
        [
            ("https://app.example", True), ("https://app.example:8443", True), ("http://localhost:3000", True),
            ("http://[::1]:3000", True), ("http://app.example", False), ("https://app.example/", False),
            ("https://APP.example", False), ("https://app.example:443", False), ("http://localhost:80", False),
            ("null", False), ("*", False), ("https://*.example", False),
            ("https://app.example,https://b.example", False), ("", False),
            # What the web views of packaged applications send: Capacitor, Ionic, Tauri, Electron, extensions.
            ("capacitor://localhost", True), ("ionic://localhost", True), ("tauri://localhost", True),
            ("http://tauri.localhost", True), ("https://tauri.localhost", True), ("app://obsidian.md", True),
            ("app://-", True), ("chrome-extension://aapbdbdomjkkjkaonfhkkikfgjllcleb", True),
            ("moz-extension://5ae4ec68-4b5c-4a0d-a4a4-4f0a52d6f1b5", True), ("http://evil.localhost.example", False),
            ("capacitor://localhost/", False), ("capacitor://", False), ("capacitor:", False),
            ("Capacitor://localhost", False), ("capacitor://u@localhost", False), ("file://", False),
            ("file://host", False), ("data://x", False), ("javascript://x", False), ("about://blank", False),
            ("chrome://settings", False), ("wss://app.example", False), ("capacitor://localhost\nX: y", False),
        ],
    )
    def test_origins(self, uri, ok):
        assert (m.check_origin(uri) == "") is ok

    @pytest.mark.parametrize(
        "uri, registered, ok",
        [
            ("https://a/cb", ["https://a/cb"], True), ("https://a/cb?x=1", ["https://a/cb"], False),
            ("https://a/CB", ["https://a/cb"], False), ("https://A/cb", ["https://a/cb"], False),
            ("https://a/cb/", ["https://a/cb"], False), ("https://a:443/cb", ["https://a/cb"], False),
            ("https://a/%63b", ["https://a/cb"], False), ("https://a/x/../cb", ["https://a/cb"], False),
            ("http://127.0.0.1:5000/cb", ["http://127.0.0.1/cb"], True),
            ("http://127.0.0.1/cb", ["http://127.0.0.1:1/cb"], True),
            ("http://[::1]:5000/cb", ["http://[::1]/cb"], True),
            ("http://127.0.0.1:5000/cb?x", ["http://127.0.0.1/cb"], False),
            ("http://127.0.0.1:5000/cb", ["http://[::1]/cb"], False),
            ("http://localhost:5000/cb", ["http://localhost/cb"], True),
            ("http://localhost/cb?a=1", ["http://localhost:3000/cb?a=1"], True),
            ("http://localhost:5000/cb", ["http://127.0.0.1/cb"], False),
            ("http://localhost:5000/cb", ["https://localhost/cb"], False),
            ("https://localhost:5000/cb", ["https://localhost/cb"], False),
            ("http://localhost:5000/cb/", ["http://localhost/cb"], False),
            ("http://localhost.evil.example/cb", ["http://localhost/cb"], False),
            ("http://LOCALHOST/cb", ["http://localhost/cb"], False),
            ("http://app.localhost:3000/cb", ["http://app.localhost:3000/cb"], True),
            ("http://app.localhost:3001/cb", ["http://app.localhost:3000/cb"], False),
            ("http://app.localhost/cb", ["http://localhost/cb"], False),
            ("http://127.0.0.1:0/cb", ["http://127.0.0.1/cb"], False),
            ("http://127.0.0.1:99999/cb", ["http://127.0.0.1/cb"], False),
            ("http://127.0.0.1:5000@evil.example/cb", ["http://127.0.0.1/cb"], False),
            ("http://127.0.0.1:5000/cb#x", ["http://127.0.0.1/cb"], False),
            ("https://127.0.0.1:5000/cb", ["https://127.0.0.1/cb"], False),
            ("http://127.0.0.2/cb", ["http://127.0.0.1/cb"], False),
        ],
    )
    def test_a_match_is_exact_but_for_the_port_of_loopback(self, uri, registered, ok):
        assert m.is_registered_uri(uri, registered) is ok

    @given(
        st.sampled_from(
            [
                "https://app.example/cb", "http://127.0.0.1/cb", "http://[::1]:8000/cb?x=1", "http://localhost/cb",
                "com.example.app:/cb",
            ]
        ),
        st.integers(0, 40),
        st.sampled_from(
            [
                "", "/", "@evil.example/", ".evil.example", "%2e", "#", "?", ":1", ":99999", "\\", "\t", "\n", " ",
                "\0", "//", "..", "A", "[", "user@", "\u200b", "\uff0e",
            ]
        ),
        st.integers(0, 3),
    )
    def test_whatever_is_put_into_one_it_is_no_longer_registered(self, registered, at, word, cut):
        """But for a port of loopback, which may be any."""
        changed = registered[:at] + word + registered[at + cut :]
        if m.is_registered_uri(changed, (registered,)) and changed != registered:
            without = re.compile(r"(http://(?:127\.0\.0\.1|\[::1\]|localhost)):?[0-9]*(?=[/?]|$)")
            assert without.fullmatch(registered.partition("/cb")[0]) and without.sub(r"\1", changed) == without.sub(
                r"\1", registered
            )

    @given(st.text(max_size=60))
    def test_no_text_is_registered_by_accident(self, text):
        assert m.is_registered_uri(text, ("https://app.example/cb", "http://127.0.0.1/cb")) is (
            text == "https://app.example/cb"
        ) or re.fullmatch(r"http://127\.0\.0\.1(:\d{1,5})?/cb", text)

    def test_they_belong_to_their_client_and_count_at_once(self, idp, service, public):
        row = m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "redirect", " https://app.example/cb ")
        assert (
            m.find_client(idp, "spa").redirect_uris == ("https://app.example/cb",)
            and m.find_client(idp, "service").redirect_uris == ()
        )
        with pytest.raises(m.Problem, match="conflict"):
            m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "redirect", "https://app.example/cb")
        for kind, owner in (("post_logout", None), ("redirect", "service")):
            with pytest.raises(m.Problem, match="not_found"):
                m.delete_uri(idp, m.LOCAL.acting_as("test"), row.id, kind, owner)
        m.delete_uri(idp, m.LOCAL.acting_as("test"), row.id, "redirect", "spa")
        assert m.find_client(idp, "spa").redirect_uris == ()
        assert [(found.action, found.target, found.secondary) for found in idp.store.list_audit(limit=2)] == [
            ("redirect_uri_removed", "spa", "https://app.example/cb"),
            ("redirect_uri_added", "spa", "https://app.example/cb"),
        ]

    def test_cors_is_for_public_clients(self, idp, service, public):
        m.add_uri(idp, m.LOCAL.acting_as("test"), "spa", "cors_origin", "https://app.example")
        with pytest.raises(m.Problem, match="invalid_request"):
            m.add_uri(idp, m.LOCAL.acting_as("test"), "service", "cors_origin", "https://app.example")


class TestNearest:
    """What the log says of a value that nobody has registered"""

    @pytest.mark.parametrize(
        "came, registered, nearest",
        [
            ("https://app.example/cb/", ["https://app.example/cb", "https://b.example/cb/"], "https://app.example/cb"),
            ("http://app.example/cb", ["https://app.example/cb", "https://app.example/"], "https://app.example/cb"),
            ("https://app.example/CB", ["https://app.example/ab", "https://app.example/cb"], "https://app.example/cb"),
            ("https://ap.example/cb", ["https://other.example/cb", "https://app.example/cb"], "https://app.example/cb"),
            ("https://a.example:8443/cb", ["https://b.example/", "https://a.example/cb"], "https://a.example/cb"),
            ("api.read", ["api:write", "api:read", "admin"], "api:read"), ("aa", ["aaa", "b"], "aaa"),
            ("", ["https://app.example/cb"], "https://app.example/cb"), ("x", [], ""), ("x", {"y"}, "y"),
        ],
    )
    def test_is_what_differs_least(self, came, registered, nearest):
        assert m.nearest(came, registered) == nearest

    @given(st.text(max_size=400))
    def test_an_excerpt_is_one_word_of_ascii_and_bounded(self, text):
        for value in (text, text * 50, text + "\ud800"):
            assert re.fullmatch(r"[!#-;=?-\[\]_a-z~]{0,300}", m.excerpt(value)), m.excerpt(value)

    def test_what_a_uri_may_contain_stays_as_it_came(self):
        assert m.excerpt("https://a.example/%63b?x=1&y=[~]#f") == "https://a.example/%63b?x=1&y=[~]#f"
        assert m.excerpt("x" * 300) == "x" * 300 and m.excerpt("x" * 301) == "x" * 297 + "..."


class TestSwitches:
    """OpenID Connect Core §3.1.2.1, RFC 8252 §7.1 and §8.4: URIs that only a client with a switch may have"""

    HTTP = (
        "http://nas.lan:3000/cb", "http://192.168.1.5/cb", "http://[fd00::1]:8080/cb?a=b", "http://nas/cb",
        "http://app.example/cb",
    )
    SHORT = ("audiobookshelf://oauth", "myapp:/cb", "myapp:cb", "Obsidian://x", "web+app://cb", "app://localhost:8080/cb")
    NEVER = (
        "javascript:alert(1)", "JAVASCRIPT:alert(1)", "data:text/html,x", "file:///etc/passwd", "intent://x#Intent;end",
        "intent://scan/", "mailto:a@b.example", "vbscript:x", "blob:https://a.example/1", "about:blank", "ftp://a/cb",
        "ws://a/cb", "wss://a/cb", "tel:1", "sms:1", "chrome://settings", "chrome-extension://abc/cb",
        "view-source:https://a.example/", "ms-settings:x", "ms-appx-web://x/y", "search-ms:x", "localhost:8080/cb",
        "nas:8080/cb", "http:nas/cb", "http://user@nas/cb", "http:///cb", "http://nas/cb#x", "http://nas:99999/cb",
        "1app:/cb", ":/cb", "null",
    )
    BY = m.LOCAL.acting_as("test")

    def set(self, idp, client_id, **switches):
        return m.update_client(idp, self.BY, client_id, UpdateClient(**switches))

    @pytest.mark.parametrize("kind", ["redirect", "post_logout"])
    @pytest.mark.parametrize(
        "switch, uris, others", [("allow_http_redirects", HTTP, SHORT), ("allow_short_schemes", SHORT, HTTP)]
    )
    def test_each_lets_in_its_own_kind_and_no_other(self, idp, service, switch, uris, others, kind):
        def add(uri):
            m.add_uri(idp, self.BY, "service", kind, uri)

        for uri in uris + others:
            with pytest.raises(m.Problem, match="invalid_request") as refused:
                add(uri)
            assert "lets a" in refused.value.errors["uri"]
        self.set(idp, "service", **{switch: True})
        for uri in uris:
            add(uri)
        for uri in others + self.NEVER:
            with pytest.raises(m.Problem, match="invalid_request"):
                add(uri)
        client = m.find_client(idp, "service")
        found = client.redirect_uris if kind == "redirect" else client.post_logout_redirect_uris
        assert sorted(found) == sorted(uris)

    @pytest.mark.parametrize("uri", NEVER)
    def test_what_is_no_clients_is_never_let_in(self, uri):
        assert m.check_redirect_uri(uri, allow_http=True, allow_short=True)

    def test_http_is_for_confidential_clients(self, idp, public, new_client):
        with pytest.raises(m.Problem) as refused:
            self.set(idp, "spa", allow_http_redirects=True)
        assert refused.value.errors == {"allow_http_redirects": "is for confidential clients"}
        with pytest.raises(m.Problem, match="invalid_request"):
            new_client("other", client_type="public", allow_http_redirects=True)
        for change in ({"allow_http_redirects": False}, {"allow_short_schemes": True}):
            self.set(idp, "spa", **change)
        m.add_uri(idp, self.BY, "spa", "redirect", self.SHORT[0])

    def test_it_lets_nothing_in_for_a_public_client_that_has_it_nevertheless(self, idp, public, change):
        change("UPDATE client SET allow_http_redirects = 1 WHERE client_type = 'public'")
        with pytest.raises(m.Problem, match="invalid_request"):
            m.add_uri(idp, self.BY, "spa", "redirect", self.HTTP[0])

    @pytest.mark.parametrize("switch, uri", [("allow_http_redirects", HTTP[0]), ("allow_short_schemes", SHORT[0])])
    @pytest.mark.parametrize("kind", ["redirect", "post_logout"])
    def test_one_stays_on_as_long_as_a_uri_needs_it(self, idp, new_client, switch, uri, kind):
        new_client("lan", **{switch: True})
        m.add_uri(idp, self.BY, "lan", "redirect", "https://app.example/cb")
        row = m.add_uri(idp, self.BY, "lan", kind, uri)
        with pytest.raises(m.Problem) as refused:
            self.set(idp, "lan", **{switch: False, "display_name": "new"})
        assert refused.value.errors == {switch: f"is needed for {uri}: remove that URI first"}
        kept = m.find_client(idp, "lan")
        assert getattr(kept.row, switch) == 1 and kept.row.display_name == ""
        self.set(idp, "lan", display_name="new", **{switch: True})
        m.delete_uri(idp, self.BY, row.id, kind)
        assert getattr(self.set(idp, "lan", **{switch: False}).row, switch) == 0
        with pytest.raises(m.Problem, match="invalid_request"):
            m.add_uri(idp, self.BY, "lan", kind, uri)

    def test_a_uri_that_no_switch_lets_in_keeps_none_on(self, idp, service, change):
        row = m.add_uri(idp, self.BY, "service", "redirect", "https://app.example/cb")
        change("UPDATE client_uri SET uri = 'javascript:x' WHERE id = :id", id=row.id)
        self.set(idp, "service", allow_short_schemes=True, allow_http_redirects=False)
        self.set(idp, "service", allow_short_schemes=False)

    def test_whoever_turns_one_on_is_warned_and_each_change_is_audited(self, idp, new_client):
        def warnings():
            return [line for line in idp.stream.getvalue().splitlines() if "WARNING client.switch" in line]

        new_client("plain")
        assert not warnings()
        new_client("lan", allow_http_redirects=True)
        self.set(idp, "lan", allow_http_redirects=True, allow_short_schemes=True)
        self.set(idp, "lan", allow_http_redirects=False)
        self.set(idp, "lan", display_name="x")
        assert [re.findall("client_id=lan switch=([a-z_]+) reason=.+", line) for line in warnings()] == [
            ["allow_http_redirects"], ["allow_short_schemes"],
        ]
        rows = [row for row in idp.store.list_audit(limit=20) if row.action == "client_flag_set"]
        assert [(row.actor_id, row.target, row.secondary) for row in reversed(rows)] == [
            ("test", "lan", "allow_http_redirects=on"), ("test", "lan", "allow_short_schemes=on"),
            ("test", "lan", "allow_http_redirects=off"),
        ]


class TestCrowd:
    """After a power cut all services of the box come at once, and all of them are one peer."""

    @pytest.fixture
    def come(self, idp, monkeypatch):
        """Let so many authenticate at once, a hash in 10 ms: what they heard, and how many hashes.

        With `together` the first hash ends only when all have come: each waits for a name, or has heard its answer.
        """
        hashes, compute, until = [], Argon2Memory.compute, [lambda: True]

        def slow(*words):
            hashes.append(1)
            while not until[0]():
                time.sleep(0.001)
            time.sleep(0.01)
            return compute(*words)

        monkeypatch.setattr(Argon2Memory, "compute", slow)

        def call(pairs, peer="127.0.0.1", together=False):
            heard, start = [], threading.Barrier(len(pairs))
            came = threading.Event()

            def all_have_come():
                waiting = sum(name_lock.users for name_lock in list(idp.hasher.name_locks.names.values()))
                if waiting + len(heard) == len(pairs):
                    came.set()
                return came.is_set()

            until[0] = all_have_come if together else lambda: True

            def one(client_id, secret):
                start.wait(20)
                try:
                    m.authenticate_client(idp, m.Caller(peer), client_id, secret)
                    heard.append("welcome")
                except m.Problem as problem:
                    heard.append(problem.message)

            threads = [threading.Thread(target=one, args=pair) for pair in pairs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            told = collections.Counter(heard), len(hashes)
            hashes.clear()
            return told

        return call

    def test_a_hundred_of_one_client_are_served_for_one_hash(self, come, service):
        assert come([service] * 100) == ({"welcome": 100}, 1)

    def test_a_hundred_and_fifty_clients_are_served(self, come, new_client):
        assert come([new_client(f"c{number}") for number in range(150)]) == ({"welcome": 150}, 150)

    def test_who_guesses_does_not_keep_the_others_out(self, idp, come, service, new_client):
        """From one peer, under a hundred names, as fast as it can."""
        come([("nobody", "wrong")], "192.0.2.1")
        heard, hashes = come([(f"nobody{number}", "wrong") for number in range(100)], "192.0.2.1")
        few = idp.hasher.gate.blamed_capacity // 2
        assert heard[BUSY] >= 100 - 2 * few and few <= hashes < 100
        assert come([service], "192.0.2.2")[0] == {"welcome": 1}

    def test_a_crowd_with_a_wrong_secret_is_told_to_come_back(self, idp, come, service):
        """Each of them would hold a thread for a hash of its own."""
        come([("service", "wrong")])
        heard, hashes = come([("service", "wrong")] * 100, together=True)
        assert (heard[BUSY], hashes) == (100 - 1 - NameLocks.MAX_WAITERS, 1 + NameLocks.MAX_WAITERS)
        assert not idp.hasher.name_locks.names and not idp.hasher.gate.in_use

    @pytest.mark.parametrize("client_id", ["service", "nobody"])
    def test_an_unknown_client_waits_and_hears_as_a_known_one(self, come, service, client_id):
        heard, hashes = come([(client_id, "wrong")] * 10)
        assert (heard, hashes) == ({m.ERRORS["invalid_client"][1]: 10}, 10)

    def test_who_would_wait_too_long_hears_that_the_server_is_busy(self, idp, auth, service):
        gate = idp.hasher.gate
        gate.mean_seconds, gate.per_peer["192.0.2.7"] = 6.0 * gate.max_running, 2
        answer = auth.post("/token", MACHINE, auth=service)
        assert (answer.status, answer.json["error_description"]) == (429, BUSY), "two before it, six seconds each"
        assert answer.headers["retry-after"] == "10"
        gate.per_peer["192.0.2.7"] = 1
        assert auth.post("/token", MACHINE, auth=service).status == 200

    def test_busy_is_said_as_such(self, idp, auth, service):
        idp.hasher.gate.capacity = 0
        answer = auth.post("/token", MACHINE, auth=service)
        assert (answer.status, answer.json) == (429, {"error": "slow_down", "error_description": BUSY})
        assert int(answer.headers["retry-after"]) >= 1

    @pytest.mark.parametrize("what", ["is_active = 0", "client_id = 'another'"])
    def test_what_changes_while_a_client_waits_holds(self, auth, service, monkeypatch, change, what):
        compute = Argon2Memory.compute

        def meanwhile(*words):
            change(f"UPDATE client SET {what} WHERE client_id = 'service'")
            return compute(*words)

        monkeypatch.setattr(Argon2Memory, "compute", meanwhile)
        assert auth.post("/token", MACHINE, auth=service).status == 401
