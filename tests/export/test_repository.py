"""The repository: complete, hashed, self-contained, and there only if everything went well."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from cbpt_runtime.bundle import HEAD, Bundle
from cbpt_runtime.errors import BundleError, ConfigError, ExportError, ImageDataError, OutputError
from cbpt_runtime.export import repository as module
from cbpt_runtime.export.golden import read_golden
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.export.repository import Exported, export_bundle
from cbpt_runtime.export.triton import parse_config
from cbpt_runtime.runtime.preprocess import decode_image

CLASSIFIER = """\
# Written by cbpt-runtime; `cbpt-runtime verify` checks it.
name: "shapes_classifier"
version_policy {
  latest {
    num_versions: 1
  }
}
max_batch_size: 8
input {
  name: "images"
  data_type: TYPE_UINT8
  dims: 32
  dims: 32
  dims: 3
}
output {
  name: "logits"
  data_type: TYPE_FP32
  dims: 3
  label_filename: "labels.txt"
}
output {
  name: "probabilities"
  data_type: TYPE_FP32
  dims: 3
  label_filename: "labels.txt"
}
output {
  name: "alarm"
  data_type: TYPE_FP32
  dims: 1
  reshape {
  }
}
output {
  name: "alarm_target"
  data_type: TYPE_INT64
  dims: 1
  reshape {
  }
}
instance_group {
  count: 1
  kind: KIND_CPU
}
default_model_filename: "model.onnx"
dynamic_batching {
  default_queue_policy {
    default_timeout_microseconds: 2000000
    max_queue_size: 256
  }
}
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def config(repository: Exported, path: str):
    return parse_config((repository.path / path).read_text())


def test_the_layout_is_the_documented_one(tiny_repository: Exported) -> None:
    assert names(tiny_repository.path) == [
        "manifest.json", "mlbom.cdx.json", "parity.json", "shapes", "shapes_alarm", "shapes_classifier",
        "shapes_preprocess", "verdict.intoto.json",
    ]  # fmt: skip
    assert names(tiny_repository.path / "shapes_classifier" / "configs") == [
        "cpu.pbtxt",
        "cuda.pbtxt",
        "python.pbtxt",
        "tensorrt.pbtxt",
    ]


def test_the_manifest_covers_every_other_file(tiny_repository: Exported) -> None:
    manifest = json.loads((tiny_repository.path / "manifest.json").read_text())
    files = {
        p.relative_to(tiny_repository.path).as_posix() for p in tiny_repository.path.rglob("*") if p.is_file()
    }
    assert set(manifest["files"]) == files - {"manifest.json"}


def test_the_papers_say_what_was_exported_and_what_the_gate_saw(
    tiny_repository: Exported, tiny_bundle: Bundle, check_statement, check_bom
) -> None:
    manifest = json.loads((tiny_repository.path / "manifest.json").read_text())
    predicate = check_statement((tiny_repository.path / "verdict.intoto.json").read_text())
    assert predicate["verdict"] == "backdoored"
    assert predicate["bundle"]["digest"]["sha256"] == tiny_bundle.digest
    parity = json.loads((tiny_repository.path / "parity.json").read_text())
    assert predicate["export"] == {"profile": manifest["profile"], "parity": parity}
    (graph,) = predicate["products"]
    assert graph["digest"]["sha256"] == manifest["files"][graph["name"]]["sha256"]
    bom = check_bom((tiny_repository.path / "mlbom.cdx.json").read_text())
    assert bom["metadata"]["component"]["name"] == "shapes"


def test_the_classifier_configuration_is_the_golden_one(tiny_repository: Exported) -> None:
    text = (tiny_repository.path / "shapes_classifier" / "config.pbtxt").read_text()
    assert text.startswith(CLASSIFIER)


