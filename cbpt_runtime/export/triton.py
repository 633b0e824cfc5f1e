"""The four `config.pbtxt` of a repository, complete, written through Triton's own protobuf.

``<name>`` is an ensemble: ``<name>_preprocess`` (python backend) decodes and resizes image files,
``<name>_classifier`` runs the graph, ``<name>_alarm`` (python backend) counts alarms. Nothing is left to the
server's auto-completion.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from cbpt_runtime.export.cpus import usable_cpus
from cbpt_runtime.export.manifest import Manifest
from cbpt_runtime.export.onnx import INPUT
from cbpt_runtime.export.profiles import Profile
from cbpt_runtime.runtime.prediction import OUTPUTS

LABELS = "labels.txt"
WARMUP = "image"
MAX_DECODERS = 4
LOOKERS = 4  # images looked at again at once; what is not suspicious passes by in the other processes
COUNTED = ("alarm", "alarm_target")


def ensemble_config(manifest: Manifest, class_names: Sequence[str]) -> str:
    """Return the configuration of ``<name>``: image files in, answers out; whether it was looked at twice."""
    pb = _protobuf()
    config = _model(manifest, manifest.name)
    config.platform = "ensemble"
    config.input.add(name="image", data_type=pb.TYPE_STRING, dims=[1])
    _add_outputs(config, manifest)
    decode = config.ensemble_scheduling.step.add(model_name=manifest.preprocess_name, model_version=-1)
    decode.input_map["image"] = "image"
    decode.output_map[INPUT] = "pixels"
    classify = config.ensemble_scheduling.step.add(model_name=manifest.classifier_name, model_version=-1)
    classify.input_map[INPUT] = "pixels"
    for output in OUTPUTS:
        # Every output comes out of the step that counts: whatever a client asks for is counted. And no tensor
        # is both an output of the ensemble and the input of a step: Triton would miscount which steps a
        # client needs that asks for a few of the outputs, and answer with an error.
        classify.output_map[output] = f"uncounted_{output}"
    count = config.ensemble_scheduling.step.add(model_name=manifest.alarm_name, model_version=-1)
    for output in OUTPUTS:
        count.input_map[output] = f"uncounted_{output}"
        count.output_map[output] = output
    if manifest.profile.second_look:
        count.input_map[INPUT] = "pixels"
        for name in _add_second_look(config):
            count.output_map[name] = name
    _set(config, "class_names", json.dumps(class_names, ensure_ascii=False))
    _set_threshold(config, manifest)
    return _text(config)


def preprocess_config(manifest: Manifest) -> str:
    """Return the configuration of ``<name>_preprocess``: image files in, pixels out."""
    pb = _protobuf()
    profile, preprocess = manifest.profile, manifest.preprocess
    config = _model(manifest, manifest.preprocess_name)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.input.add(name="image", data_type=pb.TYPE_STRING, dims=[1])
    config.output.add(name=INPUT, data_type=pb.TYPE_UINT8, dims=[*preprocess.image_size, 3])
    decoders = profile.decoders or min(MAX_DECODERS, usable_cpus())
    config.instance_group.add(count=decoders, kind=pb.ModelInstanceGroup.KIND_CPU)
    _add_batching(config, profile)
    _set(config, "preprocess", json.dumps(preprocess.to_dict()))
    _set(config, "max_pixels", profile.max_pixels)
    _set(config, "max_image_bytes", profile.max_image_bytes)
    warmup = config.model_warmup.add(name="photo", batch_size=1)
    warmup.inputs["image"].data_type = pb.TYPE_STRING
    warmup.inputs["image"].dims.append(1)
    warmup.inputs["image"].input_data_file = WARMUP
    return _text(config)


def classifier_config(manifest: Manifest, *, backend: str = "onnxruntime") -> str:
    """Return the configuration of ``<name>_classifier``: pixels in, answers out.

    Args:
        manifest: What is served, and how.
        backend: 'onnxruntime', or 'python' for servers that do not have it.
    """
    pb = _protobuf()
    profile = manifest.profile
    config = _model(manifest, manifest.classifier_name)
    config.backend = backend
    config.default_model_filename = "model.onnx" if backend == "onnxruntime" else "model.py"
    shape = [*manifest.preprocess.image_size, 3]
    config.input.add(name=INPUT, data_type=pb.TYPE_UINT8, dims=shape)
    _add_outputs(config, manifest, has_batch_shape=True)
    kind = pb.ModelInstanceGroup.KIND_CPU if profile.provider == "cpu" else pb.ModelInstanceGroup.KIND_GPU
    config.instance_group.add(count=profile.instances, kind=kind)
    _add_batching(config, profile)
    _set(config, "provider", profile.provider)
    _set(config, "intra_op_thread_count", profile.threads or max(1, usable_cpus() // profile.instances))
    _set(config, "inter_op_thread_count", 1)
    if backend == "onnxruntime":
        _set(config, "execution_mode", 0)
        _add_accelerator(config, manifest)
    for batch_size in sorted({1, profile.max_batch}):
        warmup = config.model_warmup.add(name=f"batch_{batch_size}", batch_size=batch_size)
        warmup.inputs[INPUT].data_type = pb.TYPE_UINT8
        warmup.inputs[INPUT].dims.extend(shape)
        warmup.inputs[INPUT].random_data = True
    return _text(config)


def alarm_config(manifest: Manifest, class_names: Sequence[str]) -> str:
    """Return the configuration of ``<name>_alarm``: answers pass, alarms are counted in Triton's metrics.

    A model of its own because the classifier's backend may be one that runs no code of ours; a single
    instance because it does next to nothing, unless it also asks the classifier for a second look.
    """
    pb = _protobuf()
    config = _model(manifest, manifest.alarm_name)
    config.backend = "python"
    config.default_model_filename = "model.py"
    _add_outputs(config, manifest)
    for output in config.output:
        config.input.add(name=output.name, data_type=output.data_type, dims=output.dims)
        output.label_filename = ""
    if manifest.profile.second_look:
        config.input.add(name=INPUT, data_type=pb.TYPE_UINT8, dims=[*manifest.preprocess.image_size, 3])
        _add_second_look(config)
        _set(config, "classifier", manifest.classifier_name)
        _set(config, "probabilities", "sigmoid" if manifest.sigmoid else "softmax")
    count = LOOKERS if manifest.profile.second_look else 1
    config.instance_group.add(count=count, kind=pb.ModelInstanceGroup.KIND_CPU)
    _add_batching(config, manifest.profile)
    _set(config, "counted_model", manifest.name)
    _set(config, "suspects", json.dumps({index: class_names[index] for index in manifest.suspects},
                                        ensure_ascii=False))  # fmt: skip
    _set_threshold(config, manifest)
    return _text(config)


def parse_config(text: str) -> Any:
    """Return the protobuf message of a `config.pbtxt`."""
    from google.protobuf import text_format

    return text_format.Parse(text, _protobuf().ModelConfig())


def _model(manifest: Manifest, name: str) -> Any:
    config = _protobuf().ModelConfig(name=name, max_batch_size=manifest.profile.max_batch)
    config.version_policy.latest.num_versions = 1
    for key, value in manifest.provenance.items():
        _set(config, key, value)
    return config


def _add_outputs(config: Any, manifest: Manifest, *, has_batch_shape: bool = False) -> None:
    """Add the outputs; the graph's alarm is one number per image, which Triton calls dims [1]."""
    pb = _protobuf()
    classes = manifest.classes
    for name in ("logits", "probabilities"):
        config.output.add(name=name, data_type=pb.TYPE_FP32, dims=[classes], label_filename=LABELS)
    for name, data_type in zip(COUNTED, (pb.TYPE_FP32, pb.TYPE_INT64), strict=True):
        output = config.output.add(name=name, data_type=data_type, dims=[1])
        if has_batch_shape:
            output.reshape.SetInParent()


