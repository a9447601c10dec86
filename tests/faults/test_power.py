"""Power loss: one run is recorded below the file layer of losing.c, and cut at many points; what was acknowledged is there each time."""

import bisect
import collections
import os
import random
import signal
import time

import pytest
from box import Box
from ledger import SETTINGS, Audit, Fact, Ledger, Line
from losing import Cuts, RecordedBox, compile_layer, read_record
from appliance.base.database import read_database_key
from appliance.base.store import Store

LONG = pytest.mark.long


class Run:
    """A recorded run: set-up, load, a kill -9, a rotation of keys, load, a stop and a start, load."""

    def __init__(self, folder, seed, rounds):
        self.box = RecordedBox(folder / "data", compile_layer(folder), folder / "record", workers="2", **SETTINGS)
        self.times, self.kids = [], Fact("kids", None, 0)
        box = self.box.set_up()
        self.was_set_up = box.mark()
        box.start()
        self.ledger = ledger = Ledger(box, self.mark, seed)
        ledger.prepare()
        self.began = self.mark()
        try:
            self.load(rounds)
            os.killpg(box.process.pid, signal.SIGKILL)
            box.process.wait(60)
            box.start()
            self.load(rounds)
            self.rotate()
            self.load(rounds)
            assert box.stop() == 0
            box.start()
            self.load(rounds)
            assert not ledger.refused, ledger.refused
        finally:
            if box.process.poll() is None:
                os.killpg(box.process.pid, signal.SIGKILL)
                box.process.wait(60)
        self.ended = self.mark()
        self.entries = read_record(box.record)
        # Each cut is put where the box was: the journal of a set-up knows its files by their whole paths.
        self.left = box.folder.rename(folder / "left")

    def mark(self):
        self.times.append((self.box.mark(), time.time()))
        return self.times[-1][0]

    def load(self, rounds):
        self.ledger.start(rounds)
        self.ledger.join()

    def rotate(self):
        done = self.box.run("keys", "rotate")
        assert done.returncode == 0, done.stderr
        self.kids.done, self.kids.what = self.mark(), {"kids": done.stdout.split()}

    def time_of(self, place):
        """When the record was so long."""
        return self.times[max(0, bisect.bisect(self.times, (place, float("inf"))) - 1)][1]

    def places(self, dice, count):
        """Where to cut, and how much of what is not synced is kept: half of them the moment an answer was read, before anything else could be written."""
        marks = [fact.done for thing in self.ledger.things for fact in thing.facts if fact.done] + [self.kids.done]
        ends = [entry.end for entry in self.entries if entry.end >= self.began]
        places = [
            (dice.choice(marks if number % 2 else ends), dice.choice([0, 0, 0.5, 0.5, 1])) for number in range(count)
        ]
        return sorted([*places, (self.kids.done, 0)])


@pytest.fixture(scope="module", params=[3, pytest.param(40, marks=LONG)])
def run(request, tmp_path_factory):
    seed = int(os.environ.get("POWER_SEED", "0")) or random.randrange(10**9)
    run = Run(tmp_path_factory.mktemp("power"), seed, request.param)
    run.seed, run.is_long = seed, request.param > 10
    return run


def again(run, at=None):
    """The box whose folder a cut left, on the ports of the first; its clock goes on from the cut, for codes live a minute."""
    box = Box(run.box.folder)
    box.auth_port, box.admin_port = run.box.auth_port, run.box.admin_port
    box.settings, box.client = run.box.settings, run.box.client
    if at is not None:
        box.environ |= {
            "LD_PRELOAD": run.box.environ["LD_PRELOAD"], "LOSING_CLOCK": str(int((at + 1 - time.time()) * 1e9)),
        }
    return box


def end(box):
    if box.process.poll() is None:
        os.killpg(box.process.pid, signal.SIGKILL)
        box.process.wait(60)
    box.output.close()


