# Sourced by build/run and build/test: the Python environment and the archive, made when they are missing or stale.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out="$root/build/out"
python="$root/.venv/bin/python"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# The environment is made anew whenever the lock or the Python changes; the stamp is written last,
# so that one that was interrupted is made again.
make_environment() {
    local lock="$root/build/requirements-build.lock" system stamp
    system=$(command -v python3) || fail "python3 is missing: 3.11 or newer is needed, with venv"
    "$system" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 is too old: 3.11 or newer is needed"
    stamp="$("$system" -VV) $(sha256sum <"$lock")"
    if [ -x "$python" ] && [ "$(cat "$root/.venv/stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "making .venv from build/requirements-build.lock ..."
    "$system" -m venv --clear "$root/.venv" || fail "the venv module is missing (on Debian: apt install python3-venv)"
    "$python" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r "$lock"
    printf '%s' "$stamp" >"$root/.venv/stamp"
}

# The archive is built anew whenever anything it is made of changes.
make_archive() {
    local stamp
    stamp=$(cd "$root" && {
        "$python" -VV
        find pyproject.toml README.md microauthd.py mad.py public appliance build/main.py build/pyz.py build/requirements.lock \
            -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum)
    if [ -f "$out/microauthd.pyz" ] && [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "building build/out/microauthd.pyz ..."
    "$python" "$root/build/pyz.py" >&2
    printf '%s' "$stamp" >"$out/stamp"
}

# The browser tests drive Debian's chromium; nothing else is asked of the system.
need_browser() {
    command -v chromium >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing chromium for the browser tests ..."
        apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
    else
        fail "chromium is missing: the browser tests need it (on Debian: apt install chromium)"
    fi
}
