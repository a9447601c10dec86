"""Options: declared once; default < file < environment < flag."""

import os

import microauthd as m
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def load(tmp_path, content="", environ=None, argv=()):
    path = tmp_path / "mad.conf"
    path.write_text(content)
    path.chmod(0o600)
    return m.load_options(m.parse_flags(["--config", str(path), *argv])[0], environ or {})


class TestPrecedence:
    def test_flag_over_environment_over_file_over_default(self, tmp_path):
        assert load(tmp_path).auth_port == 9040
        assert load(tmp_path, "auth-port = 1").auth_port == 1
        assert load(tmp_path, "auth-port = 1", {"MAD_AUTH_PORT": "2"}).auth_port == 2
        options = load(tmp_path, "auth-port = 1", {"MAD_AUTH_PORT": "2"}, ["--auth-port", "3"])
        assert options.auth_port == 3 and m.describe_options(options)["auth-port"] == {"value": 3, "origin": "flag --auth-port"}

    @pytest.mark.parametrize("alias, option", [(alias, option) for option in m.OPTIONS for alias in option.aliases])
    def test_the_documented_aliases_work(self, tmp_path, alias, option):
        word = {m.boolean: "true", m.text: "x"}.get(option.parse, str(option.default))
        assert getattr(load(tmp_path, f"{alias} = {word}"), option.attribute) == option.parse(word)
        assert getattr(load(tmp_path, "", {"MAD_" + alias.upper().replace("-", "_"): word}), option.attribute) == option.parse(word)

    def test_another_prefix(self, tmp_path):
        flags = m.parse_flags(["--config", str(tmp_path / "none"), "--env-var-prefix", "BOX_"])[0] | {"config-may-be-missing": True}
        assert m.load_options(flags, {"BOX_AUTH_PORT": "7", "MAD_AUTH_PORT": "8"}).auth_port == 7


