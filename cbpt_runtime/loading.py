"""What a path or a URL names: opened as a classifier (`cbpt.load`), or described without running anything.

Several can be opened together, to be compared over one class list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbpt_runtime.artifacts.names import is_file
from cbpt_runtime.artifacts.signing import SIGNATURE
from cbpt_runtime.bundle import MANIFEST, Bundle
from cbpt_runtime.classification import Classifier
from cbpt_runtime.errors import ClassListError, ConfigError
from cbpt_runtime.export.manifest import is_repository
from cbpt_runtime.models.data import ClassList
from cbpt_runtime.trust import ANYONE, Trust, open_bundle, refuse_untrusted

if TYPE_CHECKING:
    from cbpt_runtime.classification.checkpoint import Detector
    from cbpt_runtime.classification.classifier import Kind
    from cbpt_runtime.export.session import Provider


Source = Classifier | Bundle | str | Path
"""A classifier, a bundle, or what names one: a path, a URL, a pretrained tag or an ``hf-hub:`` id."""
_URLS = ("grpc://", "grpcs://", "http://", "https://")


def kind_of(source: Source) -> Kind:
    """Return what something names, by its looks: what is nothing else is taken for a checkpoint."""
    if isinstance(source, Classifier):
        return source.kind
    if isinstance(source, Bundle):
        return "bundle"
    if str(source).startswith(_URLS):
        return "url"
    path = Path(source)
    if is_repository(path):
        return "repository"
    if is_file(path / MANIFEST):
        return "bundle"
    return "onnx" if path.suffix == ".onnx" and is_file(path) else "checkpoint"


def open_classifier(
    source: Source,
    *,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    provider: Provider = "cpu",
    threads: int | None = None,
    timeout_s: float = 30.0,
    detector: Detector | None = None,
    images: Path | None = None,
    trust: Trust = ANYONE,
    second_look: bool = False,
) -> Classifier:
    """Open a bundle, an ONNX file, a model repository, a server or a checkpoint as a classifier.

    Call it with an image, or a list of them. One of a server has connections: `close` it, or use it in a
    ``with`` block.

    Args:
        source: Which; a classifier is given back as it is.
        classes: Class list of a checkpoint; all others have their own.
        model: Architecture of a checkpoint that does not say; or served model, where a server has several.
        image_size: Side of the input of a checkpoint, instead of its configuration's.
        device: Of a bundle or checkpoint: 'auto', 'cpu' or 'cuda'.
        provider: Of an ONNX file or a repository: 'cpu', 'cuda' or 'tensorrt'.
        threads: Of both, for one operator; all usable CPUs when None.
        timeout_s: For one request to a server, retries included.
        detector: A test-time detector of a checkpoint, whose score is its alarm.
        images: Clean labelled images, which tell GELU from QuickGELU where a checkpoint does not say.
        trust: What a path has to show; only bundles and repositories can show anything.
        second_look: Look again at suspicious images; not with a checkpoint. Repositories and servers that
            were exported with it do so anyway; a server that was not is refused.

    Raises:
        BundleError: The bundle is damaged.
        RepositoryError: The repository is damaged.
        CheckpointError: The checkpoint cannot be used.
        ConfigError: An ONNX file that `export` did not write, a checkpoint without a class list, or a device
            or provider that is not there.
        ExportError: A golden answer of the repository is wrong.
        ServingError: The server does not answer.
        TrustError: It is not the trusted one, or can show nothing.
    """
    kind = kind_of(source)
    if second_look and kind == "checkpoint":
        raise ConfigError(
            expected="a bundle, an ONNX file, a model repository or a server to look twice with",
            got=f"{source}, a checkpoint",
            fix="Leave the second look away.",
        )
    if isinstance(source, Classifier | Bundle) or kind in ("bundle", "repository", "onnx"):
        opened = _opened_here(source, kind, device=device, provider=provider, threads=threads, trust=trust)
        if not second_look and (opened is source or not opened.looks_twice):
            return opened
        from cbpt_runtime.classification.classifier import SecondLook

        return SecondLook(opened)
    refuse_untrusted(source, trust)
    if kind == "url":
        from cbpt_runtime.serving.client.classifier import RemoteClassifier

        name = None if model is None else str(model)
        remote = RemoteClassifier(str(source), model=name, timeout_s=timeout_s)
        if second_look and not remote.looks_twice:
            remote.close()
            raise ConfigError(
                expected="a server that looks twice",
                got=f"{source}, which serves a repository exported without a second look",
                fix="Export with --second-look and serve that, or leave the second look away.",
            )
        return remote
    if classes is None:
        raise ConfigError(
            expected="a bundle folder, a model repository, an ONNX file, a URL, or a checkpoint with classes",
            got=f"{source} and no class list",
            fix="Give the folder that `cbpt-runtime purify --output` wrote, or a class list with --classes.",
        )
    from cbpt_runtime.classification.checkpoint import load_checkpoint_classifier

    return load_checkpoint_classifier(
        source,
        classes,
        model=model,
        image_size=image_size,
        device=device,
        detector=detector,
        images=images,
    )


def _opened_here(
    source: Source, kind: Kind, *, device: str, provider: Provider, threads: int | None, trust: Trust
) -> Classifier:
    """Return a bundle, a repository or an ONNX file as a classifier; one that is open stays as it is."""
    if isinstance(source, Classifier):
        return source
    if kind == "bundle" and not isinstance(source, Bundle):
        source = open_bundle(source, trust, verify=False)  # the files used are checked as they are read
    if isinstance(source, Bundle):
        from cbpt_runtime.classification.bundled import BundleClassifier

        return BundleClassifier.from_bundle(source, device)
    from cbpt_runtime.export.classifier import GraphClassifier, RepositoryClassifier

    if kind == "repository":
        return RepositoryClassifier(Path(source), provider=provider, threads=threads, trust=trust)
    refuse_untrusted(source, trust)
    return GraphClassifier(Path(source), provider=provider, threads=threads)


def inspect_path(
    source: str | Path,
    *,
    model: str | Path | None = None,
    image_size: int | None = None,
    classes: str | Path | None = None,
    templates: Sequence[str] | None = None,
    trust: Trust = ANYONE,
) -> dict[str, Any]:
    """Describe a checkpoint or a bundle as a JSON-able dict.

    Args:
        source: Path of either, or a pretrained tag or ``hf-hub:`` id.
        model: open_clip architecture or config file, for checkpoints that do not say.
        image_size: Side of the input of a checkpoint, instead of its configuration's.
        classes: A class list, whose prompts are then looked at through the text tower of a checkpoint.
        templates: Of the classes without their own, as for purification.
        trust: What a bundle has to show.

    Raises:
        BundleError: The bundle is damaged; the text names the file.
        CheckpointError: The checkpoint cannot be read.
        ConfigError: Classes for a bundle, which has its own, or templates without classes.
        TrustError: The bundle is not the trusted one, or it is a checkpoint that can show nothing.
    """
    if templates is not None and classes is None:
        raise ConfigError(
            expected="templates for classes",
            got="templates alone",
            fix="Name the class list, too: --classes.",
        )
    if is_file(Path(source) / MANIFEST):
        if classes is not None:
            raise ConfigError(
                expected="a class list for a checkpoint",
                got=f"one for the bundle {source}, which has its own",
                fix="Leave --classes away; what was found of its prompts is in the bundle.",
            )
        return inspect_bundle(Path(source), trust)
    refuse_untrusted(source, trust)
    from cbpt_runtime.models.inspection import inspect_checkpoint, inspect_prompts

    if classes is None:
        return inspect_checkpoint(source, model=model, image_size=image_size)
    return inspect_prompts(source, classes, model=model, image_size=image_size, templates=templates)


def inspect_bundle(path: Path, trust: Trust = ANYONE) -> dict[str, Any]:
    """Describe a bundle after hashing every file of it.

    Raises:
        BundleError: A file is missing, changed or contradicts the manifest; the text names it.
        TrustError: It is not the trusted one.
    """
    bundle = open_bundle(path, trust)
    origin, making = bundle.origin, bundle.making
    return {
        "kind": "bundle",
        "path": str(path),
        "digest": bundle.digest,
        "signature": _signature(path, trust),
        "verdict": bundle.verdict,
        "suspects": [suspect.name for suspect in bundle.suspects],
        "classes": len(bundle.class_names),
        "embed_dim": bundle.class_embeddings.shape[1],
        "image_size": list(bundle.preprocess.image_size),
        "checkpoint": origin.source,
        "checkpoint_sha256": origin.sha256,
        "method": making.method,
        "parameterization": making.parameterization,
        "encoder": making.encoder,
        "seed": making.seed,
        "size_bytes": sum(file.size_bytes or 0 for file in bundle.files.values()),
        "verified": sorted(bundle.files),
        "prompts": None if bundle.prompts is None else bundle.prompts.to_dict(),
        "anomalies": [f"a file the manifest does not know: {name}" for name in bundle.unlisted()],
    }


def _signature(path: Path, trust: Trust) -> str:
    if trust.key is not None:
        return f"good, by the signer that {trust.key} names"
    return "there, not checked: --trust names a key" if (path / SIGNATURE).is_file() else "none"


@contextmanager
def open_classifiers(
    sources: Sequence[Source],
    *,
    classes: ClassList | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    provider: Provider = "cpu",
    detector: Detector | None = None,
    trust: Trust = ANYONE,
    images: Path | None = None,
    second_look: bool = False,
) -> Iterator[list[Classifier]]:
    """Open classifiers that share one class list; servers are left again after the block.

    Args:
        sources: As for `open_classifier`; every file of a bundle is hashed.
        classes: Class list of the checkpoints; that of the first bundle if None.
        model: Architecture of checkpoints that do not say; or served model, where a server has several.
        image_size: Side of the input of checkpoints, instead of their configuration's.
        device: Of bundles and checkpoints: 'auto', 'cpu' or 'cuda'.
        provider: Of ONNX files and repositories: 'cpu', 'cuda' or 'tensorrt'.
        detector: A test-time detector for the checkpoints.
        trust: What every source given by its path has to show.
        second_look: Bundles, ONNX files and repositories look again at suspicious images.
        images: Clean labelled images, which tell GELU from QuickGELU where a checkpoint does not say.

    Raises:
        ClassListError: The class lists differ.
        ConfigError: A detector without a checkpoint.
        CbptError: As of `open_classifier`.
    """
    found = [_read_if_bundle(source, trust) for source in sources]
    if classes is None:
        classes = next((_class_list(item) for item in found if isinstance(item, Bundle)), None)
    if detector is not None and all(kind_of(item) != "checkpoint" for item in found):
        raise ConfigError(
            expected=f"the suspect checkpoint, whose text tower {detector} needs",
            got="none; bundles and what is exported of them hold no text tower",
            fix="Give the checkpoint, too (with a bundle beside it the two are compared).",
        )
    with ExitStack() as stack:
        opened: list[Classifier] = []
        for item in found:
            classifier = open_classifier(
                item,
                classes=classes,
                model=model,
                image_size=image_size,
                device=device,
                provider=provider,
                detector=detector,
                images=images,
                trust=trust,
                second_look=second_look and kind_of(item) in ("bundle", "onnx", "repository"),
            )
            if not isinstance(item, Classifier):
                stack.enter_context(classifier)
            opened.append(classifier)
            names = opened[0].class_names if classes is None else classes.names
            if classifier.class_names != names:
                raise ClassListError(
                    expected="one class list for everything in a table",
                    got=f"other classes in {classifier.source}",
                    fix="Evaluate what has different classes one by one.",
                )
        yield opened


def _read_if_bundle(source: Source, trust: Trust) -> Source:
    if isinstance(source, str | Path) and kind_of(source) == "bundle":
        return open_bundle(source, trust)
    return source


def _class_list(bundle: Bundle) -> ClassList:
    return ClassList(
        names=bundle.class_names,
        templates=bundle.templates,
        folders=bundle.class_folders,
    )
