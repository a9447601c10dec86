"""Options: declared once; default < file < environment < flag."""

import os
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from appliance.base import StartupError
from appliance.base.settings import (
    OPTIONS, Options, absolute, address, boolean, certificate_source, check_options, color, content_policy, days,
    describe_options, domain, host_names, issuer, label, load_options, networks, octets, parse_config, parse_flags,
    period, port, seconds, text, worker_count, write_config,
)


def load(tmp_path, content="", environ=None, argv=()):
    path = tmp_path / "mad.conf"
    path.write_text(content)
    path.chmod(0o600)
    return load_options(parse_flags(["--config", str(path), *argv])[0], environ or {})


class TestPrecedence:
    def test_flag_over_environment_over_file_over_default(self, tmp_path):
        assert load(tmp_path).auth_port == 9040
        assert load(tmp_path, "auth-port = 1").auth_port == 1
        assert load(tmp_path, "auth-port = 1", {"MAD_AUTH_PORT": "2"}).auth_port == 2
        options = load(tmp_path, "auth-port = 1", {"MAD_AUTH_PORT": "2"}, ["--auth-port", "3"])
        assert options.auth_port == 3 and describe_options(options)["auth-port"] == {
            "value": 3, "origin": "flag --auth-port",
        }

    @pytest.mark.parametrize("alias, option", [(alias, option) for option in OPTIONS for alias in option.aliases])
    def test_the_documented_aliases_work(self, tmp_path, alias, option):
        word = {boolean: "true", text: "x"}.get(option.parse, str(option.default))
        assert getattr(load(tmp_path, f"{alias} = {word}"), option.attribute) == option.parse(word)
        assert getattr(
            load(tmp_path, "", {"MAD_" + alias.upper().replace("-", "_"): word}), option.attribute
        ) == option.parse(word)

    def test_another_prefix(self, tmp_path):
        flags = parse_flags(["--config", str(tmp_path / "none"), "--env-var-prefix", "BOX_"])[0] | {
            "config-may-be-missing": True
        }
        assert load_options(flags, {"BOX_AUTH_PORT": "7", "MAD_AUTH_PORT": "8"}).auth_port == 7