class TestFile:
    @pytest.mark.parametrize("line, value", [
        ("db-pass = abc", "abc"), ('db-pass = "a#b;c"', "a#b;c"), ('db-pass = " blanks "', " blanks "), ('db-pass = "" # none', ""),
        ('db-pass = "x" ; comment', "x"), ("db-pass = a # comment", "a"), ("DB-PASS=a=b", "a=b"), ('db-pass = "say "hi""', 'say "hi"'), ("db-pass =", ""),
    ])
    def test_values(self, tmp_path, line, value):
        assert load(tmp_path, "# comment\n\n" + line).db_pass == value

    @pytest.mark.parametrize("content, sentence", [
        ("auth-prot = 1", "mad.conf:1: unknown option 'auth-prot'; did you mean 'auth-port'?"), ("\nauth-port", "mad.conf:2: not a line"),
        ("auth-port = 1\nauth-port = 2", "mad.conf:2: auth-port is set twice"), ("auth-port = x", "mad.conf:1: auth-port must be a whole number from 1 to 65535"),
        ('db-pass = "open', "does not close"), ("auth-ip = box", "auth-ip must be an IP address"), ("enable-pkce = maybe", "must be true or false"),
        ("auth-ip = 0.0.0.0", "auth-insecure-http"), ("admin-ip = ::", "admin-insecure-http"), ("admin-port = 9040", "same address and port"),
        ("oidc-issuer = ftp://x", "must be an http(s) URL"), ("oidc-issuer = https://x/?a", "must be an http(s) URL"), ("totp-qr-output-root = qr", "absolute"),
        ("argon2id-memory = 1", "from 8192"), ("trusted-proxies = nonsense", "networks"),
    ])
    def test_what_is_wrong_is_said_with_its_line(self, tmp_path, content, sentence):
        with pytest.raises(m.Refusal) as caught:
            load(tmp_path, content)
        assert sentence in str(caught.value)

    @pytest.mark.parametrize("word, value", [("True", True), ("YES", True), ("1", True), ("on", True), ("False", False), ("no", False), ("0", False)])
    def test_booleans_in_any_case(self, tmp_path, word, value):
        assert load(tmp_path, f"docker = {word}").docker is value

    def test_a_readable_file_of_secrets_becomes_private_and_says_so(self, tmp_path, capsys):
        path = tmp_path / "mad.conf"
        path.write_text("db-pass = secret")
        path.chmod(0o644)
        m.load_options({"config": (str(path), "flag")}, {})
        assert path.stat().st_mode & 0o777 == 0o600
        assert "readable by others" in capsys.readouterr().err

    def test_a_named_file_must_be_there(self, tmp_path):
        with pytest.raises(m.Refusal):
            m.load_options({"config": (str(tmp_path / "missing"), "flag")}, {})

    @settings(max_examples=200)
    @given(st.text(st.characters(min_codepoint=32, exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=30))
    def test_what_is_written_is_what_is_read(self, value):
        origins = {"db-pass": "setup", "auth-port": "setup"}
        written = m.write_config(m.Options(origins, db_pass=value, auth_port=81, docker=True, trusted_proxies=m.networks("10.0.0.0/8, 192.168.1.1")))
        found = {name: word for name, (word, _) in m.parse_config(written, "x").items()}
        assert found["db-pass"] == value and found["auth-port"] == "81" and found["docker"] == "true" and found["trusted-proxies"] == "10.0.0.0/8, 192.168.1.1/32"

    @pytest.mark.parametrize("mark", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x7f"])
    def test_what_ends_a_line_cannot_be_written_nor_begin_another(self, mark):
        with pytest.raises(m.Refusal):
            m.write_config(m.Options(db_pass=f"a{mark}auth-ip = 0.0.0.0"))
        if mark != "\n":
            assert list(m.parse_config(f"db-pass = a{mark}auth-ip = 0.0.0.0", "x")) == ["db-pass"]


class TestEnvironment:
    def test_an_unknown_variable_is_an_error_and_those_of_mad_are_known(self, tmp_path):
        with pytest.raises(m.Refusal) as caught:
            load(tmp_path, "", {"MAD_AUTH_PROT": "1"})
        assert "MAD_AUTH_PROT" in str(caught.value) and "auth-port" in str(caught.value)
        load(tmp_path, "", {"MAD_ADMIN_TOKEN": "x", "MAD_ADMIN_URL": "x", "MAD_AUTH_URL": "x", "MAD_CLIENT_ID": "x", "MAD_CLIENT_SECRET": "x", "MAD_CA_FILE": "x", "PATH": "/"})


class TestSecrets:
    def test_they_are_never_flags(self):
        for option in m.OPTIONS:
            if option.secret:
                with pytest.raises(m.Refusal) as caught:
                    m.parse_flags([f"--{option.name}", "x"])
                assert "secret" in str(caught.value)

    def test_they_are_never_shown(self):
        values = {option.attribute: "hush-hush" for option in m.OPTIONS if option.secret}
        assert "hush-hush" not in str(m.describe_options(m.Options(**values)))
        assert all(m.describe_options(m.Options(**values))[option.name]["value"] == "(set)" for option in m.OPTIONS if option.secret)


class TestIssuer:
    def test_it_is_made_of_the_domain_unless_named(self):
        assert m.Options().auth_issuer == "https://localhost"
        assert m.Options(auth_domain="box.example:8443", auth_domain_no_ssl=True).auth_issuer == "http://box.example:8443"
        assert m.Options(oidc_issuer="https://box/auth").auth_issuer == "https://box/auth"
        assert m.issuer("microauthd") == "" and m.issuer("https://box/auth/") == "https://box/auth"

    def test_the_ports_have_issuers_of_their_own(self):
        assert m.Options().auth_issuer != m.Options().admin_issuer


class TestCommandLine:
    @pytest.mark.parametrize("argv, status", [(["version"], 0), (["--help"], 0), (["nonsense"], 2), (["serve", "--nonsense"], 2), (["serve", "extra"], 2), (["serve", "--db-pass", "x"], 2)])
    def test_exit_statuses(self, argv, status, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        mask = os.umask(0o022)
        assert m.main(argv) == status
        os.umask(mask)
