"""The command line: exit statuses, usage."""

import concurrent.futures
import contextlib
import functools
import os
import re
import resource
import subprocess
import sys

import pytest
from box import Box, CHEAP, PROGRAM, ROOT
from appliance.base import StartupError
from appliance.base.files import Identity
from appliance.base.settings import OPTIONS
from appliance.commands import COMMANDS, HERE, CommandLine, become_owner, become_user, main, wipe_environment
from appliance.recovery import recover_setup, write_journal


class TestBesideARunningServer:
    """The commands as an operator types them."""

    @pytest.mark.parametrize(
        "words",
        [
            ["backup"], ["backup", "a", "b"], ["restore"], ["keys"], ["keys", "turn"], ["keys", "revoke"],
            ["keys", "rotate", "--ring", "x"], ["admin"], ["admin", "recover"], ["admin", "destroy", "--username", "x"],
        ],
    )
    def test_bad_usage_is_two(self, tmp_path, words):
        box = Box(tmp_path / "data").set_up()
        assert box.run(*words).returncode == 2


LATIN1 = "donn\udce9es"  # PEP 383: the octets of données in Latin-1
PASSWORD = "an administrator's phrase"


class TestEncoding:
    """Paths, settings and secrets that are not UTF-8 work, or a sentence names them."""

    def test_a_box_lives_in_a_folder_of_any_name(self, tmp_path):
        (tmp_path / LATIN1).mkdir()
        with Box(tmp_path / LATIN1 / "data") as box:
            assert box.token().status == 200
            done = box.run("backup", f"../{LATIN1}.backup")
            assert (done.returncode, done.stderr) == (0, "") and "donn\\udce9es.backup: " in done.stdout
            rows = box.admin("GET", "/audit-logs?limit=9", bearer=box.admin_token()).json
            assert "donn\\xe9es.backup" in [row["target"] for row in rows if row["action"] == "backup_made"]
            assert box.stop() == 0
            assert box.run("restore", f"../{LATIN1}.backup").returncode == 0
            assert box.start().token().status == 200

    def test_a_journal_names_files_in_a_folder_of_any_name(self, tmp_path, monkeypatch):
        folder = tmp_path / LATIN1
        folder.mkdir(mode=0o700)
        monkeypatch.chdir(folder)
        (folder / "seal.key.setup").write_text("half of it")
        write_journal("mad.conf", False, [(str(folder / "seal.key.setup"), str(folder / "seal.key"))])
        recover_setup("mad.conf")
        assert not (folder / "seal.key.setup").exists() and not (folder / "mad.conf.setting-up").exists()

    @pytest.mark.parametrize(
        "words, environ, said",
        [
            (["serve"], {"MAD_DB_PASS": "p\udce9ss"}, "environment MAD_DB_PASS: db-pass is not valid UTF-8"),
            (["serve", "--db-file", LATIN1], {}, "flag --db-file: db-file is not valid UTF-8"),
            (["backup", "b", "--brand-name", LATIN1], {}, "flag --brand-name: brand-name is not valid UTF-8"),
            (["options", "--config", LATIN1], {}, "the config file donn\\udce9es does not exist"),
            (["options"], {"MAD_CONFIG": LATIN1}, "the config file donn\\udce9es does not exist"),
            (["help", LATIN1], {}, "the manual has no page 'donn\\udce9es'"),
        ],
    )
    def test_a_setting_in_another_encoding_is_named(self, tmp_path, words, environ, said):
        done = Box(tmp_path).run(*words, **environ)
        assert done.returncode in (1, 2) and done.stderr.startswith("microauthd: ") and said in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        "words, name",
        [
            (["setup", "--answers", "answers.toml", "--admin-password-stdin"], "--admin-password-stdin"),
            (["admin", "recover", "--username", "root", "--password-stdin"], "--password-stdin"),
        ],
    )
    def test_a_password_in_another_encoding_is_refused_by_name(self, tmp_path, words, name):
        box = Box(tmp_path)
        (tmp_path / "answers.toml").write_text('[admin]\nusername = "root"\nemail = "root@example.org"')
        done = subprocess.run(
            [*PROGRAM, *words], cwd=tmp_path, env=box.environ | {"MAD_DB_PASS": "a database phrase"},
            input=b"p\xe9ssword of mine\n", capture_output=True,
        )
        assert done.returncode == 1
        assert done.stderr == f"microauthd: {name}: what came from standard input is not valid UTF-8\n".encode()

    def test_names_are_utf8_where_the_locale_is_ascii(self, tmp_path):
        """PEP 540: Python's UTF-8 mode, which PYTHONUTF8=0 turns off."""
        (tmp_path / "mad.conf").touch(0o600)
        (tmp_path / "mad.conf").write_text("db-file = dépôt.db3\ndb-pass = dépôt dépôt\nbrand-name = Bücher\n")
        (tmp_path / "answers.toml").write_text('[admin]\nusername = "root"\nemail = "root@example.org"')
        for words, text in (
            (["setup", "--answers", "answers.toml", "--admin-password-stdin"], "administrator=root"),
            (["options"], "dépôt.db3"), (["backup", "dépôt.backup"], "dépôt.backup: "),
        ):
            done = subprocess.run(
                [sys.executable, ROOT / "microauthd.py", *words], cwd=tmp_path, input=PASSWORD.encode(),
                env=CHEAP | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, capture_output=True,
            )
            assert (done.returncode, done.stderr) == (0, b"") and text in done.stdout.decode()
        assert {"dépôt.db3", "dépôt.backup"} <= {path.name for path in tmp_path.iterdir()}

    def test_what_the_terminal_cannot_show_is_escaped(self, tmp_path):
        done = subprocess.run(
            [sys.executable, ROOT / "microauthd.py", "options", "--brand-name", "Bücher"], cwd=tmp_path,
            capture_output=True, env=Box(tmp_path).environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert (done.returncode, done.stderr) == (0, b"") and b"B\\xfccher" in done.stdout


class TestLimits:
    """getrlimit(2): where nobody can be served, the start says so."""

    @pytest.mark.parametrize(
        "limit, amount, said",
        [
            (resource.RLIMIT_NOFILE, 255, "open files (ulimit -n, LimitNOFILE=) is 255, and the server needs 256"),
            (resource.RLIMIT_NOFILE, 16, "open files (ulimit -n, LimitNOFILE=) is 16, and the server needs 256"),
            (resource.RLIMIT_NOFILE, 15, "open files (ulimit -n) is too low: the program needs 16"),
            (resource.RLIMIT_AS, 511 << 20, "address space (ulimit -v, LimitAS=) is 511 MB, and the server needs 512 MB"),
            (resource.RLIMIT_AS, 100 << 20, "address space (ulimit -v, LimitAS=) is 100 MB, and the server needs 512 MB"),
            (resource.RLIMIT_AS, 95 << 20, "address space (ulimit -v) is too low: the program needs 96 MB"),
        ],
    )
    def test_too_little_is_refused_in_a_sentence(self, tmp_path, limit, amount, said):
        box = Box(tmp_path).set_up()
        (tmp_path / "new").mkdir(mode=0o700)
        for words, folder in ((["serve"], tmp_path), (["setup", "--demo"], tmp_path / "new")):
            done = subprocess.run(
                [*PROGRAM, *words], cwd=folder, env=box.environ, capture_output=True, text=True, timeout=60,
                preexec_fn=lambda: resource.setrlimit(limit, (amount, amount)),
            )
            assert (done.returncode, done.stderr) == (1, f"microauthd: the limit of {said}\n")
        assert not list((tmp_path / "new").iterdir()) and not box.log()

    @pytest.mark.parametrize(
        "limit, amount, said",
        [
            (resource.RLIMIT_AS, 70 << 20, "address space (ulimit -v) is too low: the program needs 96 MB"),
            (resource.RLIMIT_NOFILE, 15, "open files (ulimit -n) is too low: the program needs 16"),
            (resource.RLIMIT_AS, 96 << 20, ""),
        ],
    )
    @pytest.mark.parametrize("door", [["microauthd.py"], ["-m", "appliance.commands"]], ids=["file", "module"])
    def test_the_libraries_are_not_loaded_where_they_do_not_fit(self, door, limit, amount, said):
        """From the source and from the wheel as from the archive."""
        done = subprocess.run(
            [sys.executable, *door, "version"], cwd=ROOT, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(limit, (amount, amount)),
        )
        assert (done.returncode, done.stderr) == ((1, f"microauthd: the limit of {said}\n") if said else (0, ""))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_least_is_enough_to_serve(self, tmp_path, workers, monkeypatch):
        box = Box(tmp_path, workers=workers).set_up()
        limits = ((resource.RLIMIT_NOFILE, (256, 256)), (resource.RLIMIT_AS, (512 << 20, 512 << 20)))
        start = functools.partial(subprocess.Popen, preexec_fn=lambda: [resource.setrlimit(*limit) for limit in limits])
        monkeypatch.setattr(subprocess, "Popen", start)
        with contextlib.ExitStack() as stack:
            stack.callback(box.__exit__)
            box.start()
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(24))
            assert {answer.status for answer in pool.map(lambda _: box.token(), range(240))} == {200}

    def test_other_commands_need_less(self, tmp_path):
        box = Box(tmp_path).set_up()
        done = subprocess.run(
            [*PROGRAM, "backup", "b"], cwd=tmp_path, env=box.environ, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (128 << 20, 128 << 20)),
        )
        assert done.returncode == 0, done.stderr


