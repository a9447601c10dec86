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

# The archive is built anew whenever anything it is made of changes; words: what it is for, "here" or "every machine".
# One for every machine serves here too.
make_archive() {
    local stamp built
    stamp=$(cd "$root" && {
        "$python" -VV
        find pyproject.toml README.md microauthd.py mad.py public appliance build/*.py build/requirements.lock \
            -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum)
    built=$(cat "$out/stamp" 2>/dev/null || true)
    if [ -f "$out/microauthd.pyz" ] && { [ "$built" = "every machine $stamp" ] || [ "$built" = "$1 $stamp" ]; }; then
        return
    fi
    say "building build/out/microauthd.pyz for $1 ..."
    case "$1" in
    here) "$python" "$root/build/pyz.py" --only HERE >&2 ;;
    *) "$python" "$root/build/pyz.py" >&2 ;;
    esac
    printf '%s' "$1 $stamp" >"$out/stamp"
}

# Debian's packages that tests need, installed where we may; words: what for, a command or file of theirs, the packages.
need_packages() {
    local reason=$1 proof=$2
    shift 2
    if command -v "$proof" >/dev/null || [ -e "$proof" ]; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $* for $reason ..."
        apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    else
        fail "$* is missing: $reason need it (on Debian: apt install $*)"
    fi
}

need_browser() {
    need_packages "the browser tests" chromium chromium fonts-dejavu-core
}

# A compiler for the file layer that loses writes, and a clock that lies.
need_fault_tools() {
    need_packages "the fault tests" cc gcc libc6-dev
    need_packages "the fault tests" faketime faketime
}
