"""What a finished run leaves: result.json, card.md, loss.png, and the adapter or the model. Rank 0 only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl import __version__
from hpcdl.distributed.decoder import trunk
from hpcdl.distributed.held import Matrix
from hpcdl.errors import UnsavedError
from hpcdl.runs import memory as memory_report
from hpcdl.runs.files import is_full, last_line, write_atomic, write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Totals, newest
from hpcdl.worker import pruning
from hpcdl.worker.cache import anew
from hpcdl.worker.data.prepare import Rows
from hpcdl.worker.metrics import Metrics
from hpcdl.worker.network import Network, Size, merged
from hpcdl.worker.plot import draw_loss
from hpcdl.worker.process import Process
from hpcdl.worker.sample import has_adapter, write
from hpcdl.worker.tokenizer import Tokenizer

SAMPLE_BEFORE = "sample-before.txt"
"""The sample of a model whose every parameter is trained: taken before the first step, or never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All that a result is made from."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    net: Network
    """The trained model, whole."""
    size: Size
    tokenizer: Tokenizer
    metrics: Metrics
    totals: Totals
    place: str | None
    """Where the base weights came from; None: random."""
    mfu_of: float | None
    """As in hpcdl.worker.loop.Parts."""
    text: Rows | None = None
    """Training rows, where a model must be pruned once more to be saved."""
    measured: dict[str, float] = field(default_factory=dict)
    """What only the strategy measures (Engine.report)."""


def sample_before(spec: ExperimentSpec, run: RunDir, net: Network, tokenizer: Tokenizer) -> None:
    """Keeps what the untrained model writes, where no adapter could be turned off later to ask it."""
    if not has_adapter(net.model) and spec.task.sample_prompt:
        write_atomic(run.path / SAMPLE_BEFORE, write(net, tokenizer, spec.task))


def save(finished: Finished) -> dict[str, Any]:
    """Writes everything and returns what stands in result.json.

    Raises:
        UnsavedError: the disk is full. What was there before is as it was, half of nothing is left.
    """
    try:
        return _save(finished)
    except Exception as error:
        if not (is_full(error) or (error.__cause__ is not None and is_full(error.__cause__))):
            raise
        found, _ = newest(finished.run.checkpoints)
        kept = f"{found.path.name} is kept, so that only the result is left to do: " if found else ""
        raise UnsavedError(
            f"the result can't be written to {finished.run.path}: {error}; {kept}make room, and launch again"
        ) from error


def _save(finished: Finished) -> dict[str, Any]:
    before, after = samples(finished)
    weights, zeros = save_weights(finished)
    result = {**_figures(finished), **zeros, "adapter": str(weights) if weights.name == "adapter" else None}
    result["model"] = None if result["adapter"] else str(weights)
    result["memory"] = memory_report.in_result(finished.run.path, finished.who.world_size)
    result["sample"] = {"prompt": finished.spec.task.sample_prompt, "before": before, "after": after}
    draw_loss(
        finished.run.metrics(),
        finished.run.path / "loss.png",
        title=f"{finished.spec.name}: {finished.spec.model.name} on {finished.spec.data.kind}",
    )
    write_atomic(
        finished.run.path / "card.md", card(finished.spec, result, memory_report.load(finished.run.path))
    )
    write_json(finished.run.result_file, result)
    return result


def _figures(finished: Finished) -> dict[str, Any]:
    totals, spec = finished.totals, finished.spec
    evaluations = finished.metrics.evaluations
    before = evaluations[min(evaluations)]  # a run that continues another one begins later than at 0
    after = evaluations[spec.trainer.max_steps]
    last = last_line(finished.run.metrics_file, having="loss") or {}
    speed = totals.tokens_per_s
    return {
        "eval_loss_before": before["eval_loss"],
        "eval_perplexity_before": before["eval_perplexity"],
        "eval_loss_after": after["eval_loss"],
        "eval_perplexity_after": after["eval_perplexity"],
        "final_loss": last.get("loss"),
        "steps": totals.step,
        "tokens": totals.tokens,
        "tokens_per_s": round(speed, 2),
        "train_s": round(totals.train_s, 3),
        "peak_memory_bytes": totals.peak_memory_bytes,
        "mfu": None if finished.mfu_of is None else round(speed * finished.mfu_of, 4),
        "world_size": finished.who.world_size,
        "nodes": spec.cluster.nodes,
        "trainable_parameters": finished.size.trainable,
        "parameters": finished.size.parameters,
        **finished.measured,
    }


def samples(finished: Finished) -> tuple[str, str]:
    """How the model goes on from the task's prompt, before and after."""
    net, task = finished.net, finished.spec.task
    after = write(net, finished.tokenizer, task)
    if has_adapter(net.model):
        return write(net, finished.tokenizer, task, adapter=False), after
    kept = finished.run.path / SAMPLE_BEFORE
    return (kept.read_text(encoding="utf-8") if kept.exists() else ""), after


