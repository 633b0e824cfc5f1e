"""Bundles and model repositories opened under trust: signed with a known key, or of a known digest.

The digest of either is the SHA-256 of its ``manifest.json``, which has the SHA-256 of every other file;
whatever is read is compared with that manifest. So who knows the digest, or the key, knows all of it.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cbpt_runtime.artifacts import writing
from cbpt_runtime.artifacts.signing import SIGNATURE, check_signature, sign_folder
from cbpt_runtime.errors import BundleError, ConfigError, OutputError, TrustError
from cbpt_runtime.export.manifest import MANIFEST, Repository, is_repository, read_repository

if TYPE_CHECKING:
    from cbpt_runtime.bundle import Bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What an artefact has to show before it is used; by default nothing but that it is intact.

    Attributes:
        key: PEM file with the public key or certificate it must be signed with.
        digests: Digests it must have one of, lower-case hexadecimal; any will do when empty.
    """

    key: Path | None = None
    digests: frozenset[str] = frozenset()

    @property
    def is_asked_for(self) -> bool:
        """Whether anything at all has to be shown."""
        return self.key is not None or bool(self.digests)


ANYONE = Trust()
"""Trusts whatever is intact."""


def make_trust(key: Path | None = None, digests: Iterable[str] = ()) -> Trust:
    """Return what `--trust` and `--digest` say.

    Args:
        key: PEM file with a public key or certificate.
        digests: ``sha256:`` and 64 hexadecimal digits, or the digits alone.

    Raises:
        ConfigError: A digest is none.
    """
    found = set()
    for text in digests:
        match = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})", text.strip().lower())
        if match is None:
            raise ConfigError(
                expected="sha256: and 64 hexadecimal digits for --digest",
                got=repr(text),
                fix="Copy the digest from where the artefact was made: every verb prints it.",
            )
        found.add(match[1])
    return Trust(key=key, digests=frozenset(found))


def open_bundle(path: str | Path, trust: Trust = ANYONE, *, verify: bool = True) -> Bundle:
    """Read a bundle that is the trusted one.

    Args:
        path: Its folder.
        trust: What it has to show.
        verify: As for `read_bundle`.

    Raises:
        BundleError: Not a bundle, or damaged.
        ConfigError: The key cannot be used.
        TrustError: Its signature is wrong or missing, or its digest another.
    """
    from cbpt_runtime.bundle import read_bundle  # takes safetensors along; a server needs none

    signed = _signed_digest(Path(path), trust)
    bundle = read_bundle(path, verify=verify)
    _check_digest(bundle, signed, trust)
    return bundle


def open_repository(path: str | Path, trust: Trust = ANYONE) -> Repository:
    """Read a model repository that is the trusted one, and hash every file of it.

    Args:
        path: Its folder.
        trust: What it has to show.

    Raises:
        RepositoryError: Not a repository, or a file is missing, changed or not in the manifest.
        ConfigError: The key cannot be used.
        TrustError: Its signature is wrong or missing, or its digest another.
    """
    signed = _signed_digest(Path(path), trust)
    repository = read_repository(path)
    _check_digest(repository, signed, trust)
    return repository


def refuse_untrusted(source: str | Path, trust: Trust) -> None:
    """Refuse what is neither bundle nor repository where something has to be shown.

    Raises:
        TrustError: Something is asked for.
    """
    if trust.is_asked_for:
        raise TrustError(
            expected="a bundle or a model repository with --trust or --digest",
            got=f"{source}, which is neither",
            fix="Leave both away for a checkpoint, a graph or a server, or name the folder that was signed.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What was signed.

    Attributes:
        path: The folder.
        kind: 'bundle' or 'repository'.
        digest: SHA-256 of its manifest.
        signature: The file that was written.
    """

    path: Path
    kind: str
    digest: str
    signature: Path


def sign_artefact(
    path: str | Path, *, key: Path, certificate: Path | None = None, force: bool = False
) -> Signed:
    """Sign a bundle or a model repository that is intact; the signature stands in its folder.

    Args:
        path: Its folder.
        key: PEM file with a private elliptic curve key.
        certificate: PEM file with the key's certificate and those above it, to be carried along.
        force: Replace a signature that is there.

    Raises:
        InputError: The folder is damaged or holds files its manifest does not know; the key cannot be used.
        OutputError: It has a signature already, or cannot be written.
    """
    from cbpt_runtime.bundle import Bundle, read_bundle

    path = Path(path)
    file = path / SIGNATURE
    artefact = read_repository(path) if is_repository(path) else read_bundle(path)
    if isinstance(artefact, Bundle) and artefact.unlisted():
        raise BundleError(
            expected=f"the files of {path / MANIFEST} and no others",
            got=", ".join(artefact.unlisted()),
            fix="Take them out: a signature stands for everything in the folder.",
        )
    if os.path.lexists(file) and not force:
        raise OutputError(
            expected=f"no signature in {path} yet", got=f"{file}", fix="Replace it with --force."
        )
    content = sign_folder(path, key=key, certificate=certificate)
    staging = path / f".{SIGNATURE}.{secrets.token_hex(4)}.tmp"
    try:
        with writing(file):
            staging.write_bytes(content)
            staging.replace(file)
    finally:
        staging.unlink(missing_ok=True)
    kind = "bundle" if isinstance(artefact, Bundle) else "repository"
    return Signed(path=path, kind=kind, digest=artefact.digest, signature=file)


def _signed_digest(path: Path, trust: Trust) -> str | None:
    """Digest a good signature vouches for; None where none is asked for, or there is nothing to be signed."""
    if trust.key is None or not (path / MANIFEST).is_file():
        return None
    return check_signature(path, trust.key).get(MANIFEST, "")


def _check_digest(artefact: Bundle | Repository, signed: str | None, trust: Trust) -> None:
    if signed is not None and artefact.digest != signed:
        raise TrustError(
            expected=f"{artefact.path / MANIFEST} as signed, with SHA-256 {signed or '(none was signed)'}",
            got=artefact.digest,
            fix="Do not use it. Fetch it again from who signed it.",
        )
    if trust.digests and artefact.digest not in trust.digests:
        raise TrustError(
            expected=f"{artefact.path} with the digest " + " or ".join(sorted(trust.digests)),
            got=artefact.digest,
            fix="Do not use it. Fetch it again from where the digest comes from.",
        )
