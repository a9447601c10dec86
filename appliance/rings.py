"""The key rings of a box: what signs, waits and retires; rotation, and the revocation of a stolen key.

The commands at the machine and the routes of ADMIN call these functions. A server loads a changed ring within a second.
"""

import contextlib
import os

import msgspec

from appliance.base import StartupError
from appliance.base.clock import CLOCK_FAR, IAT_SKEW, RELEASED_AT
from appliance.base.files import sync_directory, write_beside, write_durably
from appliance.base.keys import Key, alg_of, lock_ring, make_key, promote, read_ring, replace_keys, write_ring
from appliance.base.objects import KeyImpact, KeyObject, iso
from appliance.base.settings import Options
from appliance.base.store import AtLeast, Store
from microauthd import Caller, ID_TOKEN_TTL, Idp, Problem, audit, ring_files


class KeyRefusal(StartupError):
    """A rotation or revocation that the state of the rings does not allow, in a sentence for the operator."""


def rsa_bits_of(options: Options, port_name: str) -> int:
    return options.token_signing_key_length_rsa if port_name == "auth" else options.admin_token_signing_key_length_rsa


def longest_life(options: Options, store: Store, port_name: str) -> int:
    """Return how many seconds a token of a port may live that was signed a moment ago."""
    if port_name == "admin":
        return options.admin_token_expiration
    of_clients = (int(option) for option in store.list_token_lifetimes() if option.isdigit())
    return max(options.token_expiration, ID_TOKEN_TTL, *of_clients)


def list_keys(options: Options, now: int) -> list[dict]:
    """Return a row for each signing key: port, alg, kid, state, since (Unix seconds)."""
    rows = []
    for port_name, (path, passphrase, _) in ring_files(options).items():
        for entry in promote(read_ring(path, passphrase), now, options.key_overlap):
            key = Key(entry)
            rows.append({"port": port_name, "alg": key.alg, "kid": key.kid, "state": entry.state, "since": entry.since})
    return rows


def clock_problem(idp: Idp) -> str:
    """Return why the machine's clock is not to be believed, or nothing: a key would sign too early, or never."""
    if not idp.check_clock():
        return "is behind the newest row of the database"
    known = idp.store.clock_floor()
    if known > RELEASED_AT and idp.now() > known + CLOCK_FAR:
        ahead = (idp.now() - known) // 86400
        return f"is {ahead} days ahead of what was last noted, unless 'clock accept' says that it is right"
    return ""


def rotate(idp: Idp, caller: Caller, ports, algorithms=()) -> list[str]:
    """Publish a next key beside each that signs, and return the new kids. It signs after `key-overlap` seconds.

    If one ring refuses, none is rotated. A clock that is behind is refused: once it was corrected, the new key would
    sign before caches know it.
    """
    options, made = idp.options, []
    if why := clock_problem(idp):
        raise StartupError(f"the clock of this machine {why}: put it right first")
    with contextlib.ExitStack() as locks:
        rings = {}
        for port_name in ports:
            path, passphrase, _ = ring_files(options)[port_name]
            locks.enter_context(lock_ring(path))
            entries = promote(read_ring(path, passphrase), idp.now(), options.key_overlap)
            signing = {alg_of(entry) for entry in entries if entry.state == "active"}
            rings[port_name] = entries, sorted(alg for alg in signing if not algorithms or alg in algorithms)
            if {alg_of(entry) for entry in entries if entry.state == "next"} & set(rings[port_name][1]):
                raise KeyRefusal(f"a next key of {port_name} waits to sign already; see microauthd keys list")
        if not any(rotated for _, rotated in rings.values()):
            raise KeyRefusal(
                f"no key of {' or '.join(ports)} signs with {' or '.join(algorithms)}; see microauthd keys list"
            )
        drawn = {
            port_name: [make_key(alg, rsa_bits_of(options, port_name), 0) for alg in rotated]
            for port_name, (_, rotated) in rings.items()
        }
        now = idp.now()  # making keys takes seconds; all of them wait from one moment
        staged: dict[str, str] = {}  # a disk that fills up between two rings must not leave one rotated

        def remove_staged():
            for temporary in filter(os.path.exists, staged.values()):
                os.unlink(temporary)

        locks.callback(remove_staged)
        for port_name, (entries, rotated) in rings.items():
            if rotated:
                path, passphrase, _ = ring_files(options)[port_name]
                fresh = [msgspec.structs.replace(key, state="next", since=now) for key in drawn[port_name]]
                # The audit row first: an unrecorded change is worse than a record of one that failed.
                audit(idp, caller, "keys_rotated", port_name, " ".join(Key(entry).kid for entry in fresh))
                staged[path] = write_beside(path, write_ring([*entries, *fresh], passphrase))
                made += [Key(entry).kid for entry in fresh]
        for path, temporary in staged.items():
            os.replace(temporary, path)
            sync_directory(os.path.dirname(os.path.abspath(path)))
    return made


