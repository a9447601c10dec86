"""Strangers' software uses us as it uses anybody."""

from html.parser import HTMLParser

import pytest
import requests
from box import Box
from conftest import PASSWORD


@pytest.fixture(scope="module", autouse=True)
def plain_http():
    """These clients would rather speak TLS."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")
        patched.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
        yield


@pytest.fixture(scope="module")
def box(box):
    """One with a user."""
    box.new_user("ann", PASSWORD)
    return box


@pytest.fixture
def url(box):
    return f"http://127.0.0.1:{box.auth_port}"


class TestAuthlib:
    @pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
    def test_every_grant_and_revocation(self, box, url, method):
        from authlib.integrations.requests_client import OAuth2Session

        session = OAuth2Session(*box.client, token_endpoint_auth_method=method, scope="api:read")
        assert session.fetch_token(url + "/token", grant_type="client_credentials")["scope"] == "api:read"
        session = OAuth2Session(*box.client, token_endpoint_auth_method=method, scope="openid profile")
        token = session.fetch_token(url + "/token", username="ann", password=PASSWORD)
        assert session.get(url + "/userinfo").json()["preferred_username"] == "ann"
        again = session.refresh_token(url + "/token", refresh_token=token["refresh_token"])
        assert again["access_token"] != token["access_token"]
        assert session.introspect_token(url + "/introspect", token=again["access_token"]).json()["active"] is True
        assert session.revoke_token(url + "/revoke", token=again["access_token"]).status_code == 200
        assert session.introspect_token(url + "/introspect", token=again["access_token"]).json() == {"active": False}

    def test_the_id_token(self, box, url):
        from authlib.jose import JsonWebKey, JsonWebToken
        from authlib.oidc.core import ImplicitIDToken

        answer = box.log_in("ann", PASSWORD, scope="openid email").json
        metadata = box.auth("/.well-known/openid-configuration").json
        claims = JsonWebToken(metadata["id_token_signing_alg_values_supported"]).decode(
            answer["id_token"], JsonWebKey.import_key_set(box.auth("/jwks.json").json), claims_cls=ImplicitIDToken,
            claims_options={"iss": {"values": [metadata["issuer"]]}, "aud": {"values": [box.client[0]]}},
            claims_params={"access_token": answer["access_token"], "nonce": None},
        )
        claims.validate_at_hash()
        assert claims["iss"] == metadata["issuer"] and claims["email"] == "ann@example.org"


class Form(HTMLParser):
    """The first form of a page: a login has a second one, which cancels it."""

    def __init__(self, page):
        super().__init__()
        self.action, self.fields = "", {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form" and not self.action:
            self.action = attributes["action"]
        if tag == "input":
            self.fields.setdefault(attributes["name"], attributes.get("value", ""))


class TestAuthlibCodeFlow:
    """A stock web application, as README shows it."""

    def test_it_logs_people_in(self, tmp_path):
        from authlib.integrations.requests_client import OAuth2Session

        box = Box(tmp_path / "data", workers="0", enable_token_refresh="true")
        box.settings["oidc-issuer"] = issuer = f"http://127.0.0.1:{box.auth_port}"
        callback = "http://127.0.0.1:1/cb"
        with box:
            box.new_user("ann", PASSWORD)
            assert (
                box.admin("POST", "/clients/app/redirect-uris", json_body=callback, bearer=box.admin_token()).status
                == 201
            )
            session = OAuth2Session(
                *box.client, scope="openid email offline_access", redirect_uri=callback, code_challenge_method="S256"
            )
            url, state = session.create_authorization_url(issuer + "/authorize", code_verifier="v" * 48, nonce="n")
            person = requests.Session()
            form = Form(person.get(url).text)
            back = person.post(
                form.action, form.fields | {"username": "ann", "password": PASSWORD}, allow_redirects=False
            ).headers["Location"]
            assert back.startswith(callback + "?code="), back
            token = session.fetch_token(
                issuer + "/token", authorization_response=back, state=state, code_verifier="v" * 48
            )
            assert (
                session.get(issuer + "/userinfo").json()["email"] == "ann@example.org"
                and session.refresh_token(issuer + "/token", refresh_token=token["refresh_token"])["id_token"]
            )


class TestRequestsOauthlib:
    def test_machine_and_legacy_application(self, box, url):
        from oauthlib.oauth2 import BackendApplicationClient, LegacyApplicationClient
        from requests.auth import HTTPBasicAuth
        from requests_oauthlib import OAuth2Session

        session = OAuth2Session(client=BackendApplicationClient(box.client[0]))
        assert session.fetch_token(url + "/token", auth=HTTPBasicAuth(*box.client))["token_type"] == "Bearer"
        session = OAuth2Session(client=LegacyApplicationClient(box.client[0]), scope=["openid"])
        token = session.fetch_token(
            url + "/token", username="ann", password=PASSWORD, scope="openid", auth=HTTPBasicAuth(*box.client)
        )
        assert session.get(url + "/me").json()["email"] == "ann@example.org"
        assert session.refresh_token(
            url + "/token", refresh_token=token["refresh_token"], auth=HTTPBasicAuth(*box.client)
        )["access_token"]


class TestPyJwt:
    def test_it_fetches_the_keys_and_verifies(self, box, url):
        import jwt

        token = box.token().json["access_token"]
        key = jwt.PyJWKClient(url + "/.well-known/jwks.json").get_signing_key_from_jwt(token)
        claims = jwt.decode(
            token, key.key, algorithms=["ES256", "RS256"], audience="api",
            issuer=box.auth("/.well-known/openid-configuration").json["issuer"],
        )
        assert claims["client_id"] == box.client[0]


class TestJose:
    def test_it_verifies_by_the_whole_key_set(self, box, url):
        from jose import jwt

        token = box.token().json["access_token"]
        assert (
            jwt.decode(token, box.auth("/jwks.json").json, algorithms=["ES256"], audience="api")["sub"] == box.client[0]
        )
