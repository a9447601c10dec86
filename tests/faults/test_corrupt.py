"""Damaged files: a start is refused with one sentence and exit status 1, and nothing is written over.

tests/test_database.py and tests/test_processes.py have single cases of it; here is every file, and the write-ahead log.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess

import pytest
from box import Box
from ledger import Line
from appliance.base import StartupError
from appliance.base.settings import CONFIG_HEAD, parse_config
from appliance.base.database import read_database_key
from appliance.base.store import Store
from appliance.base.keys import Key, read_ring

KEYS = ("token.pem", "admin_token.pem", "seal.key")
# SQLite builds the index of the log anew in -shm, whatever it then finds; .lock holds the pid of whoever tries to serve.
PASSING = ("mad.db3-shm", "mad.db3.lock", "output.txt", "microauthd.log", "microauthd.log.lock")


def make(folder, **settings):
    """A box that was killed: what it acknowledged stands in the write-ahead log alone."""
    box = Box(folder, workers="1", **settings).set_up().start()
    for number in range(5):
        box.new_user(f"late{number}")
    os.killpg(box.process.pid, signal.SIGKILL)
    box.process.wait(60)
    box.output.close()
    assert (folder / "mad.db3-wal").stat().st_size > 10 * 4096
    return box


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """Three that were killed, one of them not encrypted."""
    folder, plain = tmp_path_factory.mktemp("corrupt"), {"db_pass": "", "no_db_pass": "true"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = {
            name: pool.submit(make, folder / name, **settings)
            for name, settings in (("encrypted", {}), ("other", {}), ("plain", plain))
        }
        return {name: box.result() for name, box in made.items()}


@pytest.fixture
def copy(boxes, tmp_path):
    """A killed box to damage: call it with a name."""

    def call(name="encrypted"):
        # What a killed server leaves of its Unix socket cannot be copied.
        shutil.copytree(boxes[name].folder, tmp_path / "data", ignore=shutil.ignore_patterns("admin.sock"))
        box = Box(tmp_path / "data")
        box.auth_port, box.admin_port, box.client, box.process = (
            boxes[name].auth_port, boxes[name].admin_port, boxes[name].client, None,
        )
        return box

    return call


def each(table, *short):
    """The rows of a table of damages; all but these wait for the long run."""
    return [pytest.param(name, marks=() if name in short else pytest.mark.long) for name in table]


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in PASSING
    }


def refuses(box, *words):
    """The start is refused: one sentence that has these words, status 1, and every file is as it was."""
    before = digests(box.folder)
    try:
        done = box.run("serve", timeout=60)
    except subprocess.TimeoutExpired:
        raise AssertionError("it serves: " + box.said()) from None
    assert done.returncode == 1 and done.stderr.startswith("microauthd: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout + box.log() and all(word in done.stderr for word in words), (
        done.stderr
    )
    assert digests(box.folder) == before
    return True


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


def overwrite(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def logged_pages(path):
    """The numbers of the pages that the log beside a database replaces."""
    log = path.with_name(path.name + "-wal")
    frames = log.read_bytes()[32:] if log.exists() else b""
    return {int.from_bytes(frames[at : at + 4], "big") for at in range(0, len(frames), 24 + 4096)}


def middle_page(path):
    """Where a page in the middle of a database begins, one that the log beside it does not replace."""
    logged, page = logged_pages(path), path.stat().st_size // 8192 + 1
    while page in logged:
        page += 1
    return (page - 1) * 4096


def last_page(path):
    """Where the last page of a database begins that the log beside it does not replace."""
    logged, page = logged_pages(path), path.stat().st_size // 4096
    while page in logged:
        page -= 1
    return (page - 1) * 4096


DATABASE = {
    "the first page zeroed": lambda path: overwrite(path, 0, bytes(4096)),
    "the header zeroed": lambda path: overwrite(path, 0, bytes(100)),
    "a byte of the salt flipped": lambda path: flip(path, 3),
    "a byte of the first page flipped": lambda path: flip(path, 77),
    "a page in the middle overwritten": lambda path: overwrite(path, middle_page(path), os.urandom(4096)),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 8192 * 4096),
    "cut within a page": lambda path: os.truncate(path, path.stat().st_size // 8192 * 4096 + 100),
    "the last page gone": lambda path: os.truncate(path, last_page(path)),
    "empty": lambda path: os.truncate(path, 0),
    "something else": lambda path: path.write_text("not a database\n" * 10_000),
}


class TestDatabase:
    """With a log beside it: whatever is refused, the log stays where it is and is not put into the database."""

    @pytest.mark.parametrize(
        "damage", each(DATABASE, "the header zeroed", "a page in the middle overwritten", "cut in half", "empty")
    )
    def test_it_is_refused_and_left(self, copy, damage):
        box = copy()
        DATABASE[damage](box.folder / "mad.db3")
        assert refuses(box, "mad.db3")

    # What is not encrypted carries no proof of every byte: a structure that is broken is found.
    @pytest.mark.parametrize(
        "damage",
        each(
            [
                "the first page zeroed", "a page in the middle overwritten", "cut in half", "the last page gone",
                "empty", "something else",
            ],
            "the last page gone",
        ),
    )
    def test_so_is_one_that_is_not_encrypted(self, copy, damage):
        box = copy("plain")
        DATABASE[damage](box.folder / "mad.db3")
        assert refuses(box, "mad.db3")

    def test_a_wrong_passphrase_changes_nothing_either(self, copy):
        box = copy()
        (box.folder / "mad.conf").write_text(
            (box.folder / "mad.conf").read_text().replace("a database phrase", "another phrase")
        )
        assert refuses(box, "mad.db3", "db-pass")

    def test_nor_does_a_newer_one(self, copy):
        box = copy()
        path = str(box.folder / "mad.db3")
        store = Store(path, read_database_key(path, "a database phrase", False))
        beside = Store(path, store.key)
        assert beside.meta("created_at")  # stays open, so that the log stays
        store.connection.execute("PRAGMA user_version = 99")
        saved = {name: (box.folder / name).read_bytes() for name in ("mad.db3", "mad.db3-wal")}
        store.close()
        beside.close()
        for name, content in saved.items():
            (box.folder / name).write_bytes(content)
        assert refuses(box, "mad.db3", "newer")

    @pytest.mark.parametrize(
        "words",
        [
            pytest.param(("keys", "list"), marks=pytest.mark.long), ("backup", "copy.bak"),
            ("admin", "recover", "--username", "root", "--password-stdin"),
        ],
    )
    def test_no_command_at_the_machine_touches_it(self, copy, words):
        box = copy()
        overwrite(box.folder / "mad.db3", 0, bytes(4096))
        before = digests(box.folder)
        done = box.run(*words, input="a new phrase to log in\n")
        if words[0] == "keys":  # needs no database
            assert "Traceback" not in done.stderr
        else:
            assert done.returncode == 1 and "mad.db3" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert digests(box.folder) == before


LOG = {
    "garbage": lambda path, other: path.write_bytes(os.urandom(path.stat().st_size)),
    "zeroed": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "its header zeroed": lambda path, other: overwrite(path, 0, bytes(32)),
    "a byte of its header flipped": lambda path, other: flip(path, 17),
    "cut within its header": lambda path, other: os.truncate(path, 20),
    "of another database": lambda path, other: shutil.copyfile(other, path),
}
TAIL = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte of a frame flipped": lambda path: flip(path, path.stat().st_size // 2),
    "garbage at its end": lambda path: overwrite(path, path.stat().st_size, os.urandom(10_000)),
    "empty": lambda path: os.truncate(path, 0),
    "gone": os.unlink,
}


class TestLog:
    """The write-ahead log holds what was acknowledged last."""

    @pytest.mark.parametrize("damage", LOG)
    def test_one_that_cannot_be_read_is_refused_and_left(self, copy, boxes, damage):
        box = copy()
        LOG[damage](box.folder / "mad.db3-wal", boxes["other"].folder / "mad.db3-wal")
        assert refuses(box, "mad.db3")

    @pytest.mark.parametrize("damage", each(TAIL, "cut in half", "a byte of a frame flipped"))
    def test_where_its_end_is_damaged_the_box_is_whole_up_to_there(self, copy, boxes, damage):
        """A frame that does not fit its checksum is by SQLite's design where the log ends: a power cut leaves such frames, so to
        refuse would be to refuse after power cuts. The promise is a box that is whole, as it was at one moment, and never an empty one;
        and that says so where what it lacks was acknowledged."""
        box = copy()
        TAIL[damage](box.folder / "mad.db3-wal")
        with contextlib.closing(Line(box)) as line:
            box.start()
            try:
                bearer = box.admin_token()
                users = {user["username"] for user in line.admin("GET", "/users", bearer=bearer).json}
                there = [f"late{number}" in users for number in range(5)]
                assert "root" in users and there == sorted(there, reverse=True), "in their order"
                assert line.admin("GET", "/audit-logs/verify", bearer=bearer).json["valid"]
                assert {
                    row["target"]
                    for row in line.admin("GET", "/audit-logs?action=user_created&limit=1000", bearer=bearer).json
                } == users
                assert all(there) or damage != "garbage at its end"
                warned = "warnings" in line.admin("GET", "/health/ready").json
                assert warned == ("log.damaged" in box.said()) == (damage != "garbage at its end")
                assert box.token().status == 200 and "Traceback" not in box.said()
            finally:
                os.killpg(box.process.pid, signal.SIGKILL)
                box.process.wait(60)


KEY = {
    "empty": lambda path: os.truncate(path, 0),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "its last line gone": lambda path: path.write_bytes(path.read_bytes().rstrip().rpartition(b"\n")[0]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "garbage": lambda path: path.write_bytes(os.urandom(300)),
    "a byte flipped": lambda path: overwrite(path, path.stat().st_size // 2, b"\xe4"),
}


class TestKeys:
    @pytest.mark.parametrize("damage", each(KEY, "empty", "cut in half"))
    @pytest.mark.parametrize("name", KEYS)
    def test_a_damaged_key_is_refused_and_no_new_one_is_made(self, copy, name, damage):
        box = copy()
        KEY[damage](box.folder / name)
        assert refuses(box, name)

    def test_so_is_one_that_is_missing(self, copy):
        box = copy()
        (box.folder / "admin_token.pem").unlink()
        assert refuses(box, "admin_token.pem")

    @pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.long)])
    def test_one_with_a_letter_changed_is_refused_or_the_same(self, boxes, tmp_path, every):
        """Base64 that is still base64: no letter makes it another key, or one that fails only when it signs."""
        content, path = (boxes["encrypted"].folder / "token.pem").read_bytes(), tmp_path / "token.pem"
        path.touch(0o600)
        whole, letters = (
            sorted(Key(entry).kid for entry in read_ring(boxes["encrypted"].folder / "token.pem", "")),
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
        )
        places, refused = [at for at in range(len(content)) if content[at] in letters], 0
        for at in (*places[60:100], *places[100::every]):  # the names of kind and curve stand at the beginning
            path.write_bytes(content[:at] + letters[(letters.index(content[at]) + 1) % 64 :][:1] + content[at + 1 :])
            try:
                keys = [Key(entry) for entry in read_ring(path, "")]
            except StartupError:
                refused += 1
                continue
            assert sorted(key.kid for key in keys) == whole, at
            for key in keys:
                key.verify(key.sign(b"message"), b"message")
        assert refused > 40


def cut_after(word, more=0):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: content.index(word) + len(word) + more])

    return damage


CONFIG = {
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut within a key": cut_after(b"\nauth-po"),
    "cut within a value": cut_after(b"\nadmin-port = ", 2),
    "cut between two lines": cut_after(b"a database phrase\n"),
    "its last line gone": lambda path: os.truncate(path, path.stat().st_size - 6),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "its end zeroed": lambda path: path.write_bytes(path.read_bytes()[:2000] + bytes(path.stat().st_size - 2000)),
    "not UTF-8": lambda path: overwrite(path, path.read_bytes().index(b"\nauth-port") + 3, b"\xff\xfe\xc3\x28"),
    "garbage": lambda path: path.write_bytes(os.urandom(3000)),
}


class TestConfig:
    @pytest.mark.parametrize("damage", each(CONFIG, "cut in half", "cut within a value", "its end zeroed", "not UTF-8"))
    @pytest.mark.parametrize("name", each(["encrypted", "plain"], "plain"))
    def test_half_of_one_is_refused(self, copy, name, damage):
        """What is missing would be a default: another port, no lockout. The one that is not encrypted would start."""
        if name == "plain" and damage == "cut between two lines":
            damage = "cut in half"
        box = copy(name)
        CONFIG[damage](box.folder / "mad.conf")
        assert refuses(box, "mad.conf")

    def test_an_empty_one_does_not_begin_anew(self, copy):
        box = copy()
        os.truncate(box.folder / "mad.conf", 0)
        assert refuses(box, "db-pass")

    def test_one_cut_anywhere_is_refused_or_says_the_same(self, boxes):
        content = (boxes["plain"].folder / "mad.conf").read_text()
        whole = parse_config(content, "mad.conf")
        for at in range(1, len(content)):
            with contextlib.suppress(StartupError):
                if content[:at].startswith(CONFIG_HEAD):  # before that it is a comment, and nothing
                    assert parse_config(content[:at], "mad.conf") == whole, at
