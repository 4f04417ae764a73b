"""Evaluation: held-out text as in pretraining, read by all ranks together; nothing is trained."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hpcdl import __version__
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.tasks import pretrain

if TYPE_CHECKING:
    import torch

    from hpcdl.distributed.engine import Engine
    from hpcdl.distributed.mesh import Grid
    from hpcdl.runs.store import RunDir
    from hpcdl.worker.heartbeat import Progress
    from hpcdl.worker.network import Network
    from hpcdl.worker.process import Process
    from hpcdl.worker.signals import Stop

CUTS_DOCUMENTS = pretrain.CUTS_DOCUMENTS
example = pretrain.example
prompt = pretrain.prompt


def train(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """In the place of hpcdl.worker.training.train: one evaluation and its result."""
    from hpcdl.distributed.mesh import Grid
    from hpcdl.spec.parallel import ParallelDims
    from hpcdl.worker import control, evaluate, metrics, model, network, sample, training
    from hpcdl.worker.data.prepare import open_dataset

    grid = Grid(ParallelDims.fill(spec.parallel, who.world_size), device)
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    data = open_dataset(spec, tokenizer)
    net = network.prepare(spec, model.load(spec, place), device, data.train)
    parameters = network.size_of(net.model).parameters
    engine = frozen(spec, net, grid)
    lines = metrics.Metrics(run, active=who.is_first)
    lines.rewind(0)
    progress.begin(0)
    started = time.perf_counter()
    with progress.during("evaluation"):
        loss = evaluate.heldout_loss(spec, engine, data.heldout, *grid.data_place)
    seconds = time.perf_counter() - started
    peak = int(control.gather([metrics.peak_memory_bytes(device)], device).max())
    engine.close()
    progress.end()
    if not who.is_first:
        return
    found = metrics.evaluation(0, loss)
    lines.write(found)
    _, tokens = evaluate.heldout_batches(spec, data.heldout, device)
    result = {
        "eval_loss_after": found["eval_loss"],
        "eval_perplexity_after": found["eval_perplexity"],
        "eval_tokens": tokens,
        "eval_s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2),
        "peak_memory_bytes": peak,
        "world_size": who.world_size,
        "nodes": spec.cluster.nodes,
        "parameters": parameters,
        "sample": {
            "prompt": spec.task.sample_prompt,
            "before": "",
            "after": sample.write(net, tokenizer, spec.task) if engine.is_whole else "",
        },
    }
    write_atomic(run.path / "card.md", card(spec, result))
    write_json(run.result_file, result)
    training.write_outcome(run, who, 0, None)


def frozen(spec: ExperimentSpec, net: Network, grid: Grid) -> Engine:
    """The strategy's engine; a whole model without buckets for gradients, which there will be none of."""
    from hpcdl.distributed.decoder import Stage
    from hpcdl.distributed.engine import Engine
    from hpcdl.worker import network, optim

    if grid.dims.world_size > grid.dims.dp_replicate:
        return network.parallelize(spec, net, grid)
    net.to_device()
    return Engine([Stage(net.model)], grid, lambda some: optim.build(spec.optim, some), autocast=net.autocast)


def card(spec: ExperimentSpec, result: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    where = f"{result['world_size']} processes on {result['nodes']} node{'s' * (result['nodes'] != 1)}"
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            f"{spec.model.name} on {spec.data.kind}, {spec.quant.scheme}, {spec.parallel.name}: {where}.",
            "",
            "| held-out text | |",
            "|---|---|",
            f"| loss | {result['eval_loss_after']:.4f} |",
            f"| perplexity | {result['eval_perplexity_after']:.3f} |",
            f"| tokens | {result['eval_tokens']:,} in {result['eval_s']:.1f} s |",
            f"| parameters | {result['parameters']:,} |",
            f"| peak memory | {result['peak_memory_bytes'] / 2**30:.2f} GiB a process |",
            f"| precision | {spec.trainer.precision} |",
            f"| seed | {spec.seed} |",
            f"| hpcdl | {__version__} |",
            "",
        ]
    )
