"""How long graph and plan take as nets grow: no part may cost more than its share of layers, rules and edges.

Run: ``python benchmarks/plan_scale.py`` (half a minute; each time is the best of three). The graphs are residual: enumerating their paths would never end.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_cco.graph.layer import Edge, Layer
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.monitoring.tables import text_table
from lightning_cco.quantization.plan import QuantizationPlan, plan_quantization
from lightning_cco.settings import Settings, load_settings

SHAPE, FLOAT = ((1, 64, 8, 8),), ("float32",)
BLOCK = (
    ("conv", "conv1"),
    ("batch_norm", "bn1"),
    ("relu", "relu"),
    ("conv", "conv2"),
    ("batch_norm", "bn2"),
    ("add", ""),
    ("relu", "relu"),
)


def layers_and_edges(count: int) -> tuple[list[Layer], list[Edge]]:
    """Residual blocks of seven layers between an input and a linear head, about ``count`` layers in all."""
    layers, edges, numbers = [Layer("input_0", "", "input", output_shapes=SHAPE, output_dtypes=FLOAT)], [], dict[str, int]()

    def add(kind: str, path: str, *sources: str) -> str:
        number = numbers.get(kind, 0)
        numbers[kind] = number + 1
        name = f"{kind}_{number}" if number else kind
        weighted = kind in ("conv", "linear")
        parameters = (f"{path}.weight",) * weighted
        layers.append(Layer(name, path, kind, SHAPE * len(sources), SHAPE, FLOAT, parameters=parameters, weighted=weighted))
        edges.extend(Edge(source, name, 0, position) for position, source in enumerate(sources))
        return name

    x = "input_0"
    for block in range((count - 3) // len(BLOCK)):
        before = x
        for kind, module in BLOCK:
            path = f"stage.{block // 50}.block.{block}" + (f".{module}" if module else "")
            x = add(kind, path, x, before) if kind == "add" else add(kind, path, x)
    x = add("linear", "head", add("adaptive_avg_pool", "pool", x))
    layers.append(Layer("output_0", "", "output", SHAPE))
    edges.append(Edge(x, "output_0"))
    return layers, edges


RULES: list[dict[str, object]] = [
    {"match": "adaptive_avg_pool", "skip_quantization": True, "skip_quantization_until": ["linear"]},
    {"match": "conv_3", "skip_quantization": True, "skip_quantization_until": ["add_*"]},  # a third of the way: hundreds of destinations
    {"match": "*.bn2", "skip_quantization": True, "skip_quantization_until": ["linear"]},  # thousands of starts
    {"match": "stage.0", "skip_quantization": True, "skip_quantization_downstream": True},
    {"match": "*.conv1", "weights_num_bits": 4},
]


def timed(run: Callable[[], object]) -> tuple[float, object]:
    best, result = float("inf"), None
    for _ in range(3):
        gc.collect()
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return best, result


def measure(count: int, folder: Path) -> list[float]:
    layers, edges = layers_and_edges(count)
    build, graph = timed(lambda: LayerGraph(layers, edges))
    assert isinstance(graph, LayerGraph)
    default, plan = timed(lambda: plan_quantization(graph))
    assert isinstance(plan, QuantizationPlan)
    ruled, _ = timed(lambda: plan_quantization(graph, load_settings({"layer_settings": RULES})))
    resolve, resolved = timed(plan.resolved_settings)
    assert isinstance(resolved, Settings)
    path = folder / "resolved_recipe.yaml"
    write, _ = timed(lambda: resolved.save(path))
    read, again = timed(lambda: load_settings(path))
    assert isinstance(again, Settings)
    back, same = timed(lambda: plan_quantization(graph, again))
    assert isinstance(same, QuantizationPlan)
    assert same.quantized == plan.quantized
    return [build, default, ruled, resolve, write, read, back]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1_250, 5_000, 20_000], help="sizes of the nets")
    options = parser.parse_args(argv)
    header = ["layers", "graph", "plan", "plan, 5 wide rules", "resolve", "write recipe", "read recipe", "plan from it"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.layers:
            times = measure(count, Path(folder))
            rows.append([f"{count:,}", *(f"{time_:.3f} s" for time_ in times)])
    print(f"{os.cpu_count()} CPU cores, one thread used")
    print(text_table(header, rows, right=range(len(header))))


if __name__ == "__main__":
    main()