def revoke(idp: Idp, caller: Caller, kid: str) -> str:
    """Take a stolen key out of its ring: no token it signed is good any more, from now on.

    Where it signed, a new one does. Return its port.
    """
    options = idp.options
    for port_name, (path, passphrase, _) in ring_files(options).items():
        with lock_ring(path):
            entries = read_ring(path, passphrase)
            if not clock_problem(idp):
                entries = promote(entries, idp.now(), options.key_overlap)
            rest = replace_keys(entries, {kid}, rsa_bits_of(options, port_name), idp.now())
            if rest == entries and not (port_name == "auth" and idp.store.has_retired_key(kid)):
                continue
            with idp.store.transaction():
                idp.store.revoke_kids([kid])
                audit(idp, caller, "key_revoked", port_name, kid)
            if rest != entries:
                write_durably(path, write_ring(rest, passphrase))
            return port_name
    raise KeyRefusal(f"there is no key {kid}; see microauthd keys list")


# -- what routes of ADMIN call --


@contextlib.contextmanager
def key_problems():
    """Raise a Problem for what a ring refuses: it names the cause, for an operator."""
    try:
        yield
    except KeyRefusal as refusal:
        raise Problem("invalid_request", log=str(refusal), errors={"ring": str(refusal)}) from None
    except (StartupError, OSError) as error:
        raise Problem("temporarily_unavailable", log=str(error), retry_after=60) from None


def signed_by(idp: Idp, row: dict) -> list[str]:
    """Return what a key signs now, unless a client chose another algorithm."""
    if row["state"] != "active":
        return []
    ring = idp.rings[row["port"]]
    signs = ["access_token"] if ring.access.alg == row["alg"] else []
    if row["port"] == "auth" and ring.signer("RS256").alg == row["alg"]:
        signs.append("id_token")
    return signs


def loaded_keys(idp: Idp) -> list[dict]:
    """Return the rows of list_keys() for the keys that this process has loaded, without reading a file."""
    idp.reload_rings_if_due()
    return [
        {"port": port_name, "alg": key.alg, "kid": key.kid, "state": key.state, "since": key.since}
        for port_name, ring in idp.rings.items() for key in ring.keys
    ]


def describe(idp: Idp, rows: list[dict] | None = None) -> list[KeyObject]:
    """Return the keys of both rings, with when a waiting one signs and until when a retired one verifies."""
    options, shown = idp.options, []
    for row in loaded_keys(idp) if rows is None else rows:
        is_retired, waits = row["state"] == "retired", options.key_overlap if row["state"] == "next" else 0
        gone_after = row["since"] + longest_life(options, idp.store, row["port"]) + IAT_SKEW
        shown.append(
            KeyObject(
                row["kid"], row["port"], row["alg"], row["state"], iso(row["since"]), signed_by(idp, row),
                None if is_retired else iso(row["since"] + waits), iso(gone_after) if is_retired else None,
            )
        )
    return shown


def find_key(idp: Idp, kid: str) -> dict:
    found = next((row for row in loaded_keys(idp) if row["kid"] == kid), None)
    if found is None:
        raise Problem("not_found")
    return found


def impact(idp: Idp, kid: str) -> KeyImpact:
    """Return how many living access tokens a key may have signed, at most. Raises not_found.

    Which key signed a token is not stored: counted are the tokens of the port, whose client is signed for with this
    algorithm, that were issued while the key may have signed.
    """
    row = find_key(idp, kid)
    now, options = idp.now(), idp.options
    begins = 0 if row["state"] == "retired" else row["since"]
    ends = {"retired": row["since"], "next": 0}.get(row["state"], now + IAT_SKEW)
    default = idp.rings[row["port"]].access.alg
    tokens, users, clients = idp.store.count_signed(row["port"], row["alg"], default, begins, ends, now)
    keeps = max(0, min(300, options.key_overlap - 2))
    return KeyImpact(kid, row["port"], row["state"], tokens, isinstance(tokens, AtLeast), users, clients, keeps)


def rotate_rings(idp: Idp, caller: Caller, ring: str, alg: str) -> list[KeyObject]:
    """Publish next keys, of one ring and algorithm or of all, and return them."""
    with key_problems():
        made = rotate(idp, caller, [ring] if ring else ["auth", "admin"], [alg] if alg else ())
        rows = [row for row in list_keys(idp.options, idp.now()) if row["kid"] in made]
    idp.next_ring_check = 0.0  # this process is as quick as the others
    return describe(idp, rows)


def revoke_stolen(idp: Idp, caller: Caller, kid: str) -> str:
    """Revoke a key and return its ring. Raises not_found."""
    try:
        with key_problems():
            port_name = revoke(idp, caller, kid)
    except Problem as problem:
        raise Problem("not_found", log=problem.log) if problem.errors else problem from None
    idp.next_ring_check = 0.0
    idp.store.generation.bump()  # whoever keeps tokens at this machine asks for them anew
    return port_name
