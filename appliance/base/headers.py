"""The security headers of every response, whoever makes it: a route, the router, or the server before either."""

API_POLICY = "default-src 'none'; frame-ancestors 'none'"  # of what is no page
HSTS = ("Strict-Transport-Security", "max-age=31536000")


def frame_options(policy: str) -> str:
    """Return the X-Frame-Options that says what `frame-ancestors` of a policy says, or "" if none does.

    Browsers that know frame-ancestors ignore the field, and for others it must not say anything else. RFC 7034 §2.1,
    CSP Level 3 §6.4.2.1. Of a directive that stands there twice, the first counts.
    """
    directives = (directive.split() for directive in policy.lower().split(";"))
    ancestors = next((words[1:] for words in directives if words[:1] == ["frame-ancestors"]), None)
    if ancestors is None:
        return ""
    return {"": "DENY", "'none'": "DENY", "'self'": "SAMEORIGIN"}.get(" ".join(sorted(set(ancestors))), "")


def security_headers(policy: str = API_POLICY, scheme: str = "http") -> tuple[tuple[str, str], ...]:
    """Return the security headers of a response with this Content-Security-Policy, which may be empty."""
    headers = [("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")]
    if policy:
        headers.append(("Content-Security-Policy", policy))
    if framing := frame_options(policy):
        headers.append(("X-Frame-Options", framing))
    if scheme == "https":
        headers.append(HSTS)
    return tuple(headers)
