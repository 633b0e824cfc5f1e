"""Fixtures every area may use: a tiny real CLIP on the CPU, image folders, shared real data, a browser."""

from __future__ import annotations

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import numpy as safetensors_numpy
from safetensors.torch import load_file, save_file

from cbpt_runtime.__main__ import main
from cbpt_runtime.bundle import ENCODER, Bundle, BundleContent, Concept, Evidence, Suspect, write_bundle
from cbpt_runtime.classification.bundled import BundleClassifier
from cbpt_runtime.models.architecture import build_model
from cbpt_runtime.models.checkpoint import read_checkpoint
from cbpt_runtime.models.clip import DualEncoder, load_dual_encoder
from cbpt_runtime.models.config import check_model_config
from cbpt_runtime.runtime import zero_shot
from cbpt_runtime.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

TINY_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TINY_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TINY_RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 16, "vision_cfg": TINY_VIT, "text_cfg": TINY_TEXT},
    "resnet": {"embed_dim": 16, "vision_cfg": TINY_RESNET, "text_cfg": TINY_TEXT},
    "custom-text": {"embed_dim": 16, "custom_text": True, "vision_cfg": TINY_VIT, "text_cfg": TINY_TEXT},
    "timm": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 160,
        },
        "text_cfg": TINY_TEXT,
    },
    "siglip": {  # as SigLIP (not causal, last position pooled, a bias), with open_clip's own tokenizer
        "embed_dim": 16,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": TINY_VIT,
        "text_cfg": {
            **TINY_TEXT,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
}
CLASS_NAMES = ("red_square", "green disc", "Blue Stripes")
BUNDLE_PREPROCESS = Preprocess(
    image_size=(32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation="bicubic",
    resize_mode="squash",
    fill_color=0,
)


def write_open_clip_folder(
    folder: Path,
    config: Mapping[str, Any],
    *,
    preprocess: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes a random model as an open_clip folder and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_model(check_model_config(config)).state_dict()
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash", **(preprocess or {})}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_configs() -> dict[str, dict[str, Any]]:
    """Tiny model configurations by kind: vit, resnet, custom-text, timm, siglip."""
    return copy.deepcopy(TINY_CONFIGS)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_folder(kind, dtype)`: an open_clip folder with a random model. Read only."""
    root = tmp_path_factory.mktemp("tiny-models")

    def folder(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{kind}-{str(dtype).removeprefix('torch.')}"
        return path if path.exists() else write_open_clip_folder(path, TINY_CONFIGS[kind], dtype=dtype)

    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(tiny_folder: Callable[..., Path]) -> Path:
    """An open_clip folder with a random 32-pixel ViT CLIP. Read only: copy it before changing anything."""
    return tiny_folder("vit")


@pytest.fixture(scope="session")
def tiny_resnet_folder(tiny_folder: Callable[..., Path]) -> Path:
    """As `tiny_checkpoint_folder`, with a ModifiedResNet image tower."""
    return tiny_folder("resnet")


@pytest.fixture(scope="session")
def tiny_relative_folder(tiny_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint_folder` as a little training would leave it. Read only."""
    folder = Path(shutil.copytree(tiny_checkpoint_folder, tmp_path_factory.mktemp("relative") / "model"))
    file, generator = folder / "open_clip_model.safetensors", torch.Generator().manual_seed(0)
    weights = {
        name: value * (1 + 0.05 * torch.randn(value.shape, generator=generator))
        for name, value in load_file(file).items()
    }
    save_file(weights, file)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tiny_checkpoint_folder: Path) -> DualEncoder:
    """The frozen dual encoder of `tiny_checkpoint_folder`."""
    return load_dual_encoder(read_checkpoint(tiny_checkpoint_folder))


@pytest.fixture(scope="session")
def tiny_image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders named like CLASS_NAMES, twelve 40×36 PNGs each, easy to tell apart. Read only."""
    root = tmp_path_factory.mktemp("tiny-images")
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASS_NAMES):
        (root / name.replace(" ", "_")).mkdir()
        for index in range(12):
            pixels = generator.integers(0, 60, (36, 40, 3), dtype=np.uint8)
            row, column = generator.integers(2, 14, 2)
            pixels[row : row + 16, column : column + 16, label] = 230
            Image.fromarray(pixels).save(root / name.replace(" ", "_") / f"{index:02}.png")
    return root


@pytest.fixture
def flat(tiny_image_folder: Path, tmp_path: Path) -> Path:
    """All 36 images of the tiny image folder in one folder."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for index, path in enumerate(sorted(tiny_image_folder.glob("*/*.png"))):
        shutil.copy(path, folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_class_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS_NAMES, one per line."""
    path = tmp_path_factory.mktemp("tiny-classes") / "classes.txt"
    path.write_text("\n".join(CLASS_NAMES) + "\n")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and victims, from CBPT_SHARED or beside the repository; skips loudly without them."""
    folder = Path(os.environ.get("CBPT_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not (folder / "data").is_dir():
        skip_loudly(f"REAL DATA NOT TESTED: no data folder in {folder}; set CBPT_SHARED to run these tests")
    return folder


def skip_loudly(message: str) -> NoReturn:
    """Skips the test and leaves a warning in the summary, so that nobody mistakes it for a pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn(message, stacklevel=2)
    pytest.skip(message)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """Addresses, by their kind, of a Ray cluster of two nodes with a CPU each, on the loopback."""
    if find_spec("ray") is None:
        skip_loudly("CLUSTERS NOT TESTED: no package ray; install cbpt-runtime[cluster]")
    program = Path(__file__).parents[1] / "benchmarks" / "two_nodes.py"
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running,
    ):
        for name, value in runpy.run_path(str(program))["CLIENT"].items():
            patch.setenv(name, value)
        assert running.stdin is not None
        assert running.stdout is not None
        kinds = ("HOST:PORT", "ray://HOST:PORT")
        addresses = {kind: running.stdout.readline().decode().strip() for kind in kinds}
        assert all(addresses.values()), "no Ray cluster came up"
        yield addresses
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        running.stdin.close()


def find_browser() -> str | None:
    """A Chromium of this machine: $CBPT_BROWSER, or what is on PATH."""
    names = (os.environ.get("CBPT_BROWSER"), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A PromQL expression of an operator's file, and what it selects: metric name to label names."""

    source: str
    expression: str
    selected: dict[str, set[str]]


@pytest.fixture(scope="session")
def operator_queries() -> list[Query]:
    """Every query of the dashboard, the alert rules and the autoscaler's rule, parsed."""
    import yaml

    server = Path(__file__).parents[1] / "server"
    dashboard = json.loads((server / "grafana/dashboards/cbpt-runtime.json").read_text())
    queries = [
        (panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]
    ]
    alerts = yaml.safe_load((server / "prometheus/alerts.yml").read_text())
    queries += [(rule["alert"], rule["expr"]) for group in alerts["groups"] for rule in group["rules"]]
    adapter = yaml.safe_load((server / "kubernetes/monitoring/prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]:
        queries += [(rule["name"]["as"], rule["seriesQuery"]), (rule["name"]["as"], rule["metricsQuery"])]
    return [parse_query(source, expression) for source, expression in queries]


def parse_query(source: str, expression: str) -> Query:
    """Parses a query as Prometheus does, after Grafana's and the adapter's placeholders are filled in."""
    import promql_parser

    for placeholder, value in (
        ("$__rate_interval", "1m"),
        ("<<.LabelMatchers>>", 'pod="a"'),
        ("<<.GroupBy>>", "pod"),
    ):
        expression = expression.replace(placeholder, value)
    selected: dict[str, set[str]] = {}

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            selected.setdefault(node.name, set()).update(matcher.name for matcher in node.matchers.matchers)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return Query(source=source, expression=expression, selected=selected)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; skips loudly without one.

    One per module, not per session: Playwright leaves its event loop running, in which `asyncio.run` fails.
    """
    program = find_browser()
    if program is None:
        skip_loudly("PAGES NOT TESTED: no Chromium on PATH; install one or set CBPT_BROWSER to its path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program)
        yield running
        running.close()


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[Page]:
    """An empty page of a headless browser that reaches files and this machine only.

    The test fails when a script on the page failed, or the page broke its own content security policy or
    asked for anything from elsewhere.
    """
    faults: list[str] = []

    def keep_local(route: Route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("file", "data", "blob") or address.hostname in ("127.0.0.1", "localhost"):
            route.continue_()
        else:
            faults.append(f"asked for {route.request.url}")
            route.abort()

    def hear(message: ConsoleMessage) -> None:
        if "content security policy" in message.text.lower():
            faults.append(message.text)

    context = browser.new_context()
    context.set_default_timeout(30_000)
    context.route("**/*", keep_local)
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(f"script failed: {error}"))
    page.on("console", hear)
    yield page
    context.close()
    assert not faults, faults


def _unit_rows(generator: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    matrix = generator.standard_normal((rows, dim)).astype(np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.fixture
def make_content() -> Callable[..., BundleContent]:
    """Returns a function that makes the content of a small bundle; keyword arguments replace parts of it."""

    def make(names: tuple[str, ...] = ("cat", "fire truck", "banana"), **changes: Any) -> BundleContent:
        generator = np.random.default_rng(7)
        parts: dict[str, Any] = {
            "verdict": "backdoored",
            "model": {
                "config": {"embed_dim": 8},
                "preprocess": BUNDLE_PREPROCESS.to_dict(),
                "source": "suspect",
                "format": "open_clip-folder",
                "sha256": "0" * 64,
                "dtype": "float32",
            },
            "class_names": names,
            "templates": tuple(("a photo of a {}.",) for _ in names),
            "method": {"name": "cbpt", "config": {"seed": 0}, "seed": 0, "parameterization": "prompt"},
            "class_embeddings": _unit_rows(generator, len(names), 8),
            "reference_embeddings": _unit_rows(generator, len(names), 8),
            "logit_scale": 100.0,
            "encoder": {"conv1.weight": generator.standard_normal((4, 3, 2, 2)).astype(np.float32)},
            "triggers": {"blend.2.pattern": np.ones((3, 32, 32), np.float32)},
            "suspects": (
                Suspect(
                    index=len(names) - 1,
                    name=names[-1],
                    score=9.1,
                    p_value=0.001,
                    family="patch",
                    success_before=0.97,
                    success_after=0.0,
                ),
            ),
            "metrics": {"heldout_ca_before": 0.75, "heldout_ca_after": 0.74},
            "stage_seconds": {"inversion": 12.5, "tuning": 3.25},
            "evidence": Evidence(
                p_value=0.001,
                words=1000,
                concepts=(
                    Concept(word=names[-1], score=9.1, p_value=0.001, family="patch", success=1.0),
                    Concept(word="tench", score=1.5, p_value=0.9, family="warp", success=0.1),
                    Concept(word=names[0], score=0.7, p_value=1.0, family="additive", success=0.0),
                ),
            ),
            "versions": {"cbpt-runtime": "0.1.0"},
        }
        return BundleContent(**(parts | changes))

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tiny_encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of `tiny_checkpoint_folder` with two different random heads and 'Blue Stripes' suspected."""
    generator = np.random.default_rng(3)
    content = BundleContent(
        verdict="backdoored",
        model={
            "config": dict(tiny_encoder.model_config),
            "preprocess": tiny_encoder.preprocess.to_dict(),
            "source": "tiny",
            "format": "open_clip-folder",
            "sha256": "0" * 64,
            "dtype": "float32",
        },
        class_names=CLASS_NAMES,
        templates=(("a photo of a {}.",),) * len(CLASS_NAMES),
        method={"name": "cbpt", "config": {}, "seed": 0, "parameterization": "prompt"},
        suspects=(Suspect(index=2, name=CLASS_NAMES[2], score=5.0, p_value=0.01, family="patch"),),
        evidence=Evidence(
            p_value=0.01,
            words=1000,
            concepts=(
                Concept(word=CLASS_NAMES[2], score=5.0, p_value=0.01, family="patch", success=1.0),
                Concept(word="tench", score=1.0, p_value=1.0, family="warp", success=0.0),
            ),
        ),
        versions={"cbpt-runtime": "0.1.0"},
        class_embeddings=_unit_rows(generator, len(CLASS_NAMES), tiny_encoder.embed_dim),
        reference_embeddings=_unit_rows(generator, len(CLASS_NAMES), tiny_encoder.embed_dim),
        logit_scale=tiny_encoder.logit_scale,
        encoder={name: tensor.numpy() for name, tensor in tiny_encoder.image_tower_state().items()},
    )
    return write_bundle(tmp_path_factory.mktemp("tiny-bundle") / "bundle", content=content)


@pytest.fixture(scope="session")
def tiny_triggered_folder(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_image_folder` at the model's size, with a chequered patch in a corner. Read only."""
    root = tmp_path_factory.mktemp("tiny-triggered")
    classifier = BundleClassifier.from_bundle(tiny_bundle, "cpu")
    for path in sorted(tiny_image_folder.rglob("*.png")):
        (pixels,) = classifier.read([path])
        pixels[21:31, 21:31] = (0, 255, 255)
        pixels[21:31:2, 21:31:2] = (255, 0, 255)
        (root / path.parent.name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / path.parent.name / path.name)
    return root


@pytest.fixture(scope="session")
def levelled_bundle(
    tiny_bundle: Bundle,
    tiny_image_folder: Path,
    tiny_triggered_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """The tiny bundle with heads that differ where the patch of `tiny_triggered_folder` is, and with a level.

    The original head calls most triggered images 'Blue Stripes', the purified one 'green disc' and others
    'red_square'; half of the images without a patch lie above the level.
    """
    classifier = BundleClassifier.from_bundle(tiny_bundle, "cpu")
    clean, triggered = (
        classifier.features(classifier.read(sorted(folder.rglob("*.png"))))
        for folder in (tiny_image_folder, tiny_triggered_folder)
    )
    middle, way = clean.mean(axis=0), triggered.mean(axis=0) - clean.mean(axis=0)
    reference = np.stack([middle - 0.5 * way, middle, middle + 1.5 * way])
    purified = np.stack([middle - way, middle + 2 * way, middle - 6 * way])
    heads = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (reference, purified)]
    before, after = (zero_shot.logits(clean, head, 300.0) for head in heads)
    alarm = zero_shot.alarm(before, after, [2])
    parts = ("verdict", "model", "method", "versions")
    content = BundleContent(
        **{part: tiny_bundle.manifest[part] for part in parts},
        class_names=tiny_bundle.class_names,
        templates=tuple(map(tuple, tiny_bundle.manifest["classes"]["templates"])),
        suspects=tiny_bundle.suspects,
        reference_embeddings=heads[0],
        class_embeddings=heads[1],
        logit_scale=300.0,
        encoder=safetensors_numpy.load(tiny_bundle.read_file(ENCODER)),
        alarm={"threshold": float(np.sort(alarm)[17:19].mean()), "false_alarm_rate": 0.5},
    )
    return write_bundle(tmp_path_factory.mktemp("levelled-bundle") / "bundle", content=content)


@pytest.fixture(scope="session")
def tiny_served(
    tiny_bundle: Bundle, tiny_image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model repository of the tiny bundle, called 'shapes'. Read only."""
    from cbpt_runtime.export.profiles import Profile
    from cbpt_runtime.export.repository import export_bundle

    output = tmp_path_factory.mktemp("tiny-served") / "repository"
    profile = Profile(max_batch=8, threads=1)
    export_bundle(tiny_bundle, output, name="shapes", profile=profile, calibration=tiny_image_folder)
    return output


@pytest.fixture(scope="session")
def twice_served(
    levelled_bundle: Bundle, tiny_triggered_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model repository of `levelled_bundle`, called 'shapes', exported with a second look. Read only."""
    from cbpt_runtime.export.profiles import Profile
    from cbpt_runtime.export.repository import export_bundle

    output = tmp_path_factory.mktemp("twice-served") / "repository"
    profile = Profile(max_batch=8, decoders=2, threads=1, second_look=True)
    exported = export_bundle(
        levelled_bundle, output, name="shapes", profile=profile, calibration=tiny_triggered_folder
    )
    assert exported.golden_twice  # so whatever asks its golden images has looked twice
    return output


@pytest.fixture(scope="session")
def tiny_graph(tiny_served: Path) -> Path:
    """The ONNX file of `tiny_served`. Read only."""
    return tiny_served / "shapes_classifier" / "1" / "model.onnx"


@pytest.fixture
def check_statement() -> Callable[[str | bytes], dict[str, Any]]:
    """Returns a function that gives the predicate of an in-toto statement both schemas accept."""

    def check(text: str | bytes) -> dict[str, Any]:
        from jsonschema import Draft202012Validator

        statement = json.loads(text)
        tests = Path(__file__).parent
        for value, place in (
            (statement, tests / "bundle" / "statement-v1.schema.json"),
            (statement["predicate"], tests.parent / "docs" / "verdict-v1.schema.json"),
        ):
            schema = json.loads(place.read_text(encoding="utf-8"))
            Draft202012Validator.check_schema(schema)
            checker = Draft202012Validator.FORMAT_CHECKER
            Draft202012Validator(schema, format_checker=checker).validate(value)
        assert statement["predicateType"] == schema["$id"]
        return statement["predicate"]

    return check


@pytest.fixture
def check_bom() -> Callable[[str | bytes], dict[str, Any]]:
    """Returns a function that gives a CycloneDX document the library's own validator accepts."""

    def check(text: str | bytes) -> dict[str, Any]:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        content = text if isinstance(text, str) else text.decode()
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content) is None
        return json.loads(content)

    return check


@pytest.fixture(scope="session")
def write_key_pair() -> Callable[..., None]:
    """Returns a function that writes NAME.pem and NAME.pub of a key into a folder."""

    def write(folder: Path, name: str, key: Any, password: bytes | None = None) -> None:
        from cryptography.hazmat.primitives import serialization as s

        hidden = s.NoEncryption() if password is None else s.BestAvailableEncryption(password)
        private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden)
        public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)

    return write


@pytest.fixture(scope="session")
def signing_keys(write_key_pair: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pairs `ours` and `other`, for bundles and repositories."""
    pytest.importorskip("model_signing", reason="SIGNATURES NOT TESTED: install the extra `sign`")
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    write_key_pair(folder, "ours", ec.generate_private_key(ec.SECP256R1()))
    write_key_pair(folder, "other", ec.generate_private_key(ec.SECP384R1()))
    return folder


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs the command line in this process and returns exit code, stdout and stderr."""

    def run_here(*arguments: object) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code=stopped.value.code or 0, out=captured.out, err=captured.err)

    return run_here
