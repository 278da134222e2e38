"""The endpoint's certificates: a CA kept in the operator's Secret, and a serving certificate made at each start.

Called by server.py and handlers.py. Stages trust the CA only, whose certificate lies in each attempt's ConfigMap, so it
has to outlive restarts of the operator: that is what the Secret is for. The serving key is never stored.
"""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.kube.client import Client, ClusterError

CA_DAYS = 3650
SERVING_DAYS = 365
CERTIFICATE_KEY = "ca.crt"
PRIVATE_KEY = "ca.key"
_BACKDATED = timedelta(hours=1)
"""Nodes' clocks may lag behind the operator's."""


@dataclass(frozen=True)
class Authority:
    """The CA: certificate and private key, as PEM."""

    certificate: bytes
    private_key: bytes


def make_authority(now: datetime) -> Authority:
    """A new CA, valid for CA_DAYS."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress CA")])
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


async def keep_authority(client: Client, namespace: str, secret: str, now: datetime) -> Authority:
    """The CA in the operator's Secret; made and written there if it has none yet or is about to end.

    ClusterError when the Secret itself is missing: the installation makes it, the operator may only fill it.
    """
    there = await client.find("Secret", namespace, secret)
    if there is None:
        raise ClusterError(
            404, "NotFound", f"Secret {secret} does not exist in namespace {namespace}: create it, empty"
        )
    data = there.get("data") or {}
    if CERTIFICATE_KEY in data and PRIVATE_KEY in data:
        authority = Authority(base64.b64decode(data[CERTIFICATE_KEY]), base64.b64decode(data[PRIVATE_KEY]))
        if _is_good(authority, now):
            return authority
    authority = make_authority(now)
    values = {CERTIFICATE_KEY: authority.certificate, PRIVATE_KEY: authority.private_key}
    encoded = {key: base64.b64encode(value).decode() for key, value in values.items()}
    await client.merge("Secret", namespace, secret, {"data": encoded}, field_manager="finetune-operator-progress")
    return authority


def _is_good(authority: Authority, now: datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(authority.certificate)
    except ValueError:
        return False
    return certificate.not_valid_after_utc > now + timedelta(days=SERVING_DAYS)


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
