"""TLS of Triton's gRPC port: the files that ``serve`` takes, and the flags that Triton gets."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra fleet is not installed")

from glm_image.errors import ConfigurationError, shown
from glm_image.supervisor.gateway import GatewayFlags
from glm_image.supervisor.tls import TlsFiles
from local_fleet.certificates import Authority, KeyPair


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> KeyPair:
    return authority.issue("dit-0", "127.0.0.1")


def plain(path: Path, name: str) -> str:
    return f"/links/{name}"


def test_no_files_are_no_tls() -> None:
    files = TlsFiles(None, None, None)
    files.check()
    assert not files.is_used
    assert files.flags(plain) == []


def test_a_certificate_and_its_key(pair: KeyPair) -> None:
    files = TlsFiles(pair.certificate, pair.key, None)
    files.check()
    assert files.is_used
    assert files.flags(plain) == [
        "--grpc-use-ssl=true",
        "--grpc-server-cert=/links/server-cert",
        "--grpc-server-key=/links/server-key",
    ]


def test_clients_need_a_certificate_of_the_authority(authority: Authority, pair: KeyPair) -> None:
    files = TlsFiles(pair.certificate, pair.key, authority.certificate)
    files.check()
    assert files.flags(plain)[3:] == ["--grpc-use-ssl-mutual=true", "--grpc-root-cert=/links/root-cert"]


def test_refusals_name_flag_file_and_what_is_allowed(authority: Authority, pair: KeyPair, tmp_path: Path) -> None:
    certificate, key = pair.certificate, pair.key
    other = authority.issue("other")
    text, missing, encrypted = tmp_path / "text.pem", tmp_path / "missing.pem", tmp_path / "encrypted.pem"
    text.write_text("no certificate")
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", encrypted],
        check=True,
        capture_output=True,
    )
    cert_flag, key_flag, root_flag = "--grpc-server-cert", "--grpc-server-key", "--grpc-root-cert"
    certificates, private_key = "a file with certificates in PEM format", "a file with the certificate's private key"
    cases = [
        (TlsFiles(certificate, None, None), f"{key_flag} is missing; allowed with {cert_flag}: {private_key}"),
        (TlsFiles(None, key, None), f"{cert_flag} is missing; allowed with {key_flag}: {certificates}"),
        (TlsFiles(None, None, text), f"{cert_flag} is missing; allowed with {root_flag}: {certificates}"),
        (TlsFiles(missing, key, None), f"{cert_flag} is {{missing}}, which cannot be read (No such file or directory)"),
        (TlsFiles(text, key, None), f"{cert_flag} is {{text}}, which has no certificate; allowed: {certificates}"),
        (TlsFiles(certificate, key, text), f"{root_flag} is {{text}}, which has no certificate; allowed:"),
        (TlsFiles(certificate, tmp_path, None), f"{key_flag} is {{folder}}, which cannot be read (Is a directory)"),
        (TlsFiles(certificate, text, None), f"{key_flag} is {{text}}, which has no key; allowed: {private_key}"),
        (TlsFiles(certificate, encrypted, None), f"{key_flag} is {{encrypted}}, which needs a passphrase; allowed:"),
        (TlsFiles(certificate, other.key, None), f"{key_flag} is {{other}}, which is not the key of {{certificate}};"),
    ]
    paths = {"missing": missing, "text": text, "folder": tmp_path, "encrypted": encrypted, "other": other.key}
    names = {name: shown(str(path)) for name, path in {**paths, "certificate": certificate}.items()}
    for files, message in cases:
        with pytest.raises(ConfigurationError) as raised:
            files.check()
        assert str(raised.value).startswith(message.format(**names))


def test_the_gateway_of_serve_connects_without_tls() -> None:
    with pytest.raises(ConfigurationError, match="--gateway is given with --grpc-server-cert, and it connects without"):
        GatewayFlags(0).check("127.0.0.1", uses_tls=True)


def test_certificates_of_a_run_verify_against_their_authority(authority: Authority, pair: KeyPair) -> None:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=authority.certificate)
    server.load_cert_chain(pair.certificate, pair.key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    while waiting:
        end = waiting.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(end)
    assert ends[0].version() == "TLSv1.3"
    assert pair.key.stat().st_mode & 0o077 == 0
