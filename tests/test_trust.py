"""The library accepts our signatures, and we refuse whatever is not what was signed."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cbpt_runtime.artifacts.signing import MAX_SIGNATURE_BYTES, SIGNATURE
from cbpt_runtime.bundle import ENCODER, HEAD, MANIFEST, Bundle, BundleContent, write_bundle
from cbpt_runtime.errors import BundleError, ConfigError, OutputError, RepositoryError, TrustError
from cbpt_runtime.export.manifest import PROVENANCE, write_manifest
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.runtime.preprocess import Preprocess
from cbpt_runtime.trust import make_trust, open_bundle, open_repository, sign_artefact

model_signing = pytest.importorskip("model_signing", reason="SIGNATURES NOT TESTED: the extra `sign`")

MakeContent = Callable[..., BundleContent]
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def keys(signing_keys: Path, write_key_pair: Callable[..., None]) -> Path:
    """Key pairs `ours` and `other`; and `rsa` and `hidden`, which sign nothing here."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    write_key_pair(signing_keys, "rsa", rsa.generate_private_key(65537, 2048))
    write_key_pair(signing_keys, "hidden", ec.generate_private_key(ec.SECP256R1()), password=b"secret")
    (signing_keys / "empty.pub").write_text("")
    return signing_keys


def certify(folder: Path, name: str, key: Any, issuer: str, issuer_key: Any, *, authority: bool) -> Path:
    """Writes a certificate of a key, issued by another or by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1 if not authority else 2))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **usage),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )
    path = folder / f"{name}.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def signed(tmp_path: Path, make_content: MakeContent, keys: Path) -> Path:
    """A small bundle signed with `ours`."""
    path = write_bundle(tmp_path / "bundle", content=make_content(), report=lambda _: "<p>").path
    sign_artefact(path, key=keys / "ours.pem")
    return path


def append(name: str) -> Damage:
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return damage


def reseal(folder: Path) -> None:
    """Changes a file and makes the manifest fit, as who wants in would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "report.html").write_text("<p>clean")
    manifest["files"]["report.html"]["sha256"] = hashlib.sha256(b"<p>clean").hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def link_signature(folder: Path) -> None:
    (folder / SIGNATURE).rename(folder.parent / SIGNATURE)
    (folder / SIGNATURE).symlink_to(folder.parent / SIGNATURE)


def fill_signature(folder: Path) -> None:
    with (folder / SIGNATURE).open("wb") as file:
        file.truncate(MAX_SIGNATURE_BYTES + 1)


def test_a_signed_bundle_opens_with_the_key_and_without(signed: Path, keys: Path) -> None:
    trusted = open_bundle(signed, make_trust(keys / "ours.pub"))
    anyone = open_bundle(signed)
    assert trusted.digest == anyone.digest == hashlib.sha256((signed / MANIFEST).read_bytes()).hexdigest()
    assert trusted.unlisted() == []


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / SIGNATURE).unlink(), "a signature in .*model.sig; got none"),
        (append(ENCODER), r"encoder.safetensors was changed"),
        (append("report.html"), r"report.html was changed"),
        (append(MANIFEST), r"manifest.json was changed"),
        (lambda folder: (folder / "payload.py").write_text(""), r"got payload.py is new\."),
        (lambda folder: (folder / ".gitattributes").write_text(""), r"got \.gitattributes is new\."),
        (lambda folder: (folder / "report.html").unlink(), r"got report.html is missing\."),
        (lambda folder: (folder / "link").symlink_to("/etc/passwd"), "it is a symlink"),
        (reseal, r"manifest.json was changed"),
        (link_signature, "no plain file"),
        (fill_signature, "a larger file"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "verificationMaterial"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff\x00"), "as signed by the signer"),
        (lambda folder: ((folder / SIGNATURE).unlink(), (folder / SIGNATURE).mkdir()), "no plain file"),
    ],
)
def test_what_is_not_as_signed_is_refused_by_name(
    signed: Path, keys: Path, damage: Damage, told: str
) -> None:
    damage(signed)
    with pytest.raises(TrustError, match=told) as caught:
        open_bundle(signed, make_trust(keys / "ours.pub"))
    assert caught.value.exit_code == 2
    assert str(signed) in caught.value.expected


def test_another_key_is_refused(signed: Path, keys: Path) -> None:
    with pytest.raises(TrustError, match="Key mismatch"):
        open_bundle(signed, make_trust(keys / "other.pub"))


def test_a_forged_hint_does_not_make_a_key_fit(signed: Path, keys: Path, make_content: MakeContent) -> None:
    """The signature names its key; the name of the trusted one on the signature of another is no help."""
    good = json.loads((signed / SIGNATURE).read_text())
    sign_artefact(signed, key=keys / "other.pem", force=True)
    forged = json.loads((signed / SIGNATURE).read_text())
    forged["verificationMaterial"] = good["verificationMaterial"]
    (signed / SIGNATURE).write_text(json.dumps(forged))
    with pytest.raises(TrustError, match="a signature by another key"):
        open_bundle(signed, make_trust(keys / "ours.pub"))


