"""Each private API of torchmetrics, OmegaConf, TensorBoard, distributed checkpoints and the exporter is there, and does what we take it to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from canary import tries
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchmetrics.aggregation import MeanMetric

from lightning_cco.compat import (
    decomposed,
    distributed_checkpoint,
    metrics,
    omegaconf,
    onnx_exporter,
    resolve,
    tensorboard,
)


@tries("torchmetrics.Metric._to_sync")
def test_metrics() -> None:
    assert metrics.syncs(MeanMetric())
    assert not metrics.syncs(MeanMetric(sync_on_compute=False))


@tries(
    "torch.distributed.checkpoint.default_planner._EmptyStateDictLoadPlanner",
    "torch.distributed.checkpoint.state_dict_loader._load_state_dict",
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"state_dict": {"weight": torch.arange(3.0)}, "step": 4}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    for found in (
        distributed_checkpoint.read_all(str(tmp_path / "checkpoint")),
        distributed_checkpoint._through_a_file(str(tmp_path / "checkpoint")),
    ):
        assert found["step"] == 4
        assert found["state_dict"]["weight"].tolist() == [0.0, 1.0, 2.0]

    def gone(name: str) -> Any:
        raise AttributeError(name)

    monkeypatch.setattr(distributed_checkpoint, "find", gone)
    assert distributed_checkpoint.read_all(str(tmp_path / "checkpoint"))["step"] == 4


class Slow:
    """A writer without the private part."""

    def __init__(self, writer: Any) -> None:
        self.add_scalar = writer.add_scalar


@tries("torch.utils.tensorboard.SummaryWriter._get_file_writer")
@pytest.mark.parametrize("private", [True, False])
def test_tensorboard(tmp_path: Path, private: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        target = writer if private else Slow(writer)
        tensorboard.write_scalars(target, {"a": 1.0, "b": 2.0}, 3)
        graph = GraphDef(node=[{"name": "layer", "op": "conv"}]).SerializeToString()
        if private:
            tensorboard.write_graph(target, graph)
        else:
            with pytest.raises(resolve.CCOError, match="got a Slow"):
                tensorboard.write_graph(target, graph)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in "ab"} == {"a": [(3, 1.0)], "b": [(3, 2.0)]}
    assert not private or events.Graph().node[0].name == "layer"


@tries("omegaconf.Container._get_root")
def test_omegaconf() -> None:
    config = OmegaConf.create({"a": {"b": 1}})
    assert omegaconf.root_of(config.a) is config
    assert omegaconf.root_of(config) is config


@tries("torch.fx.experimental.proxy_tensor.get_proxy_mode", "torch.fx.Node.meta.custom", "torch._export")
def test_a_trace() -> None:
    def function(x: Tensor) -> Tensor:
        y = x + 1
        graph = onnx_exporter.graph_being_traced()
        next(iter(reversed(graph.nodes))).meta[onnx_exporter.HANDED_ON] = {"layer": "first"}
        return y * 2

    class Traced(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    assert onnx_exporter.graph_being_traced() is None
    make_fx(function)(torch.ones(2))
    program = torch.export.export(Traced(), (torch.ones(2),), strict=False).run_decompositions()
    found = [node.meta.get(onnx_exporter.HANDED_ON) for node in program.graph.nodes if node.op == "call_function"]
    assert found[0] == {"layer": "first"}
    assert any(name.startswith("torch._export") for name in onnx_exporter.LOGGERS)


@tries("torch.ao.quantization.fx._decomposed")
def test_the_operators_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decomposed.operators()
    levels = found.quantize(torch.tensor([-9.0, 0.26, 9.0]), 0.5, 3, -128, 127, torch.int8)
    assert levels.tolist() == [-15, 4, 21]
    assert found.dequantize(levels, 0.5, 3, -128, 127, torch.int8).tolist() == [-9.0, 0.5, 9.0]
    scales, zeros = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64)
    rows = torch.ones(2, 2, dtype=torch.int8)
    assert found.dequantize_channels(rows, scales, zeros, 0, -128, 127, torch.int8).tolist() == [[1.0, 1.0], [2.0, 2.0]]
    groups = torch.tensor([[1.0], [3.0]])
    assert found.dequantize_groups(rows, groups, groups.int() * 0, -128, 127, torch.int8, 2, torch.float32).tolist() == [
        [1.0] * 2,
        [3.0] * 2,
    ]

    def gone(name: str) -> Any:
        raise AttributeError(name)

    monkeypatch.setattr(decomposed, "find", gone)
    assert decomposed.operators() == found
    monkeypatch.setattr(torch.ops, "quantized_decomposed", None)
    with pytest.raises(resolve.CCOError, match=r"expected torch\.ao\.quantization\.fx\._decomposed .the operators of PT2E programs"):
        decomposed.operators()


@tries("torch.onnx.ONNXProgram.pkg.torch.onnx.fx_node", "torch.onnx.ONNXProgram.pkg.torch.onnx.name_scopes")
def test_the_exporter() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    program = torch.onnx.export(model, (torch.ones(1, 2),), dynamo=True, verbose=False)
    nodes = list(program.model.graph)
    traced = {node.name for node in program.exported_program.graph.nodes}
    assert onnx_exporter.traced_text(nodes[0]).lstrip("%").partition(" ")[0].strip(":") in traced
    assert "'0'" in onnx_exporter.scopes_text(nodes[0])


@tries("coremltools.models.MLModel._mil_program")
def test_core_ml() -> None:
    coremltools = pytest.importorskip("coremltools")
    traced = torch.jit.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2))
    model = coremltools.convert(traced, inputs=[coremltools.TensorType(shape=(1, 2))], convert_to="mlprogram", skip_model_load=True)
    assert "linear" in {operation.op_type for operation in model._mil_program.functions["main"].operations}
