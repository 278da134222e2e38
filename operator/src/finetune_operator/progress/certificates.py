"""The endpoint's certificates: CAs kept in the operator's Secret, and a serving certificate that each replica makes.

Called by server.py and handlers.py. Stages trust the CAs only, whose certificates (the bundle) lie in each pod of an
attempt for its whole life. So they outlive restarts of the operator in the Secret, and a new CA is in the bundle for
OVERLAP_DAYS before it signs anything: only a pod that runs for longer meets a certificate that it cannot check. The
serving key is never stored. What is to be done when is decided by pure functions of the time.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube.client import Client, ClusterError

logger = logging.getLogger(__name__)

CA_DAYS = 3650
SERVING_DAYS = 365
NEXT_CA_DAYS = 730
"""A CA that ends in less than this has its successor made."""
SWITCH_DAYS = 365
"""A CA that ends in less than this gives way to its successor: a serving certificate shall have its full life."""
OVERLAP_DAYS = 180
"""A CA is in the bundle for at least so long before it signs."""
SERVING_RENEWAL = 2 / 3
"""Share of its life after which a serving certificate is replaced."""
MOST_CONFLICTS = 5
CERTIFICATE_KEY = "ca.crt"
PRIVATE_KEY = "ca.key"
NEXT_CERTIFICATE_KEY = "next-ca.crt"
NEXT_PRIVATE_KEY = "next-ca.key"
PREVIOUS_CERTIFICATE_KEY = "previous-ca.crt"
_BACKDATED = timedelta(hours=1)
"""Nodes' clocks may lag behind the operator's."""


@dataclass(frozen=True)
class Authority:
    """One CA: certificate and private key, as PEM."""

    certificate: bytes
    private_key: bytes


@dataclass(frozen=True)
class Authorities:
    """The CAs of one installation. `current` signs, `next` will; `previous` (certificate, PEM) signed before."""

    current: Authority
    next: Authority | None = None
    previous: bytes | None = None

    @property
    def bundle(self) -> str:
        """Every CA certificate that a stage which starts now has to trust, as PEM."""
        parts = (self.current.certificate, self.next.certificate if self.next else b"", self.previous or b"")
        return "".join(part.decode() for part in parts)


def make_authority(now: datetime) -> Authority:
    """A new CA, valid for CA_DAYS."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The date tells two of them apart where a client trusts both.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"finetune-operator progress CA {now:%Y-%m-%d}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(_pem(certificate), _key_pem(key))


