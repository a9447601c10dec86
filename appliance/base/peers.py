"""Which addresses count as one peer: for the limits of connections, of failures and of rows in the audit log."""

import ipaddress


def networks_of(address: str | ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[str, ...]:
    """Return what an address counts for: itself, or of IPv6 its /64 and its /48, except for loopback.

    Whoever has one address of IPv6 has its /64, and a site may have the whole /48. RFC 6177 §2.
    """
    address = ipaddress.ip_address(address)
    if address.version == 4 or address.is_loopback:
        return (str(address),)
    return tuple(str(ipaddress.ip_network((address, length), strict=False)) for length in (64, 48))
