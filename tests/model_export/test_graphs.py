"""Every graph of a bundle: valid, self-contained, made of our operators, and silent about where it was made."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from model_export.graphs import Graphs, describe, export_graphs, to_fp16, unroll
from model_export.ops import DOMAIN, OPSET
from service.bundle import Bundle
from service.device_graphs import widened
from training.architectures.recurrent import RecurrentTransformer
from training.shapes import FEWEST_TOKENS, EncoderConfig

ROOT = Path(__file__).resolve().parents[2]


def graph_files(bundle: Bundle) -> list[Path]:
    return sorted(bundle.path.rglob("*.onnx"))


def operators(model: onnx.ModelProto) -> list[str]:
    return [f"{node.domain}::{node.op_type}" for node in model.graph.node]


def test_every_graph_is_there(bundle: Bundle) -> None:
    expected = {f"{p}/{g}.onnx" for p in ("fp16", "int8") for g in ("embed", "step", "portable")}
    assert {str(path.relative_to(bundle.path)) for path in graph_files(bundle)} == expected


def test_every_graph_passes_the_checker_and_is_of_the_stated_opset(bundle: Bundle) -> None:
    for path in graph_files(bundle):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        own = {"com.microsoft": 1} if path.parent.name == "int8" and path.name != "embed.onnx" else {}
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, DOMAIN: 1, **own}


def test_the_fewest_tokens_that_a_training_takes_can_be_exported() -> None:
    shape = EncoderConfig(1, 2, width=8, heads=2, feed_forward=8, classes=2, vocabulary=16, max_tokens=FEWEST_TOKENS)
    assert export_graphs(RecurrentTransformer(shape)).keys() == {"embed", "step"}


def test_every_graph_loads_in_a_plain_session_and_takes_what_the_manifest_says(bundle: Bundle) -> None:
    for precision in bundle.manifest.precisions.values():
        assert precision.portable is not None
        for graph in (*precision.graphs.values(), precision.portable):
            session = onnxruntime.InferenceSession(bundle.path / graph.file)
            assert [value.name for value in session.get_inputs()] == list(graph.inputs)
            assert [value.name for value in session.get_outputs()] == list(graph.outputs)
            assert graph.inputs == describe(onnx.load(bundle.path / graph.file).graph.input)


def test_whatever_holds_layers_holds_our_operators(bundle: Bundle) -> None:
    for path in graph_files(bundle):
        if path.stem != "embed":
            found = operators(onnx.load(path))
            assert "refrain::RoPE" in found
            assert "refrain::RMSNorm" in found


def test_no_graph_says_where_it_was_made(bundle: Bundle) -> None:
    for path in graph_files(bundle):
        content = path.read_bytes()
        for trace in (b".py", b"/training/", b"pkg.torch", b"site-packages", str(ROOT).encode(), b"Traceback"):
            assert trace not in content, f"{path.name} holds {trace!r}"
        model = onnx.load(path)
        parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]
        parts += [*model.graph.value_info, *model.graph.initializer, *model.functions]
        assert not [part for part in parts if part.doc_string or part.metadata_props]


def test_fp16_halves_the_weights_and_keeps_the_types_at_the_edge(fp32_graphs: Graphs) -> None:
    for role, graph in to_fp16(fp32_graphs).items():
        assert graph.ByteSize() < 0.7 * fp32_graphs[role].ByteSize()
        assert describe(graph.graph.output) == describe(fp32_graphs[role].graph.output)
        assert describe(graph.graph.input) == describe(fp32_graphs[role].graph.input)


def test_an_fp16_graph_widened_again_is_the_fp32_graph_but_for_its_weights_rounding(
    fp32_graphs: Graphs, tmp_path: Path
) -> None:
    """So a GPU, which has kernels for FP16, computes in FP32 all the same where that is asked."""
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    width = fp32_graphs["step"].graph.input[0].type.tensor_type.shape.dim[2].dim_value
    hidden = np.random.default_rng(1).normal(size=(2, 5, width)).astype(np.float32)
    given = {"embed": {"ids": np.array([[2, 9, 30, 4, 5], [2, 17, 8, 0, 0]])}, "step": {"hidden": hidden, "mask": mask}}
    for role, graph in to_fp16(fp32_graphs).items():
        onnx.save(graph, tmp_path / "stored.onnx")
        found = onnxruntime.InferenceSession(widened(tmp_path / "stored.onnx")).run(None, given[role])
        rounded = copy.deepcopy(fp32_graphs[role])
        for tensor in rounded.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                values = onnx.numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        expected = onnxruntime.InferenceSession(rounded.SerializeToString()).run(None, given[role])
        for output, same in zip(found, expected, strict=True):
            np.testing.assert_array_equal(output, same)


@pytest.mark.parametrize("iterations", [1, 3])
def test_unrolling_runs_the_steps_on_one_copy_of_the_weights_with_the_last_head_alone(
    fp32_graphs: Graphs, iterations: int
) -> None:
    unrolled = unroll(fp32_graphs, iterations)
    step = operators(fp32_graphs["step"])
    assert operators(unrolled).count("::Attention") == iterations * step.count("::Attention")
    norms_without_head = step.count("refrain::RMSNorm") - 1
    assert operators(unrolled).count("refrain::RMSNorm") == iterations * norms_without_head + 1
    weights = [tensor.name for graph in fp32_graphs.values() for tensor in graph.graph.initializer]
    assert sorted(tensor.name for tensor in unrolled.graph.initializer) == sorted(weights)


def test_unrolled_equals_stepped(fp32_graphs: Graphs) -> None:
    ids = np.array([[2, 9, 30, 4, 5], [2, 17, 8, 0, 0]])
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    embed, step, whole = (
        onnxruntime.InferenceSession(graph.SerializeToString())
        for graph in (fp32_graphs["embed"], fp32_graphs["step"], unroll(fp32_graphs, 3))
    )
    (hidden,) = embed.run(None, {"ids": ids})
    for _ in range(3):
        hidden, logits = step.run(["next_hidden", "logits"], {"hidden": hidden, "mask": mask})
    (found,) = whole.run(None, {"ids": ids, "mask": mask})
    np.testing.assert_array_equal(found, logits)
