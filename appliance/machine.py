"""What the routes of ADMIN get done at the machine."""

from appliance.backup import delete_backup, list_backups, make_backup, read_backup_piece
from appliance.figures import measure
from appliance.rings import describe, impact, revoke_stolen, rotate_rings
from appliance.status import read_status
from microauthd import Machine

# == Machine ===================================================================
# The functions that routes of ADMIN call. A server process replaces what depends on how it was started.

MACHINE = Machine(
    make_backup, read_backup_piece, delete_backup, read_status, measure, list_backups=list_backups, list_keys=describe,
    key_impact=impact, rotate_keys=rotate_rings, revoke_key=revoke_stolen,
)
