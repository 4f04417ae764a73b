"""Export: a model as a file for another runtime, as a run that others can wait for and that waits for others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec import ExperimentSpec, TaskSpec

PLACES = {"run": "run"}
"""What names a run, to be made absolute (hpcdl.experiment.places)."""
PLANNED = False
"""Whether the closed form of a training step's memory (hpcdl.plan) is this task's too: nothing is trained."""
KINDS = {
    "executorch": ("int8", "f32", "int4"),
    "gguf": ("q8_0", "f32", "f16", "bf16", "q5_1", "q5_0", "q4_1", "q4_0"),
    "onnx": ("int8", "f32", "int4"),
    "safetensors": ("bf16", "f16", "f32"),
}
"""hpcdl/export/formats, which lies above this room: a test holds the two together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """What is exported, and to what."""

    run: str | None = None
    """Whose model or adapter is exported, though it may be still to come (`after=`); null: the model of `model`."""
    to: str = "gguf"
    """The format: a file of hpcdl/export/formats."""
    quant: str = "q8_0"
    """Its kind of numbers."""
    embedding_quant: str | None = None
    """Of a GGUF file's embedding and head; null: q8_0 where the rest has fewer bits."""
    accept_loss: bool = False
    """Keep the file though the quality gate refuses it; its card says so."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """A format and a kind of numbers that there are, in one process."""
    for key, given, allowed in (
        ("to", config.to, list(KINDS)),
        ("quant", config.quant, list(KINDS.get(config.to, ())) or [config.quant]),
    ):
        if given not in allowed:
            near = nearest_name(given, allowed)
            yield Fault(
                key=f"task.{key}", value=given, problem="there is no such one", allowed=", ".join(allowed),
                nearest=near, fix=f"task.{key}={near or allowed[0]}",
            )  # fmt: skip
    if spec.cluster.world_size > 1:
        yield Fault(
            key="cluster.processes_per_node", value=str(spec.cluster.world_size), problem="one process writes one file",
            allowed="1, on one node", fix="cluster.nodes=1 cluster.processes_per_node=1",
        )  # fmt: skip