def test_the_signature_of_another_bundle_is_refused(
    signed: Path, keys: Path, tmp_path: Path, make_content: MakeContent
) -> None:
    content = make_content(verdict="clean", suspects=())
    other = write_bundle(tmp_path / "other", content=content, report=lambda _: "<p>").path
    shutil.copy(signed / SIGNATURE, other)
    with pytest.raises(TrustError, match=r"manifest.json was changed"):
        open_bundle(other, make_trust(keys / "ours.pub"))


def test_a_signature_that_leaves_the_manifest_out_is_refused(signed: Path, keys: Path) -> None:
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE, MANIFEST])
    config = model_signing.signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=keys / "ours.pem").sign(signed, signed / SIGNATURE)
    with pytest.raises(TrustError, match="none was signed"):
        open_bundle(signed, make_trust(keys / "ours.pub"))


def identity(folder: Path, **values: object) -> Path:
    """A Sigstore identity, with the trust roots that come with Sigstore's library."""
    store = Path(importlib.util.find_spec("sigstore").origin).parent / "_store"  # type: ignore[union-attr, arg-type]
    roots, services = (
        json.loads((store / "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev" / name).read_text())
        for name in ("trusted_root.json", "signing_config.v0.2.json")
    )
    kind = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
    (folder / "roots.json").write_text(
        json.dumps({"mediaType": kind, "trustedRoot": roots, "signingConfig": services})
    )
    file = folder / "identity.json"
    known = {"identity": "release@example.org", "issuer": "https://accounts.example.org"}
    file.write_text(json.dumps(known | {"trust_config": "roots.json"} | values))
    return file


def test_a_signature_with_a_key_does_not_stand_for_a_sigstore_identity(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"by the signer that .*identity\.json names"):
        open_bundle(signed, make_trust(identity(tmp_path)))


