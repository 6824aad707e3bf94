"""INT8: how far integers are from what they stand for, and that every scale is a constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_export.graphs import Graphs
from model_export.quantize import (
    ActivationRange,
    measure_ranges,
    quantizable,
    quantize_columns,
    quantize_embedding,
    quantize_step,
)
from service.bundle import Bundle

FloatArray = NDArray[np.float32]
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(WEIGHTS)
def test_a_column_is_at_most_half_a_step_off(weight: FloatArray) -> None:
    integers, scales = quantize_columns(weight)
    assert integers.dtype == np.int8
    assert scales.shape == weight.shape[1:]
    off = np.abs(integers.astype(np.float64) * scales - weight)
    assert (off <= scales * (0.5 + 1e-4)).all()
    assert (integers[weight == 0] == 0).all()


@given(st.floats(-1e4, -1e-6), st.floats(1e-6, 1e4))
def test_zero_has_an_integer_of_its_own_and_the_range_fits_in_a_byte(low: float, high: float) -> None:
    found = ActivationRange(low, high)
    assert 0 <= found.zero_point <= 255
    ends = np.array([low, high]) / found.scale + found.zero_point
    assert ends[0] >= -0.51
    assert ends[1] <= 255.51


def product(weight: FloatArray) -> onnx.ModelProto:
    """hidden -> hidden x weight."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["hidden", "weight"], ["logits"], name="product")],
        "product",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", len(weight)])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        initializer=[numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def run(model: onnx.ModelProto, feed: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # a CPU without VNNI saturates sums else
    return list(onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed))


def test_a_product_with_measured_ranges_is_close_to_the_one_in_floating_point() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((64, 5)).astype(np.float32)
    hidden = rng.standard_normal((200, 64)).astype(np.float32)
    model = product(weight)

    def drive(session: onnxruntime.InferenceSession) -> Iterable[Sequence[FloatArray]]:
        yield session.run(None, {"hidden": hidden})

    ranges = measure_ranges(model, drive)
    assert ranges.keys() == {"hidden"}
    assert -6 < ranges["hidden"].low < -3
    assert 3 < ranges["hidden"].high < 6
    exact, found = (run(one, {"hidden": hidden})[0] for one in (model, quantize_step(model, ranges)))
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert np.abs(found - exact).max() > 0


def test_a_product_is_that_of_the_integers_times_both_scales() -> None:
    rng = np.random.default_rng(5)
    weight, hidden = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 5), (200, 64)))
    found = ActivationRange(-2.0, 3.0)
    scale = np.float32(found.scale)
    rows = np.clip(np.rint(hidden / scale) + found.zero_point, 0, 255).astype(np.int32) - found.zero_point
    integers, scales = quantize_columns(weight)
    by_hand = (rows @ integers.astype(np.int32)).astype(np.float32) * (scales * scale)
    np.testing.assert_array_equal(
        run(quantize_step(product(weight), {"hidden": found}), {"hidden": hidden})[0], by_hand
    )


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("also_whole", [False, True])
def test_a_product_that_is_only_split_is_computed_in_parts(axis: int, also_whole: bool) -> None:
    rng = np.random.default_rng(6)
    weight, hidden = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 6), (9, 16)))
    ranges = {"hidden": ActivationRange(-2.0, 2.0)}
    whole, model = product(weight), product(weight)
    parts = ["first", "second", "third"]
    model.graph.node.append(helper.make_node("Split", ["logits"], parts, axis=axis, num_outputs=3))
    outputs = [helper.make_tensor_value_info(part, TensorProto.FLOAT, ["batch", 2]) for part in parts]
    model.graph.value_info.append(model.graph.output.pop())
    model.graph.output.extend(outputs)
    if also_whole:
        model.graph.node.append(helper.make_node("Neg", ["logits"], ["negative"]))
        model.graph.output.append(helper.make_tensor_value_info("negative", TensorProto.FLOAT, ["batch", 6]))
    quantized = quantize_step(model, ranges)
    assert [node.op_type == "Split" for node in quantized.graph.node].count(True) == also_whole
    found = run(quantized, {"hidden": hidden})[:3]
    np.testing.assert_array_equal(np.hstack(found), run(quantize_step(whole, ranges), {"hidden": hidden})[0])


