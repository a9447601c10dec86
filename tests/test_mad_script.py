"""A shell script of mad commands under `set -euo pipefail`, against a server: every command succeeds silently."""

import os
import subprocess
import sys

from box import ARCHIVE

SCRIPT = r"""
mad() { "$PYTHON" -I "$ARCHIVE" mad "$@"; }
mad session login --username root --password-stdin <<< "$PASSWORD"
mad session status
mad user create --username bob --user-email bob@example.org --user-password '@correct horse 1'
mad user list
mad user list --is-active all --q bob --sort -created_at --quiet
mad user get --id bob
mad user update --id bob --email bob@example.net --is-active
mad user verify-email --id bob
printf '@correct horse 1\n' | mad user verify-password --id bob --password-stdin
mad user reset-password --id bob --new-password 'another horse 22'
mad user set-lockout --id bob --until permanent
mad user unlock --id bob
mad user set-lockout --id bob --until 2030-01-01T00:00:00Z --json
mad user clear-lockout --id bob --json
mad user deactivate --id bob
[ "$(mad user list --is-active false --quiet)" = "$(mad user get --id bob --quiet)" ]
mad user activate --id bob
mad role create --name Operator --description x
mad role create --name Guest
mad role update --id Operator --description 'runs the plant'
mad role list
mad role get --id Operator
mad role assign --user-id bob --role-id Operator
mad role list-for-user --user-id bob
mad role list-users --id Operator
mad role set-for-user --user-id bob --role-id Guest Operator
mad role list-for-user --user-id bob --quiet
mad role unassign --user-id bob --role-id Guest
mad permission create --name door.open
mad permission update --id door.open --name gate.open
mad permission list
mad permission get --id gate.open
mad permission assign --role-id Operator --permission-id gate.open
mad permission list-for-role --role-id Operator
mad permission list-roles --id gate.open
mad permission list-for-user --user-id bob
[[ "$(mad permission check-access --user-id bob --permission-id gate.open --json)" = *"\"allowed\":true"* ]]
mad permission remove --role-id Operator --permission-id gate.open
mad permission delete --id gate.open
mad scope create --name meters:read --description y
mad scope update --id meters:read --description z
mad scope list --limit 2
mad scope get --id meters:read --json
mad scope assign-to-user --user-id bob --scope-id meters:read
mad scope list-for-user --user-id bob
mad scope list-users --id meters:read
mad scope remove-from-user --user-id bob --scope-id meters:read
mad client create --client-id sensor --grant client_credentials --json
mad client create --client-id web --gen-password 32 --display-name Web --audience api
mad client list
mad client get --id web
mad client update --id web --display-name 'Web 2' --grant authorization_code refresh_token --introspect false \
  --first-party --access-token-signed-alg RS256
mad client change-secret --id web --overlap 600
mad client secrets --id web
mad client delete-secret --id web --secret-id "$(mad client secrets --id web --quiet | head -1)"
mad scope assign-to-client --client-id web --scope-id meters:read
mad scope list-for-client --client-id web
mad scope list-clients --id meters:read
mad client list-scopes --client-id web
mad client remove-scope --client-id web --scope-id meters:read
mad client assign-scope --client-id web --scope-id meters:read
mad client add-redirect-uri --id web --uri https://app.example/cb
mad client list-redirect-uris --client-id web
mad client delete-redirect-uri --client-id web --id https://app.example/cb
mad client add-redirect-uri --id web --uri https://app.example/cb2 --quiet > id
mad client delete-redirect-uri --id "$(cat id)"
mad client add-post-logout-uri --id web --uri https://app.example/bye
mad client list-post-logout-uris --client-id web
mad client delete-post-logout-uri --client-id web --id https://app.example/bye
mad client create --client-id spa --public
mad client add-cors-origin --id spa --uri https://app.example
mad client list-cors-origins --client-id spa
mad client delete-cors-origin --client-id spa --id https://app.example
mad client set-flag --client-id web --flag ENABLE_TOTP --enable true
[ "$(mad client get-flag --client-id web --flag ENABLE_TOTP)" = enabled ]
mad client set-flag-options --client-id web --flag TOKEN_EXPIRATION --options 600
mad client get-flag-options --client-id web --flag TOKEN_EXPIRATION
mad client list-flags --client-id web
mad client add-idp --id web --provider-key google --display-name Google \
  --issuer https://accounts.google.com --external-client-id 123
mad client list-idps --id web
mad client get-idp --id web --idp-id google
mad client update-idp --id web --idp-id google --provider-key google --display-name G2 \
  --issuer https://accounts.google.com --external-client-id 124
mad client delete-idp --id web --idp-id google
MAD_CLIENT_SECRET="$CLIENT_SECRET" mad token get --client-id app > tok
mad sessionctl introspect --token - < tok
mad sessionctl list
mad session list --client-id app --limit 1
mad session get --id "$(mad session list --client-id app --quiet --limit 1)"
mad session list-by-user --user-id root
mad session revoke --id "$(mad session list --client-id app --quiet --limit 1)"
MAD_CLIENT_SECRET="$CLIENT_SECRET" mad token get --client-id app --no-cache > tok
mad token revoke --token - < tok
mad token --token - < tok
mad sessionctl purge --older-than 0 --expired
mad refreshtoken list
mad refreshtoken list-by-user --user-id bob
mad refreshtoken purge-refresh --older-than 3600 --expired
mad audit list --limit 3
mad audit get --id 2
mad audit verify
mad audit export --limit 2
mad audit tail --lines 3 | head -2
mad auditlog purge --days 3000
mad user revoke --id bob
mad client revoke --id web
mad client delete --id web
mad scope delete --id meters:read
mad role delete --id Operator
mad user delete --id bob
[ "$(mad user list --is-active all --q bob --quiet)" = "" ]
mad session logout
"""


class TestScript:
    def test_it_runs_to_its_end(self, box):
        more = {
            "PYTHON": sys.executable, "ARCHIVE": str(ARCHIVE), "PASSWORD": box.PASSWORD, "CLIENT_SECRET": box.client[1],
            "PATH": os.environ["PATH"],
        }
        more |= {
            "MAD_ADMIN_URL": f"http://127.0.0.1:{box.admin_port}", "MAD_AUTH_URL": f"http://127.0.0.1:{box.auth_port}",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", SCRIPT], env=box.environ | more, cwd=box.folder, capture_output=True,
            text=True, timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