def test_a_sigstore_identity_and_its_issuer_are_what_the_library_checks(
    signed: Path, tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = model_signing.verifying.Config, []

    def noted(self: Any, **arguments: object) -> Any:
        asked.append(arguments)
        return self.use_elliptic_key_verifier(public_key=keys / "ours.pub")

    monkeypatch.setattr(config, "use_sigstore_verifier", noted)
    assert open_bundle(signed, make_trust(identity(tmp_path))).verdict == "backdoored"
    assert asked == [
        {
            "identity": "release@example.org",
            "oidc_issuer": "https://accounts.example.org",
            "trust_config": tmp_path / "roots.json",
        }
    ]


@pytest.mark.parametrize(
    "values", [{"issuer": ""}, {"identity": None}, {"provider": "x"}, {"trust_config": 3}]
)
def test_what_is_no_sigstore_identity_is_said(
    signed: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="a Sigstore identity in"):
        open_bundle(signed, make_trust(identity(tmp_path, **values)))


def test_trust_roots_that_are_not_there_are_said(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a Sigstore identity that can be checked"):
        open_bundle(signed, make_trust(identity(tmp_path, trust_config="absent.json")))


def test_the_library_itself_accepts_our_signature_and_we_accept_its(signed: Path, keys: Path) -> None:
    verify = [sys.executable, "-m", "model_signing", "verify", "key", signed]
    sign = [sys.executable, "-m", "model_signing", "sign", "key", signed]
    place = ["--signature", signed / SIGNATURE]
    done = subprocess.run(
        [*verify, *place, "--public_key", keys / "ours.pub"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (signed / SIGNATURE).unlink()
    done = subprocess.run(
        [*sign, *place, "--private_key", keys / "ours.pem"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert open_bundle(signed, make_trust(keys / "ours.pub")).verdict == "backdoored"


def test_a_certificate_signs_and_its_authority_is_trusted(
    signed: Path, tmp_path: Path, write_key_pair: Callable[..., None]
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    write_key_pair(tmp_path, "signer", key)
    root = certify(tmp_path, "root", root_key, "root", root_key, authority=True)
    stranger = certify(tmp_path, "stranger", key, "stranger", key, authority=True)
    leaf = certify(tmp_path, "signer", key, "root", root_key, authority=False)
    sign_artefact(signed, key=tmp_path / "signer.pem", certificate=leaf, force=True)
    assert open_bundle(signed, make_trust(root)).path == signed
    model_signing.verifying.Config().use_certificate_verifier(certificate_chain=[root]).verify(
        signed, signed / SIGNATURE
    )
    with pytest.raises(TrustError, match="certificate"):
        open_bundle(signed, make_trust(stranger))
    with pytest.raises(TrustError, match="of the other kind: with a certificate"):
        open_bundle(signed, make_trust(tmp_path / "signer.pub"))
    append(HEAD)(signed)
    with pytest.raises(TrustError, match=HEAD):
        open_bundle(signed, make_trust(root))


def test_a_repository_is_signed_and_refused_like_a_bundle(tmp_path: Path, keys: Path) -> None:
    folder = tmp_path / "repository"
    models = ["shapes", *(f"shapes_{part}" for part in ("preprocess", "classifier", "alarm"))]
    for model in models:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.pbtxt").write_text(f'name: "{model}"')
    summary = {
        "name": "shapes",
        "models": models,
        "classes": 3,
        "preprocess": Preprocess(image_size=(32, 32)).to_dict(),
        "profile": Profile().to_dict(),
        "suspects": [],
        "versions": {},
        **dict.fromkeys(PROVENANCE, "0" * 64),
    }
    digest = write_manifest(folder, summary)
    signed = sign_artefact(folder, key=keys / "ours.pem")
    assert (signed.kind, signed.digest) == ("repository", digest)
    trust = make_trust(keys / "ours.pub", [f"sha256:{digest}"])
    assert open_repository(folder, trust).digest == open_repository(folder).digest == digest
    (folder / "shapes" / "config.pbtxt").write_text('name: "python"')
    (folder / MANIFEST).unlink()
    signature = (folder / SIGNATURE).read_bytes()
    (folder / SIGNATURE).unlink()
    write_manifest(folder, summary)
    (folder / SIGNATURE).write_bytes(signature)
    assert open_repository(folder).name == "shapes"  # intact, says the manifest that was made to fit
    with pytest.raises(TrustError, match=r"manifest.json was changed; shapes/config.pbtxt was changed"):
        open_repository(folder, make_trust(keys / "ours.pub"))
    with pytest.raises(TrustError, match="with the digest"):
        open_repository(folder, make_trust(digests=[digest]))
    (folder / SIGNATURE).unlink()
    (folder / SIGNATURE).mkdir()
    (folder / SIGNATURE / "code.py").write_text("")
    with pytest.raises(RepositoryError, match=r"model.sig/code.py is not in the manifest"):
        open_repository(folder)


def test_a_digest_is_enough_without_a_signature(tmp_path: Path, make_content: MakeContent) -> None:
    bundle = write_bundle(tmp_path / "bundle", content=make_content(), report=lambda _: "<p>")
    for text in (bundle.digest, f"sha256:{bundle.digest}", f"SHA256:{bundle.digest.upper()}"):
        assert open_bundle(bundle.path, make_trust(digests=["0" * 64, text])).digest == bundle.digest
    with pytest.raises(TrustError, match=f"the digest {'0' * 64}; got {bundle.digest}"):
        open_bundle(bundle.path, make_trust(digests=["0" * 64]))
    reseal(bundle.path)
    with pytest.raises(TrustError, match="with the digest"):
        open_bundle(bundle.path, make_trust(digests=[bundle.digest]))


@pytest.mark.parametrize("text", ["", "sha256:", "sha512:" + "0" * 64, "0" * 63, "g" * 64])
def test_what_is_no_digest_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        make_trust(digests=[text])


@pytest.mark.parametrize("name", ["ours.pem", "rsa.pub", "absent.pub", "empty.pub"])
def test_what_is_no_public_key_is_said(signed: Path, keys: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="a public key"):
        open_bundle(signed, make_trust(keys / name))


@pytest.mark.parametrize("name", ["ours.pub", "rsa.pem", "absent.pem", "hidden.pem"])
def test_what_is_no_private_key_is_said_and_nothing_is_written(
    tmp_path: Path, make_content: MakeContent, keys: Path, name: str
) -> None:
    path = write_bundle(tmp_path / "bundle", content=make_content()).path
    before = sorted(path.iterdir())
    with pytest.raises(ConfigError, match="not encrypted"):
        sign_artefact(path, key=keys / name)
    assert sorted(path.iterdir()) == before


def test_only_an_intact_bundle_is_signed_and_only_once(signed: Path, keys: Path) -> None:
    key = keys / "ours.pem"
    with pytest.raises(OutputError, match="--force"):
        sign_artefact(signed, key=key)
    (signed / "payload.py").write_text("")
    with pytest.raises(BundleError, match=r"payload.py"):
        sign_artefact(signed, key=key, force=True)
    (signed / "payload.py").unlink()
    append(ENCODER)(signed)
    with pytest.raises(BundleError, match=ENCODER):
        sign_artefact(signed, key=key, force=True)


def test_a_missing_library_is_said(signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"cbpt-runtime\[sign\]"):
        open_bundle(signed, make_trust(keys / "ours.pub"))


def test_importing_loads_nothing_of_the_library() -> None:
    code = "import sys, cbpt_runtime.trust; print({'model_signing', 'cryptography'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_bundle_is_still_a_bundle_after_it_was_signed(
    tiny_bundle: Bundle, tmp_path: Path, keys: Path
) -> None:
    """What reads it later goes on as before: the classifier and, in bundles of before, no papers at all."""
    from cbpt_runtime.classification.bundled import BundleClassifier

    path = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    sign_artefact(path, key=keys / "ours.pem")
    classifier = BundleClassifier.from_bundle(open_bundle(path, make_trust(keys / "ours.pub")))
    assert classifier.bundle.digest == tiny_bundle.digest