def test_a_product_that_is_split_along_its_rows_stays_whole() -> None:
    model = product(np.eye(4, dtype=np.float32))
    model.graph.node.append(helper.make_node("Split", ["logits"], ["upper", "lower"], axis=0, num_outputs=2))
    model.graph.value_info.append(model.graph.output.pop())
    for part in ("upper", "lower"):
        model.graph.output.append(helper.make_tensor_value_info(part, TensorProto.FLOAT, ["half", 4]))
    hidden = np.arange(16, dtype=np.float32).reshape(4, 4) / 8
    upper, lower = run(quantize_step(model, {"hidden": ActivationRange(-2.0, 2.0)}), {"hidden": hidden})
    np.testing.assert_allclose(np.vstack([upper, lower]), hidden, atol=0.02)


@pytest.mark.parametrize("width", [1, 7, 64, 448, 1001])
def test_every_column_is_measured_whatever_the_width(width: int) -> None:
    """One column holds what no other does; of 448 columns every seventh value would be of 64 columns alone."""
    hidden = np.full((700, width), 0.5, dtype=np.float32)
    hidden[:, -1] = 8.0
    model = product(np.ones((width, 2), dtype=np.float32))
    ranges = measure_ranges(model, lambda session: [session.run(None, {"hidden": hidden})])
    assert ranges["hidden"].high == 8.0


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    rng = np.random.default_rng(4)
    model = product(rng.standard_normal((16, 3)).astype(np.float32))
    quantized = quantize_step(model, {"hidden": ActivationRange(-2.0, 2.0)})
    hidden = rng.standard_normal((5, 16)).astype(np.float32)
    loud = np.concatenate([hidden, np.full((1, 16), 1e6, dtype=np.float32)])
    np.testing.assert_array_equal(run(quantized, {"hidden": loud})[0][:5], run(quantized, {"hidden": hidden})[0])


def test_every_stored_weight_is_quantized_but_the_heads(fp32_graphs: Graphs, bundle: Bundle) -> None:
    chosen = quantizable(fp32_graphs["step"])
    assert len(chosen) == 4  # query-key-value, attention's output, gate-up, down
    step = onnx.load(bundle.path / "int8/step.onnx")
    kinds = [node.op_type for node in step.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 7  # query, key, value; gate and up: in parts, so none is split
    assert "Split" not in kinds
    assert not quantizable(step)


def test_the_scales_of_the_stored_graph_are_constants(bundle: Bundle) -> None:
    graph = onnx.load(bundle.path / "int8/step.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    kinds = [node.op_type for node in graph.node]
    assert "DynamicQuantizeLinear" not in kinds
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    assert all(set(node.input[1:]) <= constants for node in quantizers)


def test_the_embedding_is_at_most_half_a_step_off(fp32_graphs: Graphs) -> None:
    embed = fp32_graphs["embed"]
    (table,) = (numpy_helper.to_array(tensor) for tensor in embed.graph.initializer)
    feed = {"ids": np.arange(len(table), dtype=np.int64)[None]}
    exact, found = (run(model, feed)[0] for model in (embed, quantize_embedding(embed)))
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert (np.abs(found - exact) <= largest / 127 * 0.5001).all()


@pytest.mark.parametrize("role", ["embed", "step"])
def test_int8_is_smaller_than_fp16(bundle: Bundle, role: str) -> None:
    sizes = [(bundle.path / precision / f"{role}.onnx").stat().st_size for precision in ("int8", "fp16")]
    assert sizes[0] < sizes[1]