def save_weights(finished: Finished) -> tuple[Path, dict[str, float]]:
    """The adapter, as `peft.PeftModel.from_pretrained(base, adapter)` reads it; else the whole model.

    An update that keeps a pruned base's zeros is merged into it: without the mask, which peft doesn't know, it
    would be another update. Also gives the share of zeros of a pruned model that is saved.
    """
    model, run, zeros = finished.net.model, finished.run, {}
    if finished.spec.prune.name != "none":
        if has_adapter(model):
            model = merged(finished.spec, finished.net, finished.place, finished.text)
        zeros = pruning.sparsity(model)
    if not has_adapter(model):
        folder = run.path / "model"
        anew(folder, lambda made: _fill(made, finished, lambda: finished.net.save(model, made)))
        return folder, zeros
    base = finished.place
    if base is None:  # random weights lie nowhere yet, and an adapter is worth nothing without its base
        base = str(run.path / "base")
        anew(Path(base), lambda made: _save_base(model, made))
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.revision = finished.spec.model.revision
    folder = run.path / "adapter"
    # The embedding is not trained; "auto" would ask the hub about it.
    anew(
        folder,
        lambda made: _fill(made, finished, lambda: model.save_pretrained(made, save_embedding_layers=False)),
    )
    return folder, zeros


def _fill(folder: Path, finished: Finished, save_weights: Callable[[], None]) -> None:
    save_weights()
    finished.tokenizer.save(folder)


def _save_base(model: Any, folder: Path) -> None:
    """Takes the adapter's layers off a copy of the state dict and saves what is underneath."""
    base, dtype = model.get_base_model(), trunk(model).norm.weight.dtype
    # a tied matrix under both its names
    modules = base.named_modules(remove_duplicate=False)
    held = {name for name, module in modules if isinstance(module, Matrix)}
    plain = {
        name.replace(".base_layer.", "."): tensor.to(dtype)
        for name, tensor in base.state_dict().items()
        if ".lora_" not in name and name.rpartition(".")[0] not in held
    }
    for name in held:  # whole again: what the adapter was trained beside
        layer = name.removesuffix(".matrix").replace(".base_layer", "")
        plain[f"{layer}.weight"] = base.get_submodule(name).whole(dtype)
    fresh = type(base)(base.config)
    fresh.to(dtype).load_state_dict(plain)
    fresh.save_pretrained(folder)


def _zeros(spec: ExperimentSpec, result: dict[str, Any]) -> list[str]:
    if "sparsity" not in result:
        return []
    return [
        f"| zeros | {result['sparsity']:.2%} of the blocks' linear layers, {result['sparsity_of_model']:.2%} of"
        f" the model (prune={spec.prune.name}) |"
    ]


def card(spec: ExperimentSpec, result: dict[str, Any], memory: dict[str, Any] | None = None) -> str:
    """The result as a page of Markdown; `memory`: the run's memory.json, where it has one."""
    change = result["eval_perplexity_after"] / result["eval_perplexity_before"] - 1
    share = result["trainable_parameters"] / result["parameters"]
    mfu = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    where = f"{result['world_size']} processes on {result['nodes']} node{'s' * (result['nodes'] != 1)}"
    lines = [
        f"# {spec.name}",
        "",
        f"{spec.model.name} on {spec.data.kind}, {spec.task.name}, {spec.peft.name}, {spec.parallel.name}: {where}.",
        "",
        "| held-out | before | after | change |",
        "|---|---|---|---|",
        f"| loss | {result['eval_loss_before']:.4f} | {result['eval_loss_after']:.4f}"
        f" | {result['eval_loss_after'] - result['eval_loss_before']:+.4f} |",
        f"| perplexity | {result['eval_perplexity_before']:.3f} | {result['eval_perplexity_after']:.3f}"
        f" | {change:+.1%} |",
        "",
        "![loss](loss.png)",
        "",
        "| | |",
        "|---|---|",
        f"| steps | {result['steps']} of {spec.trainer.global_batch_size} × {spec.data.seq_len} tokens |",
        f"| training | {result['train_s']:.1f} s, {result['tokens']:,} tokens,"
        f" {result['tokens_per_s']:,.0f} tokens/s{mfu} |",
        f"| peak memory | {result['peak_memory_bytes'] / 2**30:.2f} GiB a process |",
        *([f"| memory | {memory_report.in_short(memory)} |"] if memory else []),
        f"| parameters | {result['trainable_parameters']:,} of {result['parameters']:,} trained ({share:.2%}) |",
        *_zeros(spec, result),
        f"| precision | {spec.trainer.precision} |",
        f"| optimizer | {spec.optim.name}, lr {spec.optim.lr:g}, {spec.optim.schedule},"
        f" {spec.optim.warmup_steps} warm-up steps |",
        f"| seed | {spec.seed} |",
        f"| weights | `{result['adapter'] or result['model']}` |",
        f"| hpcdl | {__version__} |",
        "",
    ]
    if spec.task.sample_prompt:
        sample = result["sample"]
        for title in ("before", "after"):
            lines += [f"## Sample {title}", "", "```text", f"{sample['prompt']}▸{sample[title]}", "```", ""]
    return "\n".join(lines)