class TestCommandLine:
    @pytest.mark.parametrize(
        "argv, status",
        [
            (["version"], 0), (["licenses"], 0), (["licenses", "extra"], 2),
            (["--help"], 0), (["nonsense"], 2), (["serve", "--nonsense"], 2), (["serve", "extra"], 2),
            (["serve", "--db-pass", "x"], 2),
        ],
    )
    def test_exit_statuses(self, argv, status, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        mask = os.umask(0o022)
        try:
            assert main(argv) == status
        finally:
            os.umask(mask)

    @pytest.mark.parametrize("words, status", [(["help"], 0), (["options"], 1), (["nonsense"], 2)])
    def test_its_caller_keeps_the_umask(self, words, status, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mad.conf").write_text("nonsense = 1\n")
        mask = os.umask(0o027)
        try:
            assert main(words) == status
        finally:
            assert os.umask(mask) == 0o027


class TestHelp:
    """Each command says its usage, what it does, its options and examples."""

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "mad"])
    def test_each_has_help_without_doing_anything(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for flag in ("--help", "-h"):
            assert main([name, "--nonsense", flag]) == 0
        shown = capsys.readouterr().out
        command = COMMANDS[name]
        assert shown.startswith(f"usage: microauthd {name}") and command.description and "\nexamples:\n" in shown
        assert all(f"  {flag.name}" in shown for flag in command.flags)
        assert command.summary and not list(tmp_path.iterdir())
        assert all(len(line) <= 120 for line in shown.splitlines())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_flag_of_its_usage_is_explained_and_the_other_way_round(self, name):
        command = COMMANDS[name]
        assert set(re.findall(r"--[a-z-]+", " ".join(command.usage))) == {flag.name for flag in command.flags}

    def test_that_of_mad_is_its_own(self, capsys):
        assert main(["mad", "--help"]) == 0
        assert capsys.readouterr().out.startswith("usage: mad ")

    def test_that_of_serve_has_every_option(self, capsys):
        assert main(["serve", "--help"]) == 0
        shown = capsys.readouterr().out
        assert all((f"  --{option.name}\n" in shown) is not option.secret for option in OPTIONS)

    def test_an_unknown_command_has_none(self, capsys):
        assert main(["nonsense", "--help"]) == 2
        assert "unknown command 'nonsense'" in capsys.readouterr().err


class TestEnvironment:
    """/proc/PID/environ of every process shows what execve(2) was given, whatever os.environ says."""

    def run(self, code, **environ):
        """Run code in a new process with this environment, as take_environment() finds it."""
        return subprocess.run(
            [sys.executable, "-c", "import os\nfrom appliance.commands import *\n" + code], cwd=ROOT, timeout=60,
            env={"PATH": os.environ["PATH"]} | environ, capture_output=True, text=True, check=True,
        ).stdout

    def test_secrets_leave_what_this_process_and_its_children_show(self):
        shown = self.run(
            "environ = take_environment({})\n"
            "assert environ['MAD_DB_PASS'] == 'hush-1' and 'MAD_DB_PASS' not in os.environ\n"
            "if not os.fork():\n    print(open('/proc/self/environ', 'rb').read(), flush=True)\n    os._exit(0)\n"
            "os.wait()\n"
            "import subprocess\nsubprocess.run(['env'])\n"
            "print(open('/proc/self/environ', 'rb').read())",
            MAD_DB_PASS="hush-1", MAD_AUTH_TOKEN_KEY_PASS="hush-2", mad_oidc_client_secret="hush-3",
            MAD_CLIENT_SECRET="hush-4", MAD_ADMIN_TOKEN="hush-5", MAD_AUTH_PORT="8443", OTHER="kept",
        )
        assert shown.count("OTHER=kept") == 3 and shown.count("MAD_AUTH_PORT=8443") == 3 and "hush" not in shown

    def test_the_prefix_is_the_one_that_was_chosen(self):
        shown = self.run(
            "take_environment({'env-var-prefix': ('BOX_', 'flag')})\nprint(open('/proc/self/environ').read())",
            BOX_DB_PASS="hush", MAD_DB_PASS="of another program",
        )
        assert "hush" not in shown and "of another program" in shown

    def test_where_it_cannot_be_done_it_is_said(self, monkeypatch, capsys):
        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", "/proc/self/mem")

        monkeypatch.setattr("builtins.open", refuse)
        wipe_environment({b"MAD_DB_PASS"})
        assert "the secrets of the environment stay in /proc/" in capsys.readouterr().err


class TestBecomingTheOwner:
    """What root runs in a folder of the service's user runs as that user, before anything there is opened."""

    @pytest.fixture
    def root(self, monkeypatch):
        """This process as root would find it: [what it called], in order."""
        called = []
        for name in ("HOME", "USER", "LOGNAME"):
            monkeypatch.setenv(name, os.environ.get(name, ""))
        for name in ("initgroups", "setgroups", "setgid", "setuid", "execve"):
            monkeypatch.setattr(os, name, lambda *words, name=name: called.append((name, *words)))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        real = os.stat

        def stat(path, *words, **more):
            found = real(path, *words, **more)
            if str(path).endswith("service"):
                found = os.stat_result((*found[:4], 12345, 23456, *found[6:]))
            return found

        monkeypatch.setattr(os, "stat", stat)
        return called

    def test_groups_go_before_the_user_and_the_program_starts_anew(self, root, tmp_path, monkeypatch, capsys):
        (tmp_path / "service").mkdir()
        monkeypatch.setattr(os, "access", lambda *_, **__: True)
        environ = {"MAD_DB_PASS": "hush", "HOME": "/root"}
        become_owner(str(tmp_path / "service" / "mad.conf"), environ)
        assert [call[0] for call in root[:4]] == ["setgroups", "setgid", "setuid", "execve"]
        assert [call[1] for call in root[:3]] == [[], 23456, 12345]
        assert root[3][3] == environ | {"HOME": str(tmp_path / "service")} | {"USER": "12345", "LOGNAME": "12345"}
        assert capsys.readouterr().err.count("belongs to user 12345: going on as that user") == 1

    def test_the_cache_of_root_is_not_the_users(self, root, tmp_path, monkeypatch):
        (tmp_path / "service").mkdir()
        environ = {"MICROAUTHD_CACHE": "/nowhere", "CACHE_DIRECTORY": str(tmp_path)}
        become_owner(str(tmp_path / "service" / "mad.conf"), environ)
        assert environ == {"CACHE_DIRECTORY": str(tmp_path)}

    def test_a_folder_that_is_to_be_made_is_the_users_where_the_one_above_is(self, root, tmp_path):
        (tmp_path / "service").mkdir()
        become_owner(str(tmp_path / "service" / "new" / "deep" / "mad.conf"), {})
        assert ("setuid", 12345) in root

    def test_where_the_folder_is_roots_root_stays(self, root, monkeypatch):
        monkeypatch.setattr("appliance.commands.existing_folder", lambda path: "/")
        become_owner("/mad.conf", {})
        assert root == []

    def test_nobody_but_root_becomes_anybody(self, root, tmp_path, monkeypatch):
        (tmp_path / "service").mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        become_owner(str(tmp_path / "service" / "mad.conf"), {})
        assert root == []

    def test_root_without_that_right_says_so(self, root, tmp_path, monkeypatch):
        (tmp_path / "service").mkdir()

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "setgroups", refuse)
        with pytest.raises(StartupError, match="root cannot become that user here"):
            become_owner(str(tmp_path / "service" / "mad.conf"), {})

    def test_the_cache_that_root_unpacked_for_the_user_is_kept(self, root, tmp_path, monkeypatch):
        (tmp_path / "service").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        environ = {"MICROAUTHD_CACHE": str(HERE.parent), "CACHE_DIRECTORY": str(tmp_path)}
        become_owner(str(tmp_path / "service" / "mad.conf"), environ)
        assert environ == {"MICROAUTHD_CACHE": str(HERE.parent)}

    @pytest.mark.parametrize("command, becomes", [("options", True), ("serve", True), ("setup", False)])
    def test_a_database_elsewhere_counts_where_the_settings_are_roots(
        self, root, tmp_path, monkeypatch, command, becomes
    ):
        """But for a set-up, which writes settings as root: see TestRootsSettings."""
        (tmp_path / "service").mkdir()
        (tmp_path / "mad.conf").write_text(f"db-file = {tmp_path}/service/mad.db3\n")
        (tmp_path / "mad.conf").chmod(0o640)
        real, seen = os.stat, []

        def stat(path, *words, **more):
            found = real(path, *words, **more)
            seen.append(str(path))
            return os.stat_result((*found[:4], 0, *found[5:])) if str(path) == str(tmp_path) else found

        monkeypatch.setattr(os, "stat", stat)
        if os.getuid():  # the file is root's, as the kernel would say it
            monkeypatch.setattr("appliance.base.files.current_identity", lambda: Identity(os.getuid(), frozenset()))
        path = str(tmp_path / "mad.conf")
        become_user(command, CommandLine({"config": (path, "flag")}, [], [], {}), path)
        assert (("setuid", 12345) in root) is becomes
        if becomes:
            assert seen.index(str(tmp_path)) < seen.index(str(tmp_path / "service"))

    def test_settings_from_a_pipe_are_read_once(self, root, tmp_path, monkeypatch, capsys):
        reader, writer = os.pipe()
        os.write(writer, b"auth-port = 8443\n")
        os.close(writer)
        monkeypatch.chdir(tmp_path)
        assert main(["options", "--config", f"/dev/fd/{reader}"]) == 0
        os.close(reader)
        assert re.search("auth-port +8443 ", capsys.readouterr().out)

    @pytest.mark.parametrize("name", ["options", "backup", "setup", "serve"])
    def test_every_command_does_before_it_opens_anything(self, name, tmp_path, monkeypatch):
        order = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("appliance.commands.become_user", lambda *_: order.append("become"))

        def stop(*_):
            order.append("recover")
            raise StartupError("enough")

        monkeypatch.setattr("appliance.commands.recover_setup", stop)
        assert main([name, *(["x"] if name == "backup" else [])]) == 1 and order == ["become", "recover"]