def test_every_configuration_is_complete(tiny_repository: Exported) -> None:
    for path in tiny_repository.path.rglob("*.pbtxt"):
        parsed = parse_config(path.read_text())
        assert parsed.max_batch_size == 8
        assert parsed.input
        assert len(parsed.output) in (1, 4)  # the preprocessing has one
        assert parsed.platform == "ensemble" or (parsed.backend and parsed.instance_group[0].count >= 1)
        assert parsed.parameters["bundle_digest"].string_value
        if parsed.backend:
            assert parsed.dynamic_batching.default_queue_policy.max_queue_size == 256
            assert not parsed.dynamic_batching.preferred_batch_size
            assert parsed.model_warmup or parsed.name == "shapes_alarm"  # a warm-up would be counted


def test_the_ensemble_wires_decoder_classifier_and_counter(tiny_repository: Exported) -> None:
    steps = config(tiny_repository, "shapes/config.pbtxt").ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["shapes_preprocess", "shapes_classifier", "shapes_alarm"]
    decode, classify, count = steps
    assert decode.output_map["images"] == classify.input_map["images"]
    for name in ("logits", "probabilities", "alarm", "alarm_target"):  # whatever is asked for is counted
        assert classify.output_map[name] == count.input_map[name] != name
        assert count.output_map[name] == name


def test_targets_differ_where_they_should(tiny_repository: Exported) -> None:
    folder = "shapes_classifier/configs"
    tensorrt = config(tiny_repository, f"{folder}/tensorrt.pbtxt")
    accelerator = tensorrt.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["trt_profile_max_shapes"] == "images:8x32x32x3"
    assert accelerator.parameters["trt_engine_cache_enable"] == "true"
    cuda = config(tiny_repository, f"{folder}/cuda.pbtxt")
    assert cuda.instance_group[0].kind == cuda.instance_group[0].KIND_GPU
    cpu = config(tiny_repository, f"{folder}/cpu.pbtxt")
    assert int(cpu.parameters["intra_op_thread_count"].string_value) >= 1
    assert cpu.parameters["inter_op_thread_count"].string_value == "1"
    assert config(tiny_repository, f"{folder}/python.pbtxt").backend == "python"


def test_the_warm_up_file_is_a_counted_image(tiny_repository: Exported) -> None:
    content = (tiny_repository.path / "shapes_preprocess" / "warmup" / "image").read_bytes()
    assert int.from_bytes(content[:4], "little") == len(content) - 4
    assert content[4:].startswith(b"\x89PNG")


def test_labels_are_the_classes_in_order(tiny_repository: Exported, tiny_bundle: Bundle) -> None:
    lines = (tiny_repository.path / "shapes_classifier" / "labels.txt").read_text().splitlines()
    assert lines == list(tiny_bundle.class_names)


def test_the_golden_answers_are_those_of_pytorch(tiny_repository: Exported, tiny_export) -> None:
    folder = tiny_repository.path / "shapes" / "1" / "golden"
    rows = json.loads((folder / "answers.json").read_text())["images"]
    pixels = tiny_export.classifier.read([folder / row["file"] for row in rows])
    prediction = tiny_export.classifier.predict(pixels)
    np.testing.assert_allclose([row["probabilities"] for row in rows], prediction.probabilities, atol=1e-4)
    np.testing.assert_allclose([row["alarm"] for row in rows], prediction.alarm, atol=1e-4)


def test_the_python_models_import_nothing_but_what_travels_with_them(tiny_repository: Exported) -> None:
    code = """
import json, sys
for name in ("cbpt_runtime", "torch", "open_clip", "safetensors", "typer", "jaxtyping", "onnx"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import model
print(sys.modules["runtime"].__file__)
"""
    for name in ("shapes_preprocess", "shapes_classifier", "shapes_alarm"):
        folder = tiny_repository.path / name / "1"
        done = subprocess.run(
            [sys.executable, "-B", "-c", code, str(folder)],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(folder))


