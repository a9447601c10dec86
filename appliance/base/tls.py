"""The certificates that the ports serve."""

import os
import ssl

from cryptography.hazmat.primitives import serialization

# == Contexts ==================================================================
# A certificate and its key, as the ssl module takes them. Knows nothing of connections.


def _load_pkcs12(context, content, password):
    from cryptography.hazmat.primitives.serialization import (
        pkcs12,
    )  # seldom needed, and it has its share of the start-up

    key, certificate, chain = pkcs12.load_key_and_certificates(content, password.encode() or None)
    if key is None or certificate is None:
        raise ValueError("no key or no certificate")
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem += b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (certificate, *chain))
    # Memory, never the disk: the ssl module loads from files only.
    descriptor = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def tls_context(cert_file: str, key_file: str | None = None, password: str | None = None) -> ssl.SSLContext:
    """Return a server context for TLS 1.2 and later.

    `cert_file` is PEM (the chain, perhaps with its key) or PKCS#12, told apart by content.
    Raises ValueError with a sentence for the operator. RFC 9325 §3.1, §4.2.
    """
    for name in filter(None, (cert_file, key_file)):
        try:
            with open(name, "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"The TLS file {name} cannot be read: {error.strerror}.") from None
        if name == cert_file:
            certificate = content
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # of TLS 1.2: forward secrecy and AEAD only
    context.set_alpn_protocols(["http/1.1"])
    secret = password or ""  # never None: OpenSSL would ask the terminal
    try:
        if b"-----BEGIN " in certificate:
            context.load_cert_chain(cert_file, key_file, lambda: secret)
        else:
            _load_pkcs12(context, certificate, secret)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"The TLS key does not belong to the certificate {cert_file}.") from None
        if (
            error.reason == "NO_START_LINE"
            or (error.reason is None
            and not key_file
            and b"PRIVATE KEY-----" not in certificate)
        ):
            raise ValueError(
                f"The TLS file {key_file or cert_file} has no private key or no certificate in it."
            ) from None
        raise ValueError(
            f"The TLS key of {cert_file} cannot be opened: the passphrase is wrong or missing, or the file is damaged."
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The TLS file {cert_file} cannot be used: it is neither PEM nor PKCS#12, or its passphrase is wrong."
        ) from error
    return context
