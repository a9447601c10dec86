"""Count what durable work writes: WAL frames, distinct pages and syncs of an operation, alone and 50 in one transaction.

usage: .venv/bin/python build/bench/frames.py [--pages]    which names the tables and indexes of the pages

The work is that of the services, without HTTP, on a database of 2,000 logins of 100 users. A frame is a page of 4,096 bytes
and a header of 24; what a checkpoint copies into the database afterwards is the distinct pages again.
"""

import collections
import contextlib
import struct
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import microauthd as m
from appliance.base.keys import make_key
from appliance.base.objects import CreateClient, CreateUser
from appliance.base.settings import Options
from appliance.base.store import Store
from appliance.processes import MACHINE

FRAME = 4096 + 24


def frames(path):
    """Return the page numbers of all frames that the WAL holds since its last restart, in order."""
    data = Path(path + "-wal").read_bytes()
    salt, found = data[16:24], []
    for begin in range(32, len(data), FRAME):
        number, _, one, two = struct.unpack(">IIII", data[begin : begin + 16])
        if struct.pack(">II", one, two) != salt:
            break
        found.append(number)
    return found


def page_owners(path, store):
    """Return {page: table or index}, by walking the B-trees of the file. https://www.sqlite.org/fileformat2.html §1.6"""
    data, found = Path(path).read_bytes(), {}

    def walk(number, name):
        found[number] = name
        begin = (number - 1) * 4096
        header = begin + (100 if number == 1 else 0)
        if data[header] not in (2, 5):  # a leaf
            return
        cells = struct.unpack(">H", data[header + 3 : header + 5])[0]
        for cell in range(cells):
            at = struct.unpack(">H", data[header + 12 + 2 * cell : header + 14 + 2 * cell])[0]
            walk(struct.unpack(">I", data[begin + at : begin + at + 4])[0], name)
        walk(struct.unpack(">I", data[header + 8 : header + 12])[0], name)

    for name, root in store.connection.execute("SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0"):
        walk(root, name)
    return found


class Params(dict):
    caller = m.Caller()
    need = dict.__getitem__


class Work:
    """A database of logins, and what is measured on it: each method does one operation, on a user of its own."""

    def __init__(self, path, users=100, logins=2000):
        self.store = Store.make(path, "", int(time.time()))
        options = Options(argon2id_memory=64, argon2id_time=1, argon2id_parallelism=1, enable_token_refresh=True)
        rings = [m.KeyRing([make_key("ES256", 2048, 0), make_key("RS256", 2048, 0)], True) for _ in "12"]
        self.idp = idp = m.Idp(options, self.store, *rings, m.Seal(bytes(32)), machine=MACHINE)
        m.create_client(
            idp, m.LOCAL,
            CreateClient(
                client_id="app", audience="api", grant_types=["authorization_code", "password", "refresh_token"],
            ),
        )
        m.add_uri(idp, m.LOCAL, "app", "redirect", "https://app.example/cb")
        self.client = m.find_client(idp, "app")
        password = "correct horse battery"
        self.logins = [Params(username=f"user{number}", password=password) for number in range(users)]
        self.accounts = [
            m.create_user(idp, m.LOCAL, CreateUser(**login, email=login["username"] + "@example.org"))
            for login in self.logins
        ]
        self.request = m.AuthorizeRequest("app", "https://app.example/cb")
        with self.store.transaction():
            self.tokens = [self.issue(number)["refresh_token"] for number in range(logins)]

    def issue(self, number):
        login = m.Granted("", "pwd", self.accounts[number % len(self.accounts)], ["pwd"], self.idp.now())
        return m.issue(self.idp, self.client, login, m.LOCAL)

    def refresh(self, number):
        params = Params(grant_type="refresh_token", refresh_token=self.tokens[number])
        answer = m.issue(self.idp, self.client, m.refresh_grant(self.idp, self.client, params), m.LOCAL)
        self.tokens[number] = answer["refresh_token"]

    def login(self, number):
        granted = m.password_grant(self.idp, self.client, self.logins[number % len(self.logins)])
        m.issue(self.idp, self.client, granted, m.LOCAL)

    def code(self, number):
        account = self.accounts[number % len(self.accounts)]
        code = m.issue_code(
            self.idp, m.LOCAL, self.client, self.request, account, ["pwd"], self.idp.now()
        )
        params = Params(code=code, redirect_uri=self.request.redirect_uri)
        m.issue(self.idp, self.client, m.code_grant(self.idp, self.client, params), m.LOCAL)

    def revocation(self, number):
        m.revoke_token(self.idp, m.LOCAL, self.client, self.tokens[number])


def main():
    shown = "--pages" in sys.argv
    print("| Operation | frames, KB, distinct pages of one alone | of one in a transaction of 50 |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/mad.db3"
        work = Work(path)
        for name in ("refresh", "login", "code", "revocation"):
            getattr(work, name)(1900)  # caches, and the first row of a table
            cells, details = [], []
            for count, begin in ((1, 1000), (50, 40)):
                work.store.checkpoint()
                with work.store.transaction() if count > 1 else contextlib.nullcontext():
                    for number in range(begin, begin + 37 * count, 37):
                        getattr(work, name)(number % 1900)
                pages = frames(path)
                cells.append(f"{len(pages) / count:.1f}, {len(pages) * FRAME / count / 1000:.0f}, {len(set(pages)) / count:.1f}")
                work.store.checkpoint()
                owned = page_owners(path, work.store)
                details.append(collections.Counter(owned.get(page, "free or overflow") for page in pages))
            print(f"| {name} | {' | '.join(cells)} |")
            for detail in details if shown else ():
                print("    " + ", ".join(f"{owner} {count}" for owner, count in detail.most_common()))
        work.store.close()


if __name__ == "__main__":
    main()
