"""From a PyTorch model to its ONNX graphs in FP32 and FP16, and to one graph with the iterations unrolled."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor, nn

from model_export.ops import OPSET, TRANSLATIONS, attach_functions, register_schemas
from service.manifest import GraphRole
from training.architectures.encoder import Encoder

Graphs = Mapping[GraphRole, ModelProto]


class _Embed(nn.Module):
    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids)


class _Step(nn.Module):
    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.step(hidden, mask)


def export_graphs(model: Encoder) -> dict[GraphRole, ModelProto]:
    """`embed`: ids (batch, length) int64 -> hidden; `step`: hidden, mask (bool) -> next_hidden, logits. FP32."""
    register_schemas()
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=model.config.max_tokens)
    axes = {0: batch, 1: length}
    ids_BL = torch.zeros(2, 3, dtype=torch.int64)
    mask_BL = torch.ones(2, 3, dtype=torch.bool)
    hidden_BLD = torch.zeros(2, 3, model.config.width)
    return {
        "embed": _export(_Embed(model), {"ids": ids_BL}, {"ids": axes}, ["hidden"]),
        "step": _export(
            _Step(model),
            {"hidden": hidden_BLD, "mask": mask_BL},
            {"hidden": axes, "mask": axes},
            ["next_hidden", "logits"],
        ),
    }


def _export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Mapping[int, torch.export.Dim]],
    outputs: Sequence[str],
) -> ModelProto:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(axes),
            custom_translation_table=dict(TRANSLATIONS),
            verbose=False,
        )
    if program is None:
        raise AssertionError("torch.onnx.export returns a program when dynamo is set")
    return finish(program.model_proto)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of operators of packages that are not there and of axes that it renames."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def finish(model: ModelProto) -> ModelProto:
    """Attaches the operators' bodies, removes what names source files, and checks the whole."""
    attach_functions(model)
    strip(model)
    model.producer_name, model.producer_version = "refrain", ""
    onnx.checker.check_model(model, full_check=True)
    return model


def strip(model: ModelProto) -> None:
    """Removes stack traces, doc strings and names of source files: they say where a graph was made, not what it is."""
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]
    for part in [*parts, *model.graph.initializer]:
        part.doc_string = ""
        del part.metadata_props[:]


def to_fp16(graphs: Graphs) -> dict[GraphRole, ModelProto]:
    """Weights and arithmetic in FP16; ids, mask, hidden and logits keep their types, so engines need not know."""
    return {role: _to_fp16(graph) for role, graph in graphs.items()}


def _to_fp16(graph: ModelProto) -> ModelProto:
    converted = OnnxModel(convert_float_to_float16(copy.deepcopy(graph), keep_io_types=True))
    converted.topological_sort()  # the casts of the inputs come last otherwise
    return finish(converted.model)


def unroll(graphs: Graphs, iterations: int) -> ModelProto:
    """One graph, ids and mask -> logits: `embed`, then `step` so many times on one copy of the weights."""
    embed, step = graphs["embed"], graphs["step"]
    shared = {tensor.name for tensor in step.graph.initializer}
    nodes = _renamed(
        embed.graph, {"ids": "ids", "hidden": "hidden.0"}, "embed/", {tensor.name for tensor in embed.graph.initializer}
    )
    for n in range(iterations):
        logits = "logits" if n == iterations - 1 else f"logits.{n + 1}"
        names = {"hidden": f"hidden.{n}", "mask": "mask", "next_hidden": f"hidden.{n + 1}", "logits": logits}
        nodes += _renamed(step.graph, names, f"step{n + 1}/", shared)
    graph = helper.make_graph(
        _needed(nodes, "logits"),
        "refrain",
        [embed.graph.input[0], next(value for value in step.graph.input if value.name == "mask")],
        [next(value for value in step.graph.output if value.name == "logits")],
        initializer=[*embed.graph.initializer, *step.graph.initializer],
    )
    model = helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)
    return finish(model)


def _renamed(graph: GraphProto, names: Mapping[str, str], prefix: str, shared: set[str]) -> list[NodeProto]:
    """Copies of the nodes whose inner values get a prefix; `names` and the shared weights excepted."""

    def rename(name: str) -> str:
        return name if not name or name in shared else names.get(name, prefix + name)

    copies = []
    for node in graph.node:
        renamed = copy.deepcopy(node)
        renamed.input[:] = [rename(name) for name in node.input]
        renamed.output[:] = [rename(name) for name in node.output]
        renamed.name = prefix + (node.name or node.output[0])
        copies.append(renamed)
    return copies


def _needed(nodes: Sequence[NodeProto], output: str) -> list[NodeProto]:
    """Without what does not lead to the output: the heads of all iterations but the last."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def describe(values: Iterable[onnx.ValueInfoProto]) -> dict[str, str]:
    """Name -> type and axes, as in `float[batch,length,256]`."""
    described = {}
    for value in values:
        tensor = value.type.tensor_type
        axes = ",".join(axis.dim_param or str(axis.dim_value) for axis in tensor.shape.dim)
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        described[value.name] = f"{kind}[{axes}]"
    return described
