"""Graphs that only a device needs, made when it is opened. `onnx`, which makes them, comes with the extra `gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MOST_BATCHES = 16
"""So many batches may be gathered from in one call."""

OPSET = 23  # the bundles' own, which any runtime here can read
IR_VERSION = 10


def gathering_graph() -> bytes:
    """Tokens of MOST_BATCHES batches, `batch0` and so on, (texts, length, width), put together anew.

    `places` (texts, length) says which, counted through all batches in their order; `gathered` is (texts, length,
    width). All is float but `places`, which is int32.
    """
    from onnx import TensorProto, helper

    batches = [f"batch{number}" for number in range(MOST_BATCHES)]
    tokens = [f"{batch}_tokens" for batch in batches]
    nodes = [helper.make_node("Flatten", [batch], [flat], axis=2) for batch, flat in zip(batches, tokens, strict=True)]
    nodes.append(helper.make_node("Concat", tokens, ["tokens"], axis=0))
    nodes.append(helper.make_node("Gather", ["tokens", "places"], ["gathered"], axis=0))
    inputs = [
        helper.make_tensor_value_info(batch, TensorProto.FLOAT, [f"{batch}_texts", f"{batch}_length", "width"])
        for batch in batches
    ]
    places = helper.make_tensor_value_info("places", TensorProto.INT32, ["texts", "length"])
    gathered = helper.make_tensor_value_info("gathered", TensorProto.FLOAT, ["texts", "length", "width"])
    graph = helper.make_graph(nodes, "gathering", [*inputs, places], [gathered])
    opsets = [helper.make_opsetid("", OPSET)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return serialized


def widened(path: Path) -> bytes:
    """A stored FP16 graph, its weights and arithmetic FP32."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    attributes = [(node.op_type, attribute) for node in nodes for attribute in node.attribute]
    for tensor in [*model.graph.initializer, *(attribute.t for _, attribute in attributes if attribute.HasField("t"))]:
        if tensor.data_type == TensorProto.FLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for operator, attribute in attributes:
        if (operator, attribute.name, attribute.i) == ("Cast", "to", TensorProto.FLOAT16):
            attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]  # types of what lies between, which the runtime finds by itself
    serialized: bytes = model.SerializeToString()
    return serialized
