#!/bin/sh
# Written by microauthd install: the program with the settings and secrets of the service.
: "${MICROAUTHD_CACHE=@PREFIX@/code}" "${MAD_CONFIG=@CONFIG@/mad.conf}"
export MICROAUTHD_CACHE MAD_CONFIG
secrets=@CONFIG@/credentials
if [ -n "${CREDENTIALS_DIRECTORY-}" ]; then
    :
elif [ "$(id -u)" = 0 ] && [ -n "$(find "$secrets" -name '*.cred' 2>/dev/null)" ]; then
    # systemd-creds(1): they are opened for this command alone, in memory.
    CREDENTIALS_DIRECTORY=$(mktemp -d /run/microauthd-secrets.XXXXXX) || exit 1
    export CREDENTIALS_DIRECTORY
    trap 'rm -rf "$CREDENTIALS_DIRECTORY"' EXIT
    trap 'exit 130' INT TERM HUP
    find "$secrets" -type f ! -name '*.cred' -exec cp {} "$CREDENTIALS_DIRECTORY" \;
    for sealed in "$secrets"/*.cred; do
        name=$(basename "$sealed" .cred)
        systemd-creds decrypt --name="$name" "$sealed" "$CREDENTIALS_DIRECTORY/$name" || exit 1
    done
    chgrp -R @USER@ "$CREDENTIALS_DIRECTORY"
    chmod -R u=rX,g=rX,o= "$CREDENTIALS_DIRECTORY"
    @PYTHON@ -I @PREFIX@/microauthd.pyz "$@"
    exit
elif [ -d "$secrets" ]; then
    export CREDENTIALS_DIRECTORY="$secrets"
fi
exec @PYTHON@ -I @PREFIX@/microauthd.pyz "$@"