def _add_second_look(config: Any) -> tuple[str, ...]:
    """Add what a second look says to the outputs."""
    pb = _protobuf()
    config.output.add(name="looked_twice", data_type=pb.TYPE_BOOL, dims=[1])
    config.output.add(name="box", data_type=pb.TYPE_INT64, dims=[4])
    _set(config, "second_look", "true")
    return "looked_twice", "box"


def _add_batching(config: Any, profile: Profile) -> None:
    policy = config.dynamic_batching.default_queue_policy
    config.dynamic_batching.max_queue_delay_microseconds = profile.max_queue_delay_us
    policy.timeout_action = _protobuf().ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = 1000 * profile.queue_timeout_ms
    policy.max_queue_size = profile.max_queue_size


def _add_accelerator(config: Any, manifest: Manifest) -> None:
    profile = manifest.profile
    if profile.provider == "cpu":
        return
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    if profile.provider == "cuda":
        accelerators.add(name="cuda").parameters["use_tf32"] = "0"
        return
    height, width = manifest.preprocess.image_size
    accelerator = accelerators.add(name="tensorrt")
    best = max(1, profile.max_batch // 2)
    settings = {
        "precision_mode": "FP16" if profile.precision == "fp16" else "FP32",
        "max_workspace_size_bytes": profile.tensorrt_workspace_bytes,
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": profile.tensorrt_cache,
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": profile.tensorrt_cache,
        "trt_layer_norm_fp32_fallback": "true",
        "trt_profile_min_shapes": f"{INPUT}:1x{height}x{width}x3",
        "trt_profile_opt_shapes": f"{INPUT}:{best}x{height}x{width}x3",
        "trt_profile_max_shapes": f"{INPUT}:{profile.max_batch}x{height}x{width}x3",
    }
    for key, value in settings.items():
        accelerator.parameters[key] = str(value)


def _set_threshold(config: Any, manifest: Manifest) -> None:
    if manifest.alarm_threshold is not None:
        _set(config, "alarm_threshold", manifest.alarm_threshold)


def _set(config: Any, name: str, value: object) -> None:
    config.parameters[name].string_value = str(value)


def _text(config: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config, use_index_order=False))


def _protobuf() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grpc's own
        from tritonclient.grpc import model_config_pb2

    return model_config_pb2