class TestSecretsInFiles:
    """`LoadCredential=` of systemd.exec(5), and variables that end with _FILE, as Docker's images have them."""

    def file(self, tmp_path, name, content, mode=0o600):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
        return str(path)

    @pytest.mark.parametrize("option", [option for option in OPTIONS if option.secret])
    def test_every_secret_may_stand_in_one(self, tmp_path, option):
        variable = "MAD_" + option.name.upper().replace("-", "_") + "_FILE"
        options = load(tmp_path, "", {variable: self.file(tmp_path, "secret", "a phrase\nmore")})
        assert getattr(options, option.attribute) == "a phrase"
        assert describe_options(options)[option.name] == {"value": "(set)", "origin": f"environment {variable}"}
        self.file(tmp_path, "credentials/" + option.name, "a credential")
        options = load(tmp_path, "", {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")})
        assert getattr(options, option.attribute) == "a credential"
        assert options.origins[option.name] == f"credential {option.name}"

    def test_environment_over_credential_over_file(self, tmp_path):
        self.file(tmp_path, "credentials/db-pass", "of systemd")
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
        assert load(tmp_path, "db-pass = of the file", environ).db_pass == "of systemd"
        assert load(tmp_path, "", environ | {"MAD_DB_PASS": "of the environment"}).db_pass == "of the environment"
        named = {"MAD_DB_PASS_FILE": self.file(tmp_path, "secret", "of a variable")}
        assert load(tmp_path, "", environ | named).db_pass == "of a variable"

    def test_a_variable_and_the_name_of_its_file_contradict_each_other(self, tmp_path):
        with pytest.raises(StartupError, match="MAD_DB_PASS_FILE set the same option"):
            load(tmp_path, "", {"MAD_DB_PASS": "x", "MAD_DB_PASS_FILE": self.file(tmp_path, "secret", "x")})

    @pytest.mark.parametrize(
        "content, mode, why", [("x", 0o644, "can be read by others: chmod 600"), ("", 0o600, "is empty"), (None, 0, "No such")]
    )
    def test_what_is_wrong_names_the_variable(self, tmp_path, content, mode, why):
        path = self.file(tmp_path, "secret", content, mode) if content is not None else str(tmp_path / "missing")
        with pytest.raises(StartupError, match=f"environment MAD_DB_PASS_FILE: .*{path}.*{why}"):
            load(tmp_path, "", {"MAD_DB_PASS_FILE": path})

    @pytest.mark.parametrize("variable", ["MAD_AUTH_PORT_FILE", "MAD_NONSENSE_FILE", "MAD_DB_FILE_FILE"])
    def test_only_secrets_have_one(self, tmp_path, variable):
        with pytest.raises(StartupError, match="unknown environment variable"):
            load(tmp_path, "", {variable: "x"})

    def test_what_names_a_file_as_its_value_stays_a_path(self, tmp_path):
        environ = {"MAD_DB_FILE": "x.db3", "MAD_AUTH_SSL_KEY_FILE": "k.pem", "MAD_CLIENT_SECRET_FILE": "of mad"}
        options = load(tmp_path, "", environ)
        assert (options.db_file, options.auth_ssl_key_file) == ("x.db3", "k.pem")

    def test_in_a_container_docker_mounts_them_for_all(self, tmp_path):
        environ = {"MAD_DOCKER": "true", "MAD_DB_PASS_FILE": self.file(tmp_path, "secret", "a phrase", 0o444)}
        assert load(tmp_path, "", environ).db_pass == "a phrase"

    def test_they_stay_the_only_copy(self, tmp_path):
        """A set-up writes no config file that would keep the old passphrase beside a new credential."""
        self.file(tmp_path, "credentials/db-pass", "a secret phrase")
        environ = {
            "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
            "MAD_TOKEN_SIGNING_KEY_PASS_FILE": self.file(tmp_path, "secret", "a secret too"),
        }
        written = write_config(load(tmp_path, "oidc-client-secret = kept kept kept kept", environ))
        assert "a secret" not in written and "oidc-client-secret = kept" in written
        assert load(tmp_path, written, environ).db_pass == "a secret phrase"


class TestTheKeyFile:
    """db-key-file: a path, whose file may be a credential of systemd. LoadCredential= of systemd.exec(5)."""

    def test_a_credential_is_taken_and_named_in_no_config_file(self, tmp_path):
        (tmp_path / "db-key-file").write_bytes(bytes(32))
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
        options = load(tmp_path, "db-key-file = other.key", environ)
        assert (options.db_key_file, options.origins["db-key-file"]) == (
            str(tmp_path / "db-key-file"), "credential db-key-file",
        )
        assert load(tmp_path, "", environ | {"MAD_DB_KEY_FILE": "named.key"}).db_key_file == "named.key"
        assert load(tmp_path, "", {}).db_key_file == load(tmp_path, "", {"CREDENTIALS_DIRECTORY": ""}).db_key_file == ""
        assert str(tmp_path) not in write_config(options)

    @pytest.mark.parametrize("other", ["db-pass = a phrase", "no-db-pass = true"])
    def test_with_a_passphrase_or_none_on_purpose_it_is_refused(self, tmp_path, other):
        with pytest.raises(StartupError, match="are both set"):
            load(tmp_path, f"db-key-file = a.key\n{other}")


class TestSizes:
    @pytest.mark.parametrize(
        "word, size",
        [
            ("auto", -1), ("AUTO", -1), ("1000000", 10**6), ("1MB", 10**6), ("64 MB", 64 * 10**6), ("2g", 2 * 10**9),
            ("1500 kB", 1_500_000), ("1000 GB", 10**12), ("1000000000000", 10**12),
        ],
    )
    def test_they_may_have_a_unit(self, word, size):
        assert octets(word) == size

    @pytest.mark.parametrize("word", ["", "0", "-1", "999999", "999 KB", "1001 GB", "1.5 GB", "64 MiB", "1 TB", "many"])
    def test_what_is_no_size_is_refused_with_one_that_is(self, word):
        with pytest.raises(ValueError, match="such as 64 MB"):
            octets(word)


class TestPeriods:
    @pytest.mark.parametrize(
        "word, seconds",
        [
            ("off", 0), ("0", 0), ("never", 0), ("Daily", 86400), ("hourly", 3600), ("weekly", 604800), ("900", 900),
            ("15m", 900), ("6 h", 21600), ("2 days", 172800), ("1 week", 604800), ("12 hours", 43200), ("366d", 31622400),
        ],
    )
    def test_they_are_words_or_numbers_with_a_unit(self, word, seconds):
        assert period(word) == seconds

    @pytest.mark.parametrize("word", ["", "-1", "1", "14 m", "899", "367 d", "1.5 h", "often", "monthly", "true"])
    def test_what_is_none_is_refused_with_some_that_are(self, word):
        with pytest.raises(ValueError, match="must be off, hourly, daily"):
            period(word)


class TestFile:
    @pytest.mark.parametrize(
        "line, value",
        [
            ("db-pass = abc", "abc"), ('db-pass = "a#b;c"', "a#b;c"), ('db-pass = " blanks "', " blanks "),
            ('db-pass = "" # none', ""), ('db-pass = "x" ; comment', "x"), ("db-pass = a # comment", "a"),
            ("DB-PASS=a=b", "a=b"), ('db-pass = "say "hi""', 'say "hi"'), ("db-pass =", ""),
        ],
    )
    def test_values(self, tmp_path, line, value):
        assert load(tmp_path, "# comment\n\n" + line).db_pass == value

    @pytest.mark.parametrize(
        "content, sentence",
        [
            ("auth-prot = 1", "mad.conf:1: unknown option 'auth-prot'; did you mean 'auth-port'?"),
            ("\nauth-port", "mad.conf:2: not a line"),
            ("auth-port = 1\nauth-port = 2", "mad.conf:2: auth-port is set twice"),
            ("auth-port = x", "mad.conf:1: auth-port must be a whole number from 1 to 65535"),
            ("public-csp = default-src 'self'; object-src 'none'", "double quotes"),
            ('public-csp = "default-src *, script-src *"', "must be directives"),
            ('public-csp = "default-src *\x07"', "must be directives"), ('public-csp = "é *"', "must be directives"),
            ('public-csp = "default-src *; \'self\'"', "must be directives"),
            ('db-pass = "open', "does not close"), ("auth-ip = box", "auth-ip must be an IP address"),
            ("enable-pkce = maybe", "must be true or false"), ("auth-ip = 0.0.0.0", "auth-insecure-http"),
            ("admin-ip = ::", "admin-insecure-http"), ("admin-port = 9040", "same address and port"),
            ("admin-socket-users = root, a b", "must be names or numbers of users"),
            ("oidc-issuer = ftp://x", "must be an http(s) URL"),
            ("oidc-issuer = https://x/?a", "must be an http(s) URL"), ("totp-qr-output-root = qr", "absolute"),
            ("argon2id-memory = 1", "from 8192"), ("trusted-proxies = nonsense", "networks"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_line(self, tmp_path, content, sentence):
        with pytest.raises(StartupError) as caught:
            load(tmp_path, content)
        assert sentence in str(caught.value)

    @pytest.mark.parametrize(
        "word, value",
        [("True", True), ("YES", True), ("1", True), ("on", True), ("False", False), ("no", False), ("0", False)],
    )
    def test_booleans_in_any_case(self, tmp_path, word, value):
        assert load(tmp_path, f"docker = {word}").docker is value

    def test_a_readable_file_of_secrets_becomes_private_and_says_so(self, tmp_path, capsys):
        path = tmp_path / "mad.conf"
        path.write_text("db-pass = secret")
        path.chmod(0o644)
        load_options({"config": (str(path), "flag")}, {})
        assert path.stat().st_mode & 0o777 == 0o600
        assert "readable by others" in capsys.readouterr().err

    def test_a_named_file_must_be_there(self, tmp_path):
        with pytest.raises(StartupError):
            load_options({"config": (str(tmp_path / "missing"), "flag")}, {})

    @pytest.mark.parametrize("letter", ["\n", "\r", "\0", "\t", "\x0b", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"])
    def test_a_control_character_cannot_be_written(self, letter):
        with pytest.raises(StartupError) as caught:
            write_config(Options(db_pass=f"a{letter}auth-ip = 0.0.0.0"))
        assert "db-pass" in str(caught.value) and "0.0.0.0" not in str(caught.value)
        if letter != "\n":
            assert list(parse_config(f"db-pass = a{letter}auth-ip = 0.0.0.0", "x")) == ["db-pass"], (
                "nor does it begin another line"
            )

    def test_the_sample_file_of_the_original_means_what_it_says(self, tmp_path):
        """A quoted value before a comment, capital booleans, keys in any case."""
        content = '; a comment\nToken-Signing-Key-Pass = ""   # none\nENABLE-AUDIT-LOGGING = True\nauth-domain-no-ssl=YES ; behind nginx\nauth-use-ssl = true\n'
        options = load(tmp_path, content)
        assert (options.token_signing_key_pass, options.enable_audit_logging, options.auth_domain_no_ssl) == (
            "", True, True,
        )

    def test_lines_may_end_as_on_windows(self, tmp_path):
        path = tmp_path / "mad.conf"
        path.write_bytes(b"auth-port = 81\r\ndb-pass = a b\r\n")
        path.chmod(0o600)
        options = load_options({"config": (str(path), "flag")}, {})
        assert (options.auth_port, options.db_pass) == (81, "a b")

    @pytest.mark.parametrize("content", [b"auth-port = \xff\xfe", b"db-pass = \xff"])
    def test_what_is_not_utf8_is_refused_in_a_sentence(self, tmp_path, content):
        path = tmp_path / "mad.conf"
        path.write_bytes(content)
        with pytest.raises(StartupError) as caught:
            load_options({"config": (str(path), "flag")}, {})
        assert str(caught.value).endswith(" is not valid UTF-8")

    def test_a_file_that_is_not_ours_to_repair_is_refused(self, tmp_path, monkeypatch):
        path = tmp_path / "mad.conf"
        path.write_text("db-pass = secret")
        path.chmod(0o644)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(StartupError) as caught:
            load_options({"config": (str(path), "flag")}, {})
        assert "chmod 600" in str(caught.value) and path.stat().st_mode & 0o777 == 0o644

    def test_a_file_without_secrets_may_be_read_by_all(self, tmp_path, capsys):
        path = tmp_path / "mad.conf"
        path.write_text("auth-port = 81")
        path.chmod(0o644)
        load_options({"config": (str(path), "flag")}, {})
        assert path.stat().st_mode & 0o777 == 0o644 and capsys.readouterr().err == ""


TEXT = st.text(
    st.one_of(st.sampled_from("\"#;= \\'\x85\u2028\u2029\ufeff\xa0ab"), st.characters(exclude_categories=("Cs", "Cc"))),
    max_size=20,
)
VALUES = {
    color: st.from_regex(r"[0-9a-f]{6}", fullmatch=True).map("#".__add__), label: st.just("Box & Co #1"),
    text: TEXT, boolean: st.booleans(), absolute: st.one_of(st.just(""), TEXT.map("/".__add__)),
    address: st.sampled_from(["127.0.0.1", "::1", "127.9.9.9"]), port: st.integers(1, 65535),
    seconds: st.integers(1, 315360000), days: st.integers(0, 9999), worker_count: st.integers(-1, 64),
    octets: st.one_of(st.just(-1), st.integers(10**6, 10**12)), period: st.one_of(st.just(0), st.integers(900, 31622400)),
    networks: st.lists(st.sampled_from(["10.0.0.0/8", "192.0.2.1/32", "::1/128", "2001:db8::/32"]), max_size=3)
    .map(", ".join)
    .map(networks), domain: st.sampled_from(["localhost", "box.example:8443", "[::1]:9040", "10.0.0.1"]),
    content_policy: st.sampled_from(["", "sandbox", "default-src 'self'; ;img-src * data:;"]),
    certificate_source: st.sampled_from(["", "self"]), host_names: st.sampled_from(["", "box.lan,192.0.2.1,fd00::1"]),
    issuer: st.sampled_from(["", "https://box.example/auth", "http://localhost:9040"]),
}


def values_of(option):
    if option.parse in VALUES:
        return VALUES[option.parse]
    if isinstance(option.default, int):  # bounds of its own: the default and what lies above it
        return st.integers(option.default, option.default + 20).filter(lambda value: parses(option, str(value)))
    return st.sampled_from(
        [word for word in ("text", "json", "debug", "info", "warning", "error") if parses(option, word)]
    )


def parses(option, word):
    try:
        option.parse(word)
    except ValueError:
        return False
    return True


class TestEncoding:
    """PEP 383: octets of the environment, of arguments and of the file that are not UTF-8 are lone surrogates."""

    @pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
    def test_every_setting_is_text_or_is_named(self, tmp_path, option):
        variable = "MAD_" + option.attribute.upper()
        with pytest.raises(StartupError, match=f"environment {variable}: {option.name} is not valid UTF-8"):
            load(tmp_path, "", {variable: "p\udce9ss"})

    def test_what_is_utf8_stays_as_it_is(self, tmp_path):
        options = load(tmp_path, "db-file = bücher.db3\nbrand-name = Bücher", {"MAD_DB_PASS": "ééé"}, ["--log-file", "é"])
        assert (options.db_file, options.brand_name, options.db_pass, options.log_file) == (
            "bücher.db3", "Bücher", "ééé", "é",
        )

    def test_a_comment_may_be_in_any_encoding(self, tmp_path):
        (tmp_path / "mad.conf").write_bytes(b"# Gr\xf6\xdfe\nauth-port = 9042 ; \xe9\n")
        assert load_options({"config": (str(tmp_path / "mad.conf"), "flag")}, {}).auth_port == 9042

    def test_the_origin_of_a_setting_is_text_in_a_folder_of_any_name(self, tmp_path):
        folder = tmp_path / "donn\udce9es"
        folder.mkdir()
        (folder / "mad.conf").write_text("auth-port = 9042")
        options = load_options({"config": (str(folder / "mad.conf"), "flag")}, {})
        assert options.origins["auth-port"].endswith("donn\\xe9es/mad.conf:1")


class TestWriting:
    """What the wizard writes is what the server reads."""

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_every_option_is_read_as_it_was_written_or_refused(self, tmp_path_factory, data):
        chosen = data.draw(st.lists(st.sampled_from(OPTIONS), max_size=12, unique_by=lambda option: option.name))
        values = {option.attribute: data.draw(values_of(option), label=option.name) for option in chosen}
        wanted = Options({option.name: "setup" for option in chosen}, **values)
        try:
            check_options(wanted)
            written = write_config(wanted)
        except StartupError:
            files = (
                wanted.db_file, wanted.seal_key_file, wanted.token_signing_key_file,
                wanted.admin_token_signing_key_file, *filter(None, [wanted.db_key_file]),
            )
            assert (
                wanted.auth_port == wanted.admin_port
                or len({os.path.abspath(path) for path in files}) < len(files)
                or (wanted.db_key_file and (wanted.db_pass or wanted.no_db_pass))
                or any(
                    ord(letter) < 32 or letter in "\x7f\x85\u2028\u2029"
                    for value in values.values()
                    for letter in str(value)
                )
            )
            return
        path = tmp_path_factory.mktemp("written") / "mad.conf"
        path.write_text(written, "utf-8", newline="")
        path.chmod(0o600)
        read = load_options({"config": (str(path), "flag")}, {})
        assert {option.attribute: getattr(read, option.attribute) for option in OPTIONS} == {
            option.attribute: getattr(wanted, option.attribute) for option in OPTIONS
        }

    @pytest.mark.parametrize(
        "value",
        [
            "a#b", "a;b", '"', '""', '"a"', 'a"b', '" #', 'a" # "b', " a", "a ", "a = b", "# a", "\\", "\\n", "'a'",
            "\xe4\u20ac\U0001f511", "\ufeffa", "\xa0a\xa0", "a\x85auth-insecure-http = true",
            "a\u2028auth-insecure-http = true", "a\u2029b", "a\x7fb",
        ],
    )
    @pytest.mark.parametrize(
        "option", [option for option in OPTIONS if option.parse is text], ids=lambda option: option.name
    )
    def test_a_hostile_text_comes_back_or_is_refused(self, option, value):
        try:
            written = write_config(Options({}, **{option.attribute: value}))
        except StartupError:
            assert not value.isprintable()
        else:
            assert {name: word for name, (word, _) in parse_config(written, "x").items()} == {option.name: value}

    def test_what_is_at_its_default_is_a_comment(self):
        assert all(line.startswith("#") or not line for line in write_config(Options()).splitlines())

    def test_every_option_stands_in_it_with_its_help(self):
        written = write_config(Options())
        assert all(f"# {option.help}\n# {option.name} =" in written for option in OPTIONS)


class TestEnvironment:
    def test_an_unknown_variable_is_an_error_and_those_of_mad_are_known(self, tmp_path):
        with pytest.raises(StartupError) as caught:
            load(tmp_path, "", {"MAD_AUTH_PROT": "1"})
        assert "MAD_AUTH_PROT" in str(caught.value) and "auth-port" in str(caught.value)
        assert "1" not in str(caught.value).replace("did", ""), "its value may be a secret"
        load(
            tmp_path, "",
            {
                "MAD_ADMIN_TOKEN": "x", "MAD_ADMIN_URL": "x", "MAD_AUTH_URL": "x", "MAD_CLIENT_ID": "x",
                "MAD_CLIENT_SECRET": "x", "MAD_CA_FILE": "x", "PATH": "/",
            },
        )

    def test_names_are_compared_without_case_and_booleans_read(self, tmp_path):
        assert load(tmp_path, "", {"mad_Docker": "TRUE"}).docker is True

    def test_one_option_under_two_names_is_refused(self, tmp_path):
        with pytest.raises(StartupError):
            load(tmp_path, "", {"MAD_ARGON2_TIME": "3", "MAD_ARGON2ID_TIME": "4"})

    def test_the_file_can_be_named_there(self, tmp_path):
        path = tmp_path / "other.conf"
        path.write_text("auth-port = 82")
        assert load_options({}, {"MAD_CONFIG": str(path)}).auth_port == 82


class TestFlags:
    @pytest.mark.parametrize(
        "argv, name, value",
        [
            (["--auth-port", "3"], "auth-port", "3"), (["--auth-port=3"], "auth-port", "3"),
            (["--docker"], "docker", "true"), (["--docker=false"], "docker", "false"),
            (["--docker", "false"], "docker", "false"), (["--log-file="], "log-file", ""),
            (
                ["--trusted-proxies", "10.0.0.1", "--trusted-proxies", "10.0.0.2"], "trusted-proxies",
                "10.0.0.1,10.0.0.2",
            ),
        ],
    )
    def test_forms(self, argv, name, value):
        found, rest = parse_flags(argv)
        assert found[name][0] == value and rest == []

    @pytest.mark.parametrize(
        "argv",
        [
            ["--auth-port"], ["--auth-prot", "1"], ["--auth-port", "1", "--auth-port", "2"],
            ["--argon2-time", "1", "--argon2id-time", "1"], ["--config"],
        ],
    )
    def test_what_is_refused(self, argv):
        with pytest.raises(StartupError):
            parse_flags(argv)

    def test_words_that_are_no_flags_are_handed_back(self):
        assert parse_flags(["extra", "--docker"])[1] == ["extra"]

    @pytest.mark.parametrize(
        "option", [option for option in OPTIONS if not option.secret], ids=lambda option: option.name
    )
    def test_every_option_can_be_given_by_flag_variable_and_file(self, tmp_path, option):
        word = {
            boolean: "true", text: "x", networks: "10.0.0.1", worker_count: "2", issuer: "https://x",
            color: "1f5fbf", content_policy: "img-src *", octets: "64 MB",
        }.get(option.parse, str(option.default))
        for found in (
            load(tmp_path, "", {}, [f"--{option.name}={word}"]),
            load(tmp_path, "", {"MAD_" + option.name.upper().replace("-", "_"): word}),
            load(tmp_path, f"{option.name} = {word}"),
        ):
            assert getattr(found, option.attribute) == option.parse(word) and option.name in found.origins


class TestChecks:
    """Settings that contradict each other stop the start."""

    @pytest.mark.parametrize(
        "values, refused",
        [
            ({"auth_ip": "0.0.0.0"}, True), ({"auth_ip": "0.0.0.0", "auth_insecure_http": True}, False),
            ({"auth_ip": "0.0.0.0", "auth_ssl_cert_file": "x.pem"}, False),
            ({"auth_ip": "0.0.0.0", "admin_insecure_http": True}, True), ({"admin_ip": "192.0.2.1"}, True),
            ({"admin_ip": "::"}, True), ({"admin_ip": "::1"}, False), ({"auth_ip": "127.0.0.9"}, False),
            ({"admin_port": 9040}, True), ({"admin_port": 9040, "admin_ip": "::1"}, False),
            ({"argon2id_memory": 8192, "argon2id_parallelism": 64}, False),
            ({"argon2id_memory": 100, "argon2id_parallelism": 64}, True),
        ],
    )
    def test_table(self, values, refused):
        try:
            check_options(Options(**values))
        except StartupError:
            assert refused
        else:
            assert not refused

    def test_options_do_not_change_while_the_server_runs(self):
        with pytest.raises(AttributeError):
            Options().auth_port = 1

    def test_an_option_that_does_not_exist_is_a_bug(self):
        with pytest.raises(TypeError):
            Options(auth_prot=1)

    def test_an_option_is_an_attribute_of_the_type_that_its_parser_returns(self):
        declared = typing.get_type_hints(Options)
        for option in OPTIONS:
            kind = typing.get_origin(declared[option.attribute]) or declared[option.attribute]
            assert type(getattr(Options(), option.attribute)) is type(option.default) is kind

    def test_options_do_not_print_their_secrets(self):
        assert "hush-hush" not in repr(Options(db_pass="hush-hush"))


class TestSecrets:
    def test_they_are_never_flags(self):
        for option in OPTIONS:
            if option.secret:
                with pytest.raises(StartupError) as caught:
                    parse_flags([f"--{option.name}", "x"])
                assert "secret" in str(caught.value)

    def test_a_value_that_is_refused_is_not_echoed(self, tmp_path):
        for content, environ, argv in (
            ("auth-port = hush-hush", {}, ()), ("hush = hush-hush", {}, ()), ("", {"MAD_DB_PASSWORT": "hush-hush"}, ()),
        ):
            with pytest.raises(StartupError) as caught:
                load(tmp_path, content, environ, argv)
            assert "hush-hush" not in str(caught.value)

    def test_they_are_never_shown(self):
        values = {option.attribute: "hush-hush" for option in OPTIONS if option.secret}
        assert "hush-hush" not in str(describe_options(Options(**values)))
        assert all(
            describe_options(Options(**values))[option.name]["value"] == "(set)"
            for option in OPTIONS
            if option.secret
        )


class TestIssuer:
    def test_it_is_made_of_the_domain_unless_named(self):
        assert Options().auth_issuer == "https://localhost"
        assert (
            Options(auth_domain="box.example:8443", auth_domain_no_ssl=True).auth_issuer == "http://box.example:8443"
        )
        assert Options(oidc_issuer="https://box/auth").auth_issuer == "https://box/auth"
        assert issuer("microauthd") == "" and issuer("https://box/auth/") == "https://box/auth"

    def test_the_ports_have_issuers_of_their_own(self):
        assert Options().auth_issuer != Options().admin_issuer
