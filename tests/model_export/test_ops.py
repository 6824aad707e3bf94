"""Our operators in ONNX: known to the checker, and their bodies compute what the torch operators compute."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, defs, helper

from model_export.ops import DOMAIN, DOMAIN_VERSION, OPSET, attach_functions, register_schemas
from training.ops import rms_norm, rope

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
TOLERANCE = {np.float32: 1e-6, np.float16: 2e-3}


def run_operator(name: str, inputs: dict[str, NDArray[np.floating]], **attributes: float) -> NDArray[np.floating]:
    """One node in a plain session: nothing is registered with the runtime."""
    kind = FLOAT16 if next(iter(inputs.values())).dtype == np.float16 else FLOAT
    graph = helper.make_graph(
        [helper.make_node(name, list(inputs), ["Y"], domain=DOMAIN, **attributes)],
        "one",
        [helper.make_tensor_value_info(value, kind, array.shape) for value, array in inputs.items()],
        [helper.make_tensor_value_info("Y", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
    attach_functions(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, inputs)
    return np.asarray(found)


@pytest.mark.parametrize("name", ["RMSNorm", "RoPE"])
def test_the_checker_knows_the_operators(name: str) -> None:
    register_schemas()
    register_schemas()  # a second time does nothing
    schema = defs.get_schema(name, DOMAIN_VERSION, DOMAIN)
    assert schema.since_version == DOMAIN_VERSION
    x, y = (helper.make_tensor_value_info(value, FLOAT, [1, 2]) for value in "XY")
    lacking = helper.make_graph([helper.make_node(name, ["X"], ["Y"], domain=DOMAIN)], "lacking", [x], [y])
    with pytest.raises(onnx.checker.ValidationError, match=name):
        onnx.checker.check_model(helper.make_model(lacking, opset_imports=[helper.make_opsetid(DOMAIN, 1)]))


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (7, 1, 33), (4, 9), (1, 17, 384)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_the_body_of_rms_norm_is_the_torch_operator(shape: tuple[int, ...], epsilon: float, kind: type) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(shape) * 3).astype(kind)
    weight = rng.standard_normal(shape[-1]).astype(kind)
    expected = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), epsilon).numpy()
    found = run_operator("RMSNorm", {"X": x, "weight": weight}, epsilon=epsilon)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 4), (3, 1, 17, 8), (1, 4, 33, 64)])
def test_the_body_of_rope_is_the_torch_operator(shape: tuple[int, int, int, int], kind: type) -> None:
    batch, _, length, width = shape
    rng = np.random.default_rng(2)
    x = rng.standard_normal(shape).astype(kind)
    angle = rng.uniform(0, 7, (batch, length, width // 2))
    cos, sin = np.cos(angle).astype(kind), np.sin(angle).astype(kind)
    expected = rope(*(torch.from_numpy(array) for array in (x, cos, sin))).numpy()
    found = run_operator("RoPE", {"X": x, "cos": cos, "sin": sin})
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
