"""A browser without a screen: it keeps cookies, follows redirects within the server, and fills in the forms of a page."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urlencode, urlsplit

from conftest import Caller

VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
CALLBACK = "https://app.example/cb"
HTML = ("Accept", "text/html,application/xhtml+xml")


class Forms(HTMLParser):
    """The forms of a page: action, fields with their values, the buttons that carry one; and the text."""

    def __init__(self, page):
        super().__init__()
        self.forms, self.words, self.title = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "form":
            self.forms.append({"action": attributes["action"], "fields": {}, "buttons": []})
        if tag == "input" and self.forms:
            self.forms[-1]["fields"][attributes["name"]] = attributes.get("value", "")
        if tag == "button" and self.forms and attributes.get("name"):
            self.forms[-1]["buttons"].append((attributes["name"], attributes["value"]))

    def handle_data(self, data):
        self.words.append(data)


class Browser:
    def __init__(self, app, issuer="https://idp.example", host="idp.example"):
        self.caller, self.issuer, self.cookies, self.at = Caller(app, host), issuer, {}, None

    def __call__(self, method, path, data=None, headers=()):
        cookie = (
            [("Cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items()))] if self.cookies else []
        )
        answer = self.caller(method, path, data, headers=[HTML, ("User-Agent", "a browser"), *cookie, *headers])
        for line in answer.cookies:
            name, value = line.partition(";")[0].split("=", 1)
            assert (
                "HttpOnly" in line
                and "SameSite=Lax" in line
                and "Path=/" in line
                and ("Secure" in line) is self.issuer.startswith("https")
                and name.startswith("__Host-") is self.issuer.startswith("https")
            )
            if "Max-Age=0" in line:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
        self.answer = answer
        return answer

    def follow(self, answer=None):
        """Follow redirects as long as they stay on the server. The last answer, or where it leads away to."""
        answer = answer or self.answer
        while answer.status in (302, 303):
            location = answer.headers["location"]
            if not location.startswith(self.issuer + "/"):
                return answer
            answer = self("GET", location.removeprefix(self.issuer))
        return answer

    def open(self, path):
        return self.follow(self("GET", path))

    def forms(self):
        return Forms(self.answer.body.decode())

    def submit(self, number=0, button=None, **fields):
        """Fill in a form of the page and send it. Follows redirects."""
        form = self.forms().forms[number]
        data = form["fields"] | fields | dict([button] if button else [])
        return self.follow(self("POST", form["action"].removeprefix(self.issuer), data))


def request(client_id="spa", **more):
    """The path of an authorization request; a parameter that is None is left out."""
    parameters = {
        "client_id": client_id, "redirect_uri": CALLBACK, "response_type": "code", "scope": "openid profile email",
        "state": "st&te", "nonce": "n0nce", "code_challenge": CHALLENGE, "code_challenge_method": "S256",
    } | more
    return "/authorize?" + urlencode({name: value for name, value in parameters.items() if value is not None})


def sent_back(answer, status=303):
    """The parameters a client is sent: (URI without them, {name: value}). /login/finalize answers 302."""
    assert answer.status == status, answer
    parts = urlsplit(answer.headers["location"])
    return answer.headers["location"].partition("?")[0], dict(parse_qsl(parts.query, strict_parsing=True))


def title(answer):
    return re.search(rb"<h1>(.*?)</h1>", answer.body)[1].decode()
