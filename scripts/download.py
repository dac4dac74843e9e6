"""Downloads a checkpoint from a hub into a folder: resumes interrupted downloads, verifies every file at the end."""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from glm_image.checkpoint.layout import COMPONENTS
from glm_image.errors import GlmImageError, printable
from glm_image.sizing.inspect import inspect

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
OTHER_FILES = {"model_index.json", "generation_defaults.json", "README.md", "LICENSE"}
CHUNK = 1 << 22
SPARE_BYTES = 1 << 30
EXIT_FAILED, EXIT_REFUSED = 1, 2


class DownloadError(GlmImageError):
    """A download failed; the message names the remedy."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, with its SHA-256 or, for small files kept in git, its git id, if the hub reports them."""

    path: str
    size: int
    sha256: str | None = None
    git_id: str | None = None


@dataclass(frozen=True)
class Listing:
    """The commit to download and its files."""

    revision: str
    files: list[RemoteFile]


class HuggingFace:
    """Downloads with huggingface_hub, which reads HF_TOKEN, HF_ENDPOINT and HTTPS_PROXY."""

    name = "Hugging Face"
    repository = "zai-org/GLM-Image"
    revision = "main"

    def list(self, repository: str, revision: str) -> Listing:
        """Lists the files of a revision."""
        from huggingface_hub import HfApi  # noqa: PLC0415 - an optional package

        with self._translated_errors(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = [
            RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
            for file in info.siblings or ()
        ]
        return Listing(info.sha or revision, files)

    def fetch(self, repository: str, revision: str, paths: list[str], folder: Path) -> None:
        """Downloads the files that the folder does not have."""
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - an optional package

        with self._translated_errors(repository, revision):
            snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=paths)

    @contextmanager
    def _translated_errors(self, repository: str, revision: str) -> Iterator[None]:
        import httpx  # noqa: PLC0415 - comes with huggingface_hub
        from huggingface_hub import errors  # noqa: PLC0415

        try:
            yield
        except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.RevisionNotFoundError) as error:
            raise not_found(self.name, repository, revision, "HF_TOKEN") from error
        except errors.HfHubHTTPError as error:
            raise DownloadError(f"{self.name} answered {error.response.status_code}; try again later") from error
        except (httpx.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
            raise unreachable(self.name, error) from error


class ModelScope:
    """Downloads with modelscope_hub, which reads MODELSCOPE_API_TOKEN and MODELSCOPE_ENDPOINT."""

    name = "ModelScope"
    repository = "ZhipuAI/GLM-Image"
    revision = "master"

    def list(self, repository: str, revision: str) -> Listing:
        """Lists the files of a revision."""
        from modelscope_hub import HubApi  # noqa: PLC0415 - an optional package

        with self._translated_errors(repository, revision):
            entries = HubApi().list_repo_files(repository, "model", revision=revision)
        files = [
            RemoteFile(entry.path, entry.size or 0, entry.sha256 or None) for entry in entries if not _is_folder(entry)
        ]
        return Listing(revision, files)

    def fetch(self, repository: str, revision: str, paths: list[str], folder: Path) -> None:
        """Downloads the files that the folder does not have."""
        from modelscope_hub import HubApi  # noqa: PLC0415 - an optional package

        with self._translated_errors(repository, revision):
            HubApi().download_repo(repository, "model", revision=revision, local_dir=folder, allow_patterns=paths)

    @contextmanager
    def _translated_errors(self, repository: str, revision: str) -> Iterator[None]:
        import requests  # noqa: PLC0415 - comes with modelscope_hub
        from modelscope_hub import AuthenticationError, HubError, NetworkError, NotFoundError  # noqa: PLC0415

        try:
            yield
        except (NotFoundError, AuthenticationError) as error:
            raise not_found(self.name, repository, revision, "MODELSCOPE_API_TOKEN") from error
        except (NetworkError, requests.RequestException, OSError) as error:
            raise unreachable(self.name, error) from error
        except HubError as error:
            raise DownloadError(f"{self.name} answered: {error}; try again later") from error


def _is_folder(entry: object) -> bool:
    return getattr(entry, "type", None) in {"tree", "dir", "directory"}


HUBS = {"huggingface": HuggingFace(), "modelscope": ModelScope()}


def not_found(hub: str, repository: str, revision: str, token: str) -> DownloadError:
    return DownloadError(
        f"{hub} has no revision {revision} of {repository} for you: check both names, or log in ({token})"
    )


def unreachable(hub: str, error: BaseException) -> DownloadError:
    return DownloadError(
        f"{hub} cannot be reached ({error}): this needs a network, perhaps a proxy (HTTPS_PROXY). Downloaded files "
        "are kept; try the other hub (--from), or copy the folder from another machine"
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="download", description="Downloads the GLM-Image checkpoint, about 36 GB.")
    default = REPOSITORY_ROOT / "checkpoints" / "GLM-Image"
    parser.add_argument("folder", nargs="?", type=Path, default=default, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--from", dest="hub", choices=list(HUBS), default="huggingface", help="default: %(default)s")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="default: that of the model's authors")
    parser.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit; default: the latest")
    parser.add_argument("--card", type=float, metavar="GB", help="report which stages fit a card of this memory")
    return parser.parse_args(arguments)


def checkpoint_files(files: list[RemoteFile]) -> list[RemoteFile]:
    """Returns the files of a repository that belong to the checkpoint.

    Raises:
        DownloadError: the repository has no ``model_index.json``, or the path of a file leaves the folder.
    """
    kept = [file for file in files if file.path in OTHER_FILES or file.path.split("/")[0] in COMPONENTS]
    if not any(file.path == "model_index.json" for file in kept):
        raise DownloadError("the repository has no model_index.json: it is not a checkpoint of this model")
    for file in kept:
        if ".." in PurePosixPath(file.path).parts:
            raise DownloadError(f"the repository has a file {file.path!r}, which would leave the folder")
    return kept


def check_space(folder: Path, files: list[RemoteFile]) -> None:
    """Checks that the disk has room for the files that are not complete yet.

    Raises:
        DownloadError: the free space is too small.
    """
    missing = sum(file.size for file in files if not _has_size(folder / file.path, file.size))
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if missing + SPARE_BYTES > free:
        raise DownloadError(
            f"{folder} needs {missing / 1e9:.1f} GB more and 1 GB to spare, and its disk has {free / 1e9:.1f} GB free: "
            "make room, or name a folder on another disk"
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def check_files(folder: Path, files: list[RemoteFile]) -> None:
    """Compares every file with the hub's size and hash; removes wrong files, so that they are downloaded again.

    Raises:
        DownloadError: files were missing or wrong.
    """
    wrong = []
    for number, file in enumerate(files, 1):
        say(f"checking {number} of {len(files)}: {file.path}")
        path = folder / file.path
        if not _has_size(path, file.size) or not _has_content(path, file):
            path.unlink(missing_ok=True)
            wrong.append(file.path)
    if wrong:
        raise DownloadError(f"removed files that differ from the hub's: {', '.join(wrong)}; run again to download them")


def _has_content(path: Path, file: RemoteFile) -> bool:
    if file.sha256:
        return _digest(path, hashlib.sha256()) == file.sha256
    if file.git_id:
        # A git blob id: SHA-1 over its length and content.
        return _digest(path, hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)) == file.git_id
    return True


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(flags: argparse.Namespace, report: Callable[[str], None] = print) -> None:
    """Lists and downloads the files, verifies them and reports on the checkpoint."""
    hub = HUBS[flags.hub]
    repository = hub.repository if flags.repository is None else flags.repository
    revision = hub.revision if flags.revision is None else flags.revision
    listing = hub.list(repository, revision)
    files = checkpoint_files(listing.files)
    say(f"{repository} at {listing.revision}: {len(files)} files, {sum(file.size for file in files) / 1e9:.2f} GB")
    check_space(flags.folder, files)
    flags.folder.mkdir(parents=True, exist_ok=True)
    hub.fetch(repository, listing.revision, [file.path for file in files], flags.folder)
    check_files(flags.folder, files)
    report(inspect(flags.folder).to_text(flags.card))


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    try:
        download(flags)
    except KeyboardInterrupt:
        say("stopped; run again to resume")
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        say(f"error: {error.name} is not installed: install this project with its extra 'download'")
        return EXIT_REFUSED
    except GlmImageError as error:
        say(f"error: {error}")
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