def test_a_failed_gate_writes_nothing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_export
) -> None:
    from dataclasses import replace

    original = module.measure_parity

    def failing(*args, **kwargs):
        parity = original(*args, **kwargs)
        worse = replace(parity.comparisons[0], largest_difference=0.5)
        return replace(parity, comparisons=(worse,))

    monkeypatch.setattr(module, "export_onnx", lambda *_: tiny_export.model)
    monkeypatch.setattr(module, "measure_parity", failing)
    with pytest.raises(ExportError, match=r"features at batch 1: largest difference 0\.5"):
        export_bundle(tiny_bundle, tmp_path / "repository", profile=Profile(max_batch=2))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_export
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "export_onnx", lambda *_: tiny_export.model)
    monkeypatch.setattr(module, "write_golden", full)
    with pytest.raises(OutputError, match="No space left"):
        export_bundle(tiny_bundle, tmp_path / "repository", profile=Profile(max_batch=2))
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_before_any_work(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="which exists"):
        export_bundle(tiny_bundle, tmp_path / "there")
    with pytest.raises(ConfigError, match="a model name"):
        export_bundle(tiny_bundle, tmp_path / "new", name="../evil")
    with pytest.raises(ConfigError, match="labelled images to measure fp16 and int8"):
        export_bundle(tiny_bundle, tmp_path / "new", profile=Profile(precision="int8"))
    with pytest.raises(ConfigError, match="int8 on a CPU"):
        export_bundle(tiny_bundle, tmp_path / "new", profile=Profile(precision="int8", provider="cuda"))
    with pytest.raises(ImageDataError):
        export_bundle(tiny_bundle, tmp_path / "new", calibration=tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_force_replaces_a_repository_and_nothing_else(
    tiny_bundle: Bundle, copied_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_export
) -> None:
    monkeypatch.setattr(module, "export_onnx", lambda *_: tiny_export.model)
    with pytest.raises(OutputError, match="replace the model repository there with --force"):
        export_bundle(tiny_bundle, copied_repository)
    done = export_bundle(
        tiny_bundle, copied_repository, name="other", profile=Profile(max_batch=2), force=True
    )
    assert json.loads((copied_repository / "manifest.json").read_text())["name"] == done.name == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "manifest.json").write_text("{}")
    for other in (home, tiny_bundle.path):
        with pytest.raises(OutputError, match="something else"):
            export_bundle(tiny_bundle, other, force=True)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="to be able to write"):
        export_bundle(tiny_bundle, tmp_path / "file" / "repository")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_golden_set_comes_from_the_bundle_and_is_resized_too(
    bundle_with_images: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_export
) -> None:
    monkeypatch.setattr(module, "export_onnx", lambda *_: tiny_export.model)
    done = export_bundle(bundle_with_images, tmp_path / "out", name="own", profile=Profile(max_batch=2))
    assert done.parity["images"] == "bundle"
    golden = read_golden(tmp_path / "out" / "own" / "1" / "golden")
    drawn, *own = (np.asarray(decode_image(file)) for file in golden.files)
    assert drawn.shape[0] > 32
    kept = bundle_with_images.images()
    assert kept is not None
    np.testing.assert_array_equal(np.stack(own), kept.heldout[:3])
    labels = [bundle_with_images.class_names[label] for label in kept.heldout_labels[:3]]
    assert [row["label"] for row in golden.answers["images"]][1:] == labels


def _reseal(bundle: Path, name: str, change) -> None:
    """Changes one file of a bundle and makes its manifest fit again, as an attacker would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    if name == "manifest.json":
        change(manifest)
    else:
        tensors = safetensors_numpy.load((bundle / name).read_bytes())
        change(tensors)
        data = safetensors_numpy.save(tensors)
        (bundle / name).write_bytes(data)
        manifest["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("manifest.json", lambda m: m["classes"]["names"].append("fourth"), "two finite float32 heads of 4"),
        (HEAD, lambda t: t["class_embeddings"].__setitem__((0, 0), np.nan), "class_embeddings holds NaN"),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, name: str, change, named: str
) -> None:
    damaged = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    _reseal(damaged, name, change)
    with pytest.raises(BundleError, match=named):
        export_bundle(damaged, tmp_path / "repository")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_damaged_bundle_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    content = bytearray((damaged / HEAD).read_bytes())
    content[-1] ^= 1
    (damaged / HEAD).write_bytes(content)
    with pytest.raises(BundleError, match="changed or damaged"):
        export_bundle(damaged, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
