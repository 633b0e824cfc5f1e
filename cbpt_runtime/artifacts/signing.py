"""Signatures by the OpenSSF Model Signing specification, with its own library.

A signature is one file, ``model.sig``, in the folder it signs: the SHA-256 of every other file there, signed
with an elliptic curve key (P-256, P-384 or P-521), in Sigstore's bundle format. Nothing else touches the
library, `model-signing`, which is the extra ``sign``; it is imported when it is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cbpt_runtime.artifacts import NOT_LISTED, ListedFile, check_files
from cbpt_runtime.errors import ConfigError, TrustError, missing_extra

SIGNATURE = "model.sig"
MAX_SIGNATURE_BYTES = 16 * 2**20
_MAX_KEY_BYTES = 2**20
_CURVES = "an elliptic curve key (P-256, P-384 or P-521), PEM and not encrypted"


def sign_folder(folder: Path, *, key: Path, certificate: Path | None = None) -> bytes:
    """Sign every file of a folder but its signature.

    Args:
        folder: What to sign.
        key: PEM file with the private key. Read once, so that it may be a pipe.
        certificate: PEM file with the key's certificate, and any between it and the authority's after it; the
            signature then carries them.

    Returns:
        The content of ``model.sig``.

    Raises:
        ConfigError: `model-signing` is not installed, or the key or certificate cannot be used.
        TrustError: The folder holds something that is no plain file.
    """
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library))
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=key)
        else:
            config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=[certificate]
            )
    except Exception as error:  # whatever cryptography raises for a file that is no such key
        beside = "" if certificate is None else f", and its certificate in {certificate}"
        raise ConfigError(
            expected=f"{_CURVES} in {key}{beside}",
            got=_reason(error),
            fix="Make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`; give an "
            "encrypted one through a pipe, --key <(openssl pkey -in encrypted.pem).",
        ) from error
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, SIGNATURE)
        try:
            config.sign(folder, file)
        except ValueError as error:
            raise TrustError(
                expected=f"plain files alone in {folder}",
                got=_reason(error),
                fix="Take out what does not belong there and sign again.",
            ) from error
        return file.read_bytes()


def check_signature(folder: Path, trusted: Path) -> dict[str, str]:
    """Check the signature of a folder: made with the trusted key, for exactly the files that are there.

    Args:
        folder: What was signed.
        trusted: PEM file with the signer's public key, or with the certificate of the authority that issued
            the signer's (or the signer's own, where it signs itself); when one ends is not looked at. Or a
            JSON file with the Sigstore `identity` and its `issuer`; with `trust_config`, a file with
            Sigstore's trust roots beside it, no network is used.

    Returns:
        SHA-256 of every signed file by its path in the folder, as the signature has it.

    Raises:
        ConfigError: `model-signing` is not installed, the file holds none of them, or Sigstore's trust roots
            cannot be had.
        TrustError: The signature is missing or by another key, or a file is missing, changed or new.
    """
    library = _library()
    verifier = _verifier(library, trusted)
    content = _read_signature(folder)
    # What is checked is what is read below, whatever happens to the file meanwhile.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        file = Path(scratch, SIGNATURE)
        file.write_bytes(content)
        try:
            verifier.verify(folder, file)
            return _signed_files(content)
        except Exception as error:  # of pydantic, OpenSSL, cryptography: whatever it is, fail
            is_well_signed = str(error).startswith("Signature mismatch")  # of the files, that is
            different = _differences(folder, _signed_files(content)) if is_well_signed else ""
            raise TrustError(
                expected=f"{folder} as signed by the signer that {trusted} names",
                got=different or _reason(error),
                fix="Do not use it. Fetch it again from who signed it, or name the key it was signed with.",
            ) from error


def _library() -> ModuleType:
    try:
        import model_signing
    except ImportError as error:
        raise missing_extra("the package model-signing for signatures", "sign", error) from error
    return model_signing


def _hashing(library: ModuleType) -> Any:
    """Every file but the signature; the library leaves git's own files out unless told not to."""
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _verifier(library: ModuleType, trusted: Path) -> Any:
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    try:
        with trusted.open("rb") as stream:
            text = stream.read(_MAX_KEY_BYTES)
        if text.lstrip().startswith(b"{"):
            return config.use_sigstore_verifier(**_identity(text, trusted))
        if b"-----BEGIN CERTIFICATE-----" in text:
            return config.use_certificate_verifier(certificate_chain=[trusted])
        return config.use_elliptic_key_verifier(public_key=trusted)
    except ConfigError:
        raise
    except Exception as error:  # whatever cryptography, pydantic or a network raises
        raise ConfigError(
            expected="a public key (P-256, P-384 or P-521) or a certificate, PEM, or a Sigstore identity "
            f"that can be checked, in {trusted}",
            got=_reason(error),
            fix="Ask the signer for it; `openssl pkey -in key.pem -pubout` prints the public half of a key.",
        ) from error


def _identity(text: bytes, file: Path) -> dict[str, Any]:
    """Return what the library is to be told of a Sigstore identity."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        values = str(error)
    keys = {"identity", "issuer", "trust_config"}
    is_right = isinstance(values, dict) and {"identity", "issuer"} <= set(values) <= keys
    if not is_right or not all(isinstance(value, str) and value for value in values.values()):
        raise ConfigError(
            expected=f'a Sigstore identity in {file}: {{"identity": "…", "issuer": "https://…"}}, and '
            '"trust_config" with a file of trust roots to do without a network',
            got=repr(values)[:300],
            fix="Ask the signer for both; the issuer is who vouched for the identity.",
        )
    roots = values.get("trust_config")
    return {
        "identity": values["identity"],
        "oidc_issuer": values["issuer"],
        "trust_config": None if roots is None else file.parent / roots,
    }


def _read_signature(folder: Path) -> bytes:
    file = folder / SIGNATURE
    if file.is_symlink() or not file.is_file():
        raise TrustError(
            expected=f"a signature in {file}",
            got="something that is no plain file" if file.is_symlink() or file.exists() else "none",
            fix="Fetch a signed copy; or, if you know it is good, sign it yourself with `cbpt-runtime sign`.",
        )
    with file.open("rb") as stream:
        content = stream.read(MAX_SIGNATURE_BYTES + 1)
    if len(content) > MAX_SIGNATURE_BYTES:
        raise TrustError(
            expected=f"a signature of at most {MAX_SIGNATURE_BYTES >> 20} MiB in {file}",
            got="a larger file",
            fix="Fetch a signed copy.",
        )
    return content


def _signed_files(signature: bytes) -> dict[str, str]:
    """Return what a signature that was checked vouches for."""
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    resources = payload.get("predicate", {}).get("resources", [])  # the oldest signatures have none
    return {entry["name"]: entry["digest"] for entry in resources if entry["algorithm"] == "sha256"}


def _differences(folder: Path, signed: Mapping[str, str]) -> str:
    """How the files of a folder differ from those that were signed."""
    table = {name: ListedFile(sha256=sha256) for name, sha256 in signed.items()}
    found = [
        problem.replace(NOT_LISTED, " is new") for problem in check_files(folder, table, besides=[SIGNATURE])
    ]
    return "; ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")


def _reason(error: Exception) -> str:
    """One line out of an exception's text."""
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    if isinstance(error, AttributeError):  # what the library meets where the signature lacks its half
        return "a signature of the other kind: with a certificate where a key was named, or without one"
    text = " ".join(str(error).split()) or "a signature by another key"
    return text if len(text) <= 300 else text[:300] + " …"
