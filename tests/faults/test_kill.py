"""kill -9 of every process at random moments under a mixed load: what was acknowledged is there after each restart."""

import os
import random
import signal
import time

import pytest
from box import Box
from ledger import SETTINGS, Audit, Ledger, Line
from appliance.base.database import read_database_key
from appliance.base.store import Store


@pytest.fixture
def killed(tmp_path):
    with Box(tmp_path / "data", workers="2", **SETTINGS) as box:
        yield box


def kill(box):
    """All processes of the box at once, as the kernel would when memory is out or somebody is angry."""
    os.killpg(box.process.pid, signal.SIGKILL)
    box.process.wait(60)
    box.output.close()


def integrity(box, key):
    """What SQLite says of the database, read beside the server that has just recovered it."""
    store = Store(str(box.folder / "mad.db3"), key)
    try:
        return store.connection.execute("PRAGMA integrity_check").fetchall()
    finally:
        store.close()


@pytest.mark.parametrize(
    "kills, times", [(8, 1), (3, 8), pytest.param(500, 1, marks=pytest.mark.long)], ids=["some", "crowd", "many"]
)
def test_what_was_acknowledged_survives_kill_9_at_any_moment(killed, kills, times):
    """A crowd writes in groups: transactions of dozens that one sync puts on the disk."""
    seed = int(os.environ.get("KILL_SEED", "0")) or random.randrange(10**9)
    print(f"KILL_SEED={seed}")  # shown with a failure
    dice = random.Random(seed)
    key = read_database_key(str(killed.folder / "mad.db3"), "a database phrase", False)
    ledger = Ledger(killed, mark=lambda: 0, seed=seed)
    ledger.prepare()
    audit, checked, facts = Audit(), 0, 0
    wanted = {"issued", "spent", "revoked", "exchanged", "minted", "made"}
    line, kinds, number = Line(killed), set(), 0
    # A slow machine does less before each kill.
    while number < kills or (number < 10 * kills and not (kinds >= wanted and facts > 10 * kills)):
        number += 1
        ledger.start(times=times)
        time.sleep(dice.uniform(0.02, 0.35) * min(times, 4))
        kill(killed)
        ledger.ending.set()
        ledger.join()
        while dice.random() < 0.15:  # and while it starts: ports not bound, or bound and not serving
            killed.start(wait=False)
            time.sleep(dice.uniform(0, 0.6))
            kill(killed)
        killed.start()
        line.close()
        line = Line(killed)
        assert integrity(killed, key) == [("ok",)], f"after kill {number}"
        wrong = ledger.check(line, 0, ledger.things[checked:], ledger.read_audit(line, audit))
        assert not wrong, f"after kill {number}: {wrong}"
        standing = [fact for thing in ledger.things[checked:] for fact in thing.standing(0)]
        facts += len(standing)
        kinds |= {fact.kind for fact in standing}
        checked = len(ledger.things)
    assert ledger.check_again(line, 0, ledger.things, ledger.read_audit(line, Audit())) == []
    verdict = line.admin("GET", "/audit-logs/verify", bearer=ledger.bearer).json
    assert verdict["valid"], verdict
    line.close()
    assert facts > 10 * kills and not ledger.refused, (facts, ledger.refused[:20])
    assert kinds >= wanted, kinds
    assert any(not thing.is_settled(0) for thing in ledger.things), "no kill met a request under way"
    assert "Traceback" not in killed.said()
