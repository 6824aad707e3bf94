"""INT8 for a CPU, with activation scales that are fixed in the file.

Dynamic quantisation takes one scale for a whole batch, so a text's answer would depend on its batch-mates. Here every
scale is measured once, over training texts at every iteration, and the graph holds it as a constant.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import gcd

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

FloatArray = NDArray[np.float32]

RUNTIME_DOMAIN = "com.microsoft"
"""Of the operators that ONNX Runtime has beside the standard ones."""
PERCENTILES = (0.01, 99.99)
SAMPLE_STRIDE = 7
"""Every how manieth activation is kept, or one of a few more: millions remain."""


@dataclass(frozen=True)
class ActivationRange:
    """What nearly all values of one tensor lie between; zero is always inside, so that it is represented exactly."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        return (self.high - self.low) / 255

    @property
    def zero_point(self) -> int:
        return round(-self.low / self.scale)


def quantizable(model: ModelProto) -> list[NodeProto]:
    """The matrix products with stored weights. The head stays in floating point: it is small and decides."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in stored]


def measure_ranges(
    model: ModelProto, drive: Callable[[onnxruntime.InferenceSession], Iterable[Sequence[FloatArray]]]
) -> dict[str, ActivationRange]:
    """The range of every quantisable product's input.

    `drive` runs the session it is given, whose outputs are exactly those inputs, over unpadded texts at every
    iteration, and yields what came out.
    """
    names = sorted({node.input[0] for node in quantizable(model)})
    session = onnxruntime.InferenceSession(_with_outputs(model, names).SerializeToString())
    samples: dict[str, list[FloatArray]] = {name: [] for name in names}
    for outputs in drive(session):
        for name, values in zip(names, outputs[-len(names) :], strict=True):
            samples[name].append(values.ravel()[:: _stride(values.shape[-1])])
    return {name: _range(np.concatenate(parts)) for name, parts in samples.items()}


def _stride(width: int) -> int:
    """The first that meets every column: one that has a divisor in common with the width would always miss some."""
    return next(stride for stride in count(SAMPLE_STRIDE) if gcd(stride, width) == 1)


def _with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    extended = ModelProto()
    extended.CopyFrom(model)
    extended.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return extended


def _range(values: FloatArray) -> ActivationRange:
    low, high = np.percentile(values, PERCENTILES)
    return ActivationRange(min(float(low), -1e-6), max(float(high), 1e-6))


def quantize_step(model: ModelProto, ranges: Mapping[str, ActivationRange]) -> ModelProto:
    """Replaces every stored-weight product by an integer one: 8-bit activations, 8-bit weights with a scale per column.

    The product is ONNX Runtime's own, which rescales as it goes: in standard operators, to the same bits, its integers
    pass through memory twice more. One that is only split afterwards is computed in parts, so that nothing is copied.
    """
    quantized = ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    chosen = {node.output[0]: node for node in quantizable(quantized)}
    splits = {name: split for name in chosen if (split := _even_split(graph, name))}
    dropped = {split.output[0] for split in splits.values()}
    constants: dict[str, TensorProto] = {}
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        result = node.output[0]
        if result in chosen:
            source, weight = node.input
            if source not in done:
                nodes.append(_quantize_activation(source, ranges[source], constants))
                done.add(source)
            results = splits.get(result, node).output
            nodes += _integer_products(source, weight, results, ranges[source], weights[weight], constants)
        elif result not in dropped:
            nodes.append(node)
    replaced = {node.input[1] for node in chosen.values()}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *constants.values()])
    quantized.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
    return quantized


def _even_split(graph: GraphProto, name: str) -> NodeProto | None:
    """What alone reads this value and cuts its last axis into equal parts, if anything does."""
    readers = [node for node in graph.node if name in node.input]
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    shown = any(output.name == name for output in graph.output)
    if shown or len(readers) != 1 or readers[0].op_type != "Split" or len(readers[0].input) != 1:
        return None
    axis = next((attribute.i for attribute in readers[0].attribute if attribute.name == "axis"), 0)
    return readers[0] if axis in (-1, ranks.get(name, 0) - 1) else None


def _quantize_activation(name: str, found: ActivationRange, constants: dict[str, TensorProto]) -> NodeProto:
    scale, zero = f"{name}.scale", f"{name}.zero_point"
    constants[scale] = numpy_helper.from_array(np.array(found.scale, dtype=np.float32), scale)
    constants[zero] = numpy_helper.from_array(np.array(found.zero_point, dtype=np.uint8), zero)
    return helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}.int8"], name=f"{name}.quantize")


def _integer_products(
    source: str,
    weight_name: str,
    results: Sequence[str],
    found: ActivationRange,
    weight: FloatArray,
    constants: dict[str, TensorProto],
) -> Iterator[NodeProto]:
    """One product for each of `results`, which share the weight's columns among them, in order."""
    integers, scales = quantize_columns(weight)
    parts = (np.split(whole, len(results), axis=-1) for whole in (integers, scales))
    for result, part, part_scales in zip(results, *parts, strict=True):
        name = f"{weight_name}.{result}"
        constants[f"{name}.int8"] = numpy_helper.from_array(np.ascontiguousarray(part), f"{name}.int8")
        constants[f"{name}.scale"] = numpy_helper.from_array(part_scales, f"{name}.scale")
        operands = [f"{source}.int8", f"{name}.int8", f"{source}.scale", f"{name}.scale", f"{source}.zero_point"]
        yield helper.make_node("MatMulIntegerToFloat", operands, [result], name=result, domain=RUNTIME_DOMAIN)


def quantize_columns(weight: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Symmetric 8-bit integers (K, N) and one scale per column (N,): weight is about integers * scales."""
    scales = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


def quantize_embedding(model: ModelProto) -> ModelProto:
    """Stores the embedding table as 8-bit integers with one scale per row."""
    quantized = ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    (gather,) = (node for node in graph.node if node.op_type == "Gather")
    table_name, ids = gather.input
    (table,) = (tensor for tensor in graph.initializer if tensor.name == table_name)
    integers, scales = quantize_columns(numpy_helper.to_array(table).T)
    graph.initializer.remove(table)
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.ascontiguousarray(integers.T), f"{table_name}.int8"),
            numpy_helper.from_array(scales[:, None], f"{table_name}.scale"),
        ]
    )
    at = list(graph.node).index(gather)
    (hidden,) = gather.output
    replacement = [
        helper.make_node("Gather", [f"{table_name}.int8", ids], ["rows.int8"], axis=0),
        helper.make_node("Gather", [f"{table_name}.scale", ids], ["rows.scale"], axis=0),
        helper.make_node("Cast", ["rows.int8"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "rows.scale"], [hidden]),
    ]
    nodes = [*list(graph.node)[:at], *replacement, *list(graph.node)[at + 1 :]]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return quantized
