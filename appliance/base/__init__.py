"""What the server stands on. Nothing here knows OAuth: no client, grant, scope or token but as a row or an octet."""


class StartupError(Exception):
    """A sentence for the operator that ends a command with exit status 1."""
