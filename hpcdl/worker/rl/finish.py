"""What a run of policy gradients leaves: result.json, card.md, reward.png, and the policy. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl import __version__
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.checkpoint import Totals
from hpcdl.worker.metrics import Metrics
from hpcdl.worker.plot import Curves, draw_curves
from hpcdl.worker.process import Process

MEASURED = {"env_steps": "return", "tokens": "reward"}
"""By what a Learner counts: what its evaluations measure, `eval_…`."""
WORDS = {"env_steps": "return of an episode", "tokens": "reward of an answer"}
TAKEN = {"env_steps": "episode_return", "tokens": "reward"}
"""What the samples of an iteration were worth, in metrics.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """All that a result is made from."""

    spec: ExperimentSpec
    run: RunDir
    who: Process
    metrics: Metrics
    totals: Totals
    counts: str
    """What the Learner counts."""
    what: str
    """What was played or answered, in words."""
    sizes: Mapping[str, int]
    """`parameters`, `trainable_parameters`."""


def save(
    done: Done, weights: Mapping[str, str | None], sample: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Writes everything and returns what stands in result.json.

    Args:
        done: what has been learned.
        weights: `model` and `adapter`: where they lie.
        sample: `prompt`, and how it went on `before` and `after`.
    """
    result = {**figures(done), **weights, **({"sample": dict(sample)} if sample else {})}
    measured = MEASURED[done.counts]
    lines = done.run.metrics()
    draw_curves(
        Curves(
            taken=points(lines, TAKEN[done.counts]),
            heldout=points(lines, f"eval_{measured}"),
            title=f"{done.spec.name}: {done.what}",
            label=WORDS[done.counts],
            names=("samples of the iteration", "without chance, held out"),
        ),
        done.run.path / "reward.png",
    )
    write_atomic(done.run.path / "card.md", card(done, result))
    write_json(done.run.result_file, result)
    return result


def points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Step and value of the lines that have it."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def figures(done: Done) -> dict[str, Any]:
    """Numbers of the result."""
    totals, key = done.totals, f"eval_{MEASURED[done.counts]}"
    evaluations = done.metrics.evaluations
    speed = totals.tokens_per_s
    taken = points(done.run.metrics(), TAKEN[done.counts])
    return {
        f"{key}_before": evaluations[min(evaluations)][key],
        f"{key}_after": evaluations[done.spec.trainer.max_steps][key],
        f"final_{TAKEN[done.counts]}": taken[-1][1] if taken else None,
        "steps": totals.step,
        done.counts: totals.tokens,
        f"{done.counts}_per_s": round(speed, 2),
        "train_s": round(totals.train_s, 3),
        "peak_memory_bytes": totals.peak_memory_bytes,
        "world_size": done.who.world_size,
        "nodes": done.spec.cluster.nodes,
        **done.sizes,
    }


def card(done: Done, result: Mapping[str, Any]) -> str:
    """The result as a page of Markdown."""
    spec, key, counts = done.spec, f"eval_{MEASURED[done.counts]}", done.counts
    config: Any = spec.task
    where = f"{result['world_size']} processes on {result['nodes']} node{'s' * (result['nodes'] != 1)}"
    before, after = result[f"{key}_before"], result[f"{key}_after"]
    lines = [
        f"# {spec.name}",
        "",
        f"{done.what}, {config.method}, {spec.model.name}, {spec.parallel.name}: {where}.",
        "",
        "| held out | before | after |",
        "|---|---|---|",
        f"| {WORDS[counts]} | {before:.4g} | {after:.4g} |",
        "",
        "![reward](reward.png)",
        "",
        "| | |",
        "|---|---|",
        f"| iterations | {result['steps']} of {config.samples} samples, gone over {config.epochs} times |",
        f"| training | {result['train_s']:.1f} s, {result[counts]:,} {counts.replace('_', ' ')},"
        f" {result[f'{counts}_per_s']:,.0f} a second |",
        f"| peak memory | {result['peak_memory_bytes'] / 2**30:.2f} GiB a process |",
        f"| parameters | {result['trainable_parameters']:,} of {result['parameters']:,} trained |",
        f"| optimizer | {spec.optim.name}, lr {spec.optim.lr:g}, {spec.optim.schedule} |",
        f"| seed | {spec.seed} |",
        f"| weights | `{result['adapter'] or result['model']}` |",
        f"| hpcdl | {__version__} |",
        "",
    ]
    sample = result.get("sample")
    if sample and sample["prompt"]:
        for title in ("before", "after"):
            lines += [f"## Sample {title}", "", "```text", f"{sample['prompt']}▸{sample[title]}", "```", ""]
    return "\n".join(lines)


def save_policy(policy: Any, spec: ExperimentSpec, sizes: Any, folder: Path) -> None:
    """A network that plays: its weights, and what it takes to make it again."""
    from safetensors.torch import save_file

    save_file(
        {name: each.contiguous() for name, each in policy.state_dict().items()}, folder / "policy.safetensors"
    )
    assert spec.model.mlp is not None, "checked before submission"
    config: Any = spec.task
    write_json(
        folder / "policy.json",
        {
            "environment": config.environment,
            "inputs": sizes.inputs,
            "actions": sizes.actions,
            "widths": list(spec.model.mlp.widths),
            "activation": spec.model.mlp.activation,
        },
    )