class TestLayer:
    def test_the_record_holds_what_was_written_and_synced(self, run):
        """A layer that is loaded and sees nothing would make every cut a good one."""
        names, seen = {}, collections.Counter()
        for entry in run.entries:
            if entry.kind == "O":
                names[entry.key] = os.path.basename(entry.path.decode())
            seen[names.get(entry.key), entry.kind] += 1
        facts = sum(1 for thing in run.ledger.things for fact in thing.facts if fact.done)
        assert seen["mad.db3-wal", "W"] > facts and seen["mad.db3-wal", "S"] > facts / 4, seen
        assert seen["mad.db3", "W"] > 10 and seen["mad.db3", "S"] >= 2, "checkpoints"
        assert seen["token.pem.new", "S"] >= 1 and seen["data", "S"] >= 5, "keys, and their folder"
        assert seen[None, "R"] >= 5 and seen[None, "U"] >= 1

    def test_with_everything_kept_the_folder_is_the_one_that_was_left(self, run, tmp_path):
        class Keep(random.Random):
            randint = staticmethod(lambda least, most: most)

        Cuts(run.entries, run.box.folder, run.box.base).cut(run.ended, Keep(), tmp_path / "data", keep=1)
        for path in (tmp_path / "data").iterdir():
            if path.name == "tokens.marks":  # through memory, and made anew at each start
                continue
            assert path.read_bytes() == (run.left / path.name).read_bytes(), path.name
        assert {"mad.db3", "mad.db3-wal", "token.pem", "admin_token.pem", "seal.key", "mad.conf"} <= set(
            os.listdir(tmp_path / "data")
        )


def test_what_was_acknowledged_survives_a_power_cut(run):
    print(f"POWER_SEED={run.seed}")  # shown with a failure
    dice = random.Random(run.seed)
    cuts, ledger = Cuts(run.entries, run.box.folder, run.box.base), run.ledger
    key, looked = None, 0
    for place, keep in run.places(dice, 500 if run.is_long else 12):
        cuts.cut(place, dice, run.box.folder, keep)
        box = again(run, run.time_of(place))
        here = f"cut at {place} of {run.ended}, {keep} of what was not synced kept"
        try:
            box.start()
            store = Store(
                str(box.folder / "mad.db3"),
                key := key or read_database_key(str(box.folder / "mad.db3"), "a database phrase", False),
            )
            assert store.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], here
            store.close()
            line = Line(box)
            begun = sorted(
                (thing for thing in ledger.things if thing.facts and thing.facts[0].began <= place),
                key=lambda thing: max(fact.began for fact in thing.facts if fact.began <= place),
            )
            # What went on about the cut, and some of what was long before.
            things = begun[-20:] + dice.sample(begun[:-20], min(10, max(0, len(begun) - 20)))
            ledger.box = box
            audit = ledger.read_audit(line, Audit())
            wrong = [sentence for thing in begun for sentence in audit.missing(thing.standing(place))]
            wrong += ledger.check(line, place, things, audit)
            assert not wrong, f"{here}: {wrong}"
            assert line.admin("GET", "/audit-logs/verify", bearer=ledger.bearer).json["valid"], here
            if run.kids.stands(place):
                assert set(run.kids.what["kids"]) <= set(box.run("keys", "list").stdout.split()), here
            looked += sum(len(thing.standing(place)) for thing in things)
            line.close()
            said = box.said()
            assert "Traceback" not in said, f"{here}: {said}"
            assert "log.damaged" not in said, f"{here}: what a power cut leaves is no damage: {said}"
        finally:
            ledger.box = run.box
            end(box)
    assert looked > 100


def test_a_power_cut_during_setup_leaves_nothing_or_everything(run):
    print(f"POWER_SEED={run.seed}")
    dice = random.Random(run.seed)
    ends = [entry.end for entry in run.entries if entry.end <= run.was_set_up]
    places = sorted([*dice.sample(ends, 60 if run.is_long else 2), run.was_set_up])
    cuts, found = Cuts(run.entries, run.box.folder, run.box.base), []
    for place in places:
        folder, here = run.box.folder, f"cut at {place} of {run.was_set_up}"
        cuts.cut(place, dice, folder, 0 if place == run.was_set_up else None)
        box = again(run)
        done = box.run("options", "--json")  # finishes or removes what was begun
        assert done.returncode == 0, f"{here}: {done.stderr}"
        names = set(os.listdir(folder)) - {"answers.toml", "mad.conf", "mad.conf.setting-up.lock", "mad.db3.lock"}
        made = {"mad.db3", "token.pem", "admin_token.pem", "seal.key"}
        assert names in (set(), made), f"{here}: {names}"
        assert (
            (folder / "mad.conf").read_bytes() == run.box.base["mad.conf"]
            if not names
            else b"# -- " in (folder / "mad.conf").read_bytes()
        ), here
        found.append(bool(names))
        if not names:
            done = box.run("serve")
            assert done.returncode == 1 and "run microauthd setup" in done.stderr and done.stderr.count("\n") == 1, (
                f"{here}: {done.stderr}"
            )
            box.set_up()
        try:
            box.start()
            assert box.admin_token() and box.token().status == 200, here
        finally:
            end(box)
    assert found == sorted(found) and found[-1] is True, "what was done is done"
