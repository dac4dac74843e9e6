"""TLS of Triton's gRPC service: the files that it reads, and their check."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from glm_image.errors import ConfigurationError, shown
from glm_image.supervisor.python_environment import Plain

CERTIFICATES = "a file with certificates in PEM format"
KEY = "a file with the certificate's private key in PEM format, without a passphrase"


@dataclass(frozen=True)
class TlsFiles:
    """The files of one service; all None = no TLS.

    Attributes:
        certificate: the server's certificate, and those between it and its authority.
        key: the certificate's private key.
        clients: certificates of the authorities of clients, which then have to present one; None = any client.
    """

    certificate: Path | None
    key: Path | None
    clients: Path | None

    @property
    def is_used(self) -> bool:
        return self.certificate is not None

    def check(self) -> None:
        """Raises ConfigurationError for a file that is missing, cannot be read, or does not suit the others."""
        given = {
            "--grpc-server-cert": self.certificate,
            "--grpc-server-key": self.key,
            "--grpc-root-cert": self.clients,
        }
        if not any(given.values()):
            return
        for name, allowed in (("--grpc-server-cert", CERTIFICATES), ("--grpc-server-key", KEY)):
            if given[name] is None:
                other = next(flag for flag, path in given.items() if path is not None)
                raise ConfigurationError(f"{name} is missing; allowed with {other}: {allowed}")
        for name in ("--grpc-server-cert", "--grpc-root-cert"):
            if (path := given[name]) is not None:
                _check_certificates(name, path)
        assert self.certificate is not None
        assert self.key is not None
        _check_key("--grpc-server-key", self.certificate, self.key)

    def flags(self, plain: Plain) -> list[str]:
        """Returns Triton's flags; ``plain`` gives paths that Triton can read."""
        if self.certificate is None or self.key is None:
            return []
        flags = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={plain(self.certificate, 'server-cert')}",
            f"--grpc-server-key={plain(self.key, 'server-key')}",
        ]
        if self.clients is not None:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={plain(self.clients, 'root-cert')}"]
        return flags


def _check_certificates(name: str, path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise _refused(name, path, "which has no certificate", CERTIFICATES) from None
    except OSError as error:
        raise _refused(name, path, f"which cannot be read ({error.strerror})", CERTIFICATES) from None


def _check_key(name: str, certificate: Path, key: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with key.open("rb"):
            pass
        context.load_cert_chain(certificate, key, password=_refuse_passphrase)
    except ssl.SSLError as error:
        fault = f"which is not the key of {shown(str(certificate))}"
        raise _refused(name, key, fault if error.reason == "KEY_VALUES_MISMATCH" else "which has no key", KEY) from None
    except OSError as error:
        raise _refused(name, key, f"which cannot be read ({error.strerror})", KEY) from None
    except PassphraseError:
        raise _refused(name, key, "which needs a passphrase", KEY) from None


class PassphraseError(Exception):
    """A private key is encrypted."""


def _refuse_passphrase() -> str:
    raise PassphraseError


def _refused(name: str, path: Path, fault: str, allowed: str) -> ConfigurationError:
    return ConfigurationError(f"{name} is {shown(str(path))}, {fault}; allowed: {allowed}")