def make_serving_pair(authority: Authority, url: str, now: datetime) -> tuple[bytes, bytes]:
    """(certificate, private key) as PEM for the host of `url`, signed by the CA, valid for SERVING_DAYS."""
    ca = x509.load_pem_x509_certificate(authority.certificate)
    ca_key = serialization.load_pem_private_key(authority.private_key, password=None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the CA's key is no elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    host = urlsplit(url).hostname or ""
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(min(now + timedelta(days=SERVING_DAYS), ca.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([_host_name(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def derive_authorities(there: Authorities | None, now: datetime) -> Authorities:
    """The CAs that there should be: `there` itself when nothing is due.

    Without any that can be used, a new one. A CA near its end gets a successor, which signs when it has been in the
    bundle for OVERLAP_DAYS, or when the old one has ended before that because no operator ran for so long.
    """
    if there is None:
        return Authorities(make_authority(now))
    left = _ends_at(there.current.certificate) - now
    if there.next is not None:
        known_for = now - (_begins_at(there.next.certificate) + _BACKDATED)
        is_due = left <= timedelta(days=SWITCH_DAYS) and known_for >= timedelta(days=OVERLAP_DAYS)
        if is_due or left <= timedelta(0):
            previous = there.current.certificate if left > timedelta(0) else None
            return derive_authorities(Authorities(there.next, previous=previous), now)
    elif left <= timedelta(0):
        return Authorities(make_authority(now))
    elif left <= timedelta(days=NEXT_CA_DAYS):
        there = replace(there, next=make_authority(now))
    if there.previous is not None and _ends_at(there.previous) <= now:
        there = replace(there, previous=None)
    return there


def needs_serving_pair(certificate: bytes | None, authority: Authority, now: datetime) -> bool:
    """Whether a serving certificate (PEM, None before the first) is to be replaced: of another CA, or near its end."""
    if certificate is None:
        return True
    serving, ca = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority.certificate)
    try:
        serving.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return True
    begins, ends = serving.not_valid_before_utc, serving.not_valid_after_utc
    return now >= begins + (ends - begins) * SERVING_RENEWAL


async def keep_authorities(client: Client, namespace: str, secret: str, now: datetime) -> Authorities:
    """The CAs in the operator's Secret, brought up to date there. Replicas that do so at once end with the same ones.

    ClusterError when the Secret itself is missing: the installation makes it, the operator may only fill it.
    """
    for _ in range(MOST_CONFLICTS):
        there = await client.find("Secret", namespace, secret)
        if there is None:
            raise ClusterError(
                404, "NotFound", f"Secret {secret} does not exist in namespace {namespace}: create it, empty"
            )
        data = there.get("data") or {}
        known = read_authorities(data)
        authorities = derive_authorities(known, now)
        if authorities == known:
            return authorities
        patch = {
            # With it the write is refused when another replica was faster; that one's CAs are then taken.
            "metadata": {"resourceVersion": there["metadata"]["resourceVersion"]},
            "data": _secret_data(authorities, data),
        }
        try:
            await client.merge("Secret", namespace, secret, patch, field_manager="finetune-operator-progress")
        except ClusterError as error:
            if error.status != 409:
                raise
            continue
        return authorities
    raise ClusterError(409, "Conflict", f"Secret {secret} in namespace {namespace} is written by somebody all the time")


async def follow_authorities(
    read: Callable[[], Awaitable[Authorities]],
    use: Callable[[Authorities], None],
    *,
    check_seconds: float = 86400,
    retry_seconds: float = 600,
) -> None:
    """Have `use` take the CAs as `read` brings them up to date, once a day until cancelled. The caller did so at start.

    `use` gets them whether they changed or not: a serving certificate comes near its end under the same CA too.
    """
    pause = check_seconds
    while True:
        await asyncio.sleep(pause)
        try:
            use(await read())
            pause = check_seconds
        except ClusterError as error:
            pause = min(check_seconds, retry_seconds)
            logger.warning("the progress endpoint's CAs are looked at again in %.0f s: %s", pause, error)


def read_authorities(data: Mapping[str, str]) -> Authorities | None:
    """The CAs in a Secret's data (base64 by key); None when there is no whole one that can be read."""
    current, coming = _read(data, CERTIFICATE_KEY, PRIVATE_KEY), _read(data, NEXT_CERTIFICATE_KEY, NEXT_PRIVATE_KEY)
    if current is None:
        current, coming = coming, None  # stages know it already
    if current is None:
        return None
    previous = _decoded(data, PREVIOUS_CERTIFICATE_KEY)
    return Authorities(current, coming, previous if previous and _is_certificate(previous) else None)


def _read(data: Mapping[str, str], certificate_key: str, private_key: str) -> Authority | None:
    certificate, key = _decoded(data, certificate_key), _decoded(data, private_key)
    if not certificate or not key or not _is_certificate(certificate):
        return None
    try:
        loaded = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    public = x509.load_pem_x509_certificate(certificate).public_key()
    is_pair = isinstance(loaded, ec.EllipticCurvePrivateKey) and loaded.public_key() == public
    return Authority(certificate, key) if is_pair else None


def _decoded(data: Mapping[str, str], key: str) -> bytes:
    try:
        return base64.b64decode(data.get(key) or "", validate=True)
    except ValueError:
        return b""


def _is_certificate(pem: bytes) -> bool:
    try:
        x509.load_pem_x509_certificate(pem)
    except ValueError:
        return False
    return True


def _secret_data(authorities: Authorities, there: Mapping[str, str]) -> dict[str, Any]:
    """The Secret's data as a merge patch: what is no more is null."""
    coming = authorities.next
    values = {
        CERTIFICATE_KEY: authorities.current.certificate,
        PRIVATE_KEY: authorities.current.private_key,
        NEXT_CERTIFICATE_KEY: coming.certificate if coming is not None else None,
        NEXT_PRIVATE_KEY: coming.private_key if coming is not None else None,
        PREVIOUS_CERTIFICATE_KEY: authorities.previous,
    }
    return {
        key: None if value is None else base64.b64encode(value).decode()
        for key, value in values.items()
        if value is not None or key in there
    }


def _begins_at(certificate: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_before_utc


def _ends_at(certificate: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
