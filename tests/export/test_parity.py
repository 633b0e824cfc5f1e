"""The gate: a faithful graph passes, every mutation is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cbpt_runtime.errors import ConfigError, ExportError
from cbpt_runtime.export.parity import _quieter, measure_parity
from cbpt_runtime.export.session import open_session, usable_cpus
from cbpt_runtime.runtime import zero_shot

Mutation = Callable[[onnx.ModelProto], None]


def rewire(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def flip_channels(model: onnx.ModelProto) -> None:
    order = numpy_helper.from_array(np.array([2, 1, 0]), "order")
    model.graph.initializer.append(order)
    rewire(model, "images", "flipped")
    model.graph.node.insert(0, helper.make_node("Gather", ["images", "order"], ["flipped"], axis=3))


def drop_normalisation(model: onnx.ModelProto) -> None:
    subtraction = next(node for node in model.graph.node if node.op_type == "Sub")
    division = next(node for node in model.graph.node if subtraction.output[0] in node.input)
    assert division.op_type in ("Div", "Mul")
    rewire(model, division.output[0], subtraction.input[0])
    model.graph.node.remove(division)
    model.graph.node.remove(subtraction)


def swap_two_classes(model: onnx.ModelProto) -> None:
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "class_embeddings")
    values = numpy_helper.to_array(head).copy()
    values[:, [0, 1]] = values[:, [1, 0]]
    head.CopyFrom(numpy_helper.from_array(values, head.name))


def drop_reference_head(model: onnx.ModelProto) -> None:
    rewire(model, "reference_embeddings", "class_embeddings")


def name_another_target(model: onnx.ModelProto) -> None:
    """The alarm speaks of class 0, which nobody suspects."""
    maker = next(node for node in model.graph.node if "alarm_target" in node.output)
    maker.output[0] = "honest"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "zero"))
    model.graph.node.append(helper.make_node("Mul", ["honest", "zero"], ["alarm_target"]))


def fix_batch(model: onnx.ModelProto) -> None:
    """As an exporter that bakes the example's batch size into a reshape."""
    shape = numpy_helper.from_array(np.array([2, 32, 32, 3]), "baked")
    model.graph.initializer.append(shape)
    rewire(model, "images", "reshaped")
    model.graph.node.insert(0, helper.make_node("Reshape", ["images", "baked"], ["reshaped"]))


def test_a_faithful_graph_passes_at_every_batch_size(tiny_export) -> None:
    parity = measure_parity(tiny_export.model, tiny_export.classifier, tiny_export.images, max_batch=8)
    parity.require()
    assert {row.batch_size for row in parity.comparisons} == {1, 3, 8}
    assert {row.quantity for row in parity.comparisons} == {
        "features", "class cosines", "probabilities", "alarm", "alarm target", "arg-max",
    }  # fmt: skip
    assert parity.provider == "CPUExecutionProvider"
    assert parity.to_dict()["passed"] is True


@pytest.mark.parametrize(
    ("mutate", "named"),
    [
        (flip_channels, "features at batch 1: largest difference"),
        (drop_normalisation, "features at batch 1: largest difference"),
        (swap_two_classes, "class cosines at batch 1: largest difference"),
        (drop_reference_head, "alarm at batch 1: largest difference"),
        (name_another_target, "alarm target at batch 1: largest difference"),
        (fix_batch, "runs at batch size"),
    ],
)
def test_every_mutation_is_caught_and_named(mutate: Mutation, named: str, tiny_export) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(tiny_export.model)
    mutate(model)
    with pytest.raises(ExportError, match=named):
        measure_parity(model, tiny_export.classifier, tiny_export.images, max_batch=4).require()


def test_the_failure_names_quantity_difference_and_tolerance(tiny_export) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(tiny_export.model)
    swap_two_classes(model)
    parity = measure_parity(model, tiny_export.classifier, tiny_export.images, max_batch=4)
    with pytest.raises(
        ExportError, match=r"probabilities at batch 3: largest difference 0\.\d+, tolerance 0\.0001"
    ):
        parity.require()


def test_nan_does_not_pass(tiny_export) -> None:
    parity = measure_parity(tiny_export.model, tiny_export.classifier, tiny_export.images, max_batch=1)
    broken = replace(parity.comparisons[0], largest_difference=float("nan"))
    assert not replace(parity, comparisons=(broken,)).passed
    assert replace(parity, comparisons=(broken,)).to_dict()["comparisons"][0]["largest_difference"] is None


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error_and_no_fallback(provider, tiny_export) -> None:
    import onnxruntime

    if provider == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    if provider == "tensorrt" and "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError, match=r"an onnxruntime that runs on .*CPUExecutionProvider"):
        measure_parity(
            tiny_export.model, tiny_export.classifier, tiny_export.images, max_batch=1, provider=provider
        )


def test_a_file_that_is_no_graph_is_an_error() -> None:
    with pytest.raises(ExportError, match="a graph onnxruntime can open"):
        open_session(b"not a graph")


def test_at_least_one_cpu_is_usable() -> None:
    assert usable_cpus() >= 1


def test_of_two_suspects_the_louder_one_must_be_named(tiny_export) -> None:
    suspects = [{"index": index, "name": f"class {index}"} for index in (0, 2)]
    manifest = tiny_export.bundle.manifest | {"suspects": suspects}
    bundle = replace(tiny_export.bundle, manifest=manifest)
    expected = tiny_export.classifier.predict(tiny_export.images.pixels[:4])
    each = [zero_shot.alarm(expected.reference_logits, expected.logits, [suspect]) for suspect in (0, 2)]
    louder = np.where(each[0] >= each[1], 0, 2)
    assert _quieter(louder, expected, bundle) == 0
    assert _quieter(2 - louder, expected, bundle) == pytest.approx(np.abs(each[0] - each[1]).max())
    assert _quieter(np.full(4, 1), expected, bundle) == np.inf
