"""`refrain::RMSNorm` and `refrain::RoPE` in ONNX: schema, translation from the torch operators, function body.

The body, in standard operators, goes into every graph as a model-local function: any ONNX Runtime runs the file with
nothing registered, and inlines the function onto its own fused kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import FunctionProto, ModelProto, defs, helper
from onnxscript.values import Opset

import training.ops  # noqa: F401  # registers torch.ops.refrain

DOMAIN, DOMAIN_VERSION = "refrain", 1
OPSET = 23
_FLOATS = [("T", ["tensor(float)", "tensor(float16)"], "Computed in the input's type.")]
_REFRAIN = Opset(DOMAIN, DOMAIN_VERSION)


def register_schemas() -> None:
    """Makes the operators known to `onnx.checker` and to the exporter; a second call does nothing."""
    parameter = defs.OpSchema.FormalParameter
    schemas = [
        defs.OpSchema(
            "RMSNorm",
            DOMAIN,
            DOMAIN_VERSION,
            doc="X / sqrt(mean(X^2, last axis) + epsilon) * weight",
            inputs=[parameter("X", "T", "(..., D)"), parameter("weight", "T", "(D)")],
            outputs=[parameter("Y", "T", "(..., D)")],
            attributes=[defs.OpSchema.Attribute("epsilon", defs.OpSchema.AttrType.FLOAT, "added to the mean square")],
            type_constraints=_FLOATS,
        ),
        defs.OpSchema(
            "RoPE",
            DOMAIN,
            DOMAIN_VERSION,
            doc="Turns each pair (X[j], X[j + K/2]) by its position's angle.",
            inputs=[
                parameter("X", "T", "(B, H, L, K)"),
                parameter("cos", "T", "(B, L, K/2)"),
                parameter("sin", "T", "(B, L, K/2)"),
            ],
            outputs=[parameter("Y", "T", "(B, H, L, K)")],
            type_constraints=_FLOATS,
        ),
    ]
    for schema in schemas:
        if not defs.has(schema.name, DOMAIN):
            defs.register_schema(schema)


def _rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return _REFRAIN.RMSNorm(x, weight, epsilon=eps)


def _rope(x: Any, cos: Any, sin: Any) -> Any:
    return _REFRAIN.RoPE(x, cos, sin)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.refrain.rms_norm.default: _rms_norm,
    torch.ops.refrain.rope.default: _rope,
}


def attach_functions(model: ModelProto) -> None:
    """Gives a graph that uses the operators their bodies, so that a runtime need not know them."""
    del model.functions[:]
    model.functions.extend(_function_bodies())
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))


def _function_bodies() -> Sequence[FunctionProto]:
    standard = [helper.make_opsetid("", OPSET)]
    norm = helper.make_node("RMSNormalization", ["X", "weight"], ["Y"], axis=-1)
    epsilon = norm.attribute.add()
    epsilon.name, epsilon.ref_attr_name, epsilon.type = "epsilon", "epsilon", onnx.AttributeProto.FLOAT
    rotate = helper.make_node("RotaryEmbedding", ["X", "cos", "sin"], ["Y"], interleaved=0)
    return [
        helper.make_function(DOMAIN, "RMSNorm", ["X", "weight"], ["Y"], [norm], standard, ["epsilon"]),
        helper.make_function(DOMAIN, "RoPE", ["X", "cos", "sin"], ["Y"], [rotate], standard),
    ]
