"""Published training setups against the plan: memory of a GPU, and tokens a second.

Two plans of each row:
- *program*: the published program's own way, by its options as its code has them (benchmarks/_published.py,
  `Program`): what it recomputes, logits all at once, what a pipeline keeps gathered. The published number is held
  against this.
- *hpcdl*: what `hpcdl plan` says of the nearest settings here. hpcdl takes the loss in chunks and lets go of more, so
  it needs less; where it recomputes otherwise, it needs more.
Where neither knows a part (float8's speed), the row says so. Exits with 1 where a program's memory is off by more than
15 %.

    python benchmarks/planner_published.py [--write docs/planner.md] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._published import H100S, ROWS, Row
from benchmarks._results import leave
from hpcdl import compress
from hpcdl.compress import quant
from hpcdl.plan import devices, memory, time
from hpcdl.plan.records import Hardware, StepTime
from hpcdl.runs.spec import spec_of
from hpcdl.spec import ExperimentSpec, ModelShape
from hpcdl.spec.layout import head_dim, matrices

GIB = 2**30
GOAL = 0.15
BEGIN, END = (
    "<!-- benchmarks/planner_published.py begins -->",
    "<!-- benchmarks/planner_published.py ends -->",
)
A_NODE = 8
"""GPUs, where a row has as many."""


def hardware(row: Row) -> Hardware:
    """What the row ran on."""
    line = devices.gpu("H100" if row.gpu == H100S else row.gpu)
    assert line is not None
    if row.gpu == H100S:  # Grand Teton's: HBM2e, 500 W (torchtitan's own words)
        # reached: between an H100 PCIe's 454 TFLOP/s at 350 W and an SXM's 722 at 700 W, by the watts
        line = replace(line, mib=96 * 1024, bandwidth=2400e9, reached=0.575)
    here = min(A_NODE, row.ranks)
    return Hardware(
        device=devices.of_gpu(line),
        links=devices.links_of(line),
        ranks_per_node=here,
        nodes=row.ranks // here,
    )


def experiment(row: Row) -> ExperimentSpec:
    """The nearest settings that hpcdl has."""
    shard, cp, tp, pp = row.degrees
    copies = row.ranks // (shard * cp * tp * pp)
    name = "pp" if pp > 1 else "fsdp" if shard > 1 or cp > 1 or tp > 1 else "ddp"
    micro = row.program.micro_batches if pp > 1 else row.accumulate
    here = min(A_NODE, row.ranks)
    degrees = {"dp_replicate": copies, "dp_shard": shard, "cp": cp, "tp": tp, "pp": pp}
    schedule = {"schedule": row.schedule, "reshard_after_forward": pp == 1}
    recompute = {"op": "selective", "full": "full", "none": "none"}[row.program.recompute]
    return spec_of({
        "name": "published",
        "model": {"name": "published", "shape": row.shape},
        "data": {"kind": "synthetic", "seq_len": row.seq, "packing": False},
        "parallel": {"name": name, **degrees, **schedule},
        "peft": {"name": "lora", **row.lora} if row.lora else {"name": "none"},
        "quant": row.quant or {"scheme": "none"},
        "prune": {"name": "none"},
        "offload": {"name": "none"},
        "task": {"name": "pretrain", "sample_prompt": ""},
        "optim": {"name": "adamw"},
        "trainer": {
            "max_steps": 1, "global_batch_size": row.sequences * shard * copies,
            "micro_batch_size": row.sequences // micro, "precision": "bf16", "activation_checkpointing": recompute,
        },
        "cluster": {
            "kind": "slurm", "nodes": row.ranks // here, "processes_per_node": here, "gpus_per_node": here,
        },
        "tracker": {"name": "none"}, "monitor": {"name": "none"}, "preflight": {"name": "default"},
    })  # fmt: skip


# --- the program's own memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Bytes of a rank under a published program."""

    row: Row
    spec: ExperimentSpec

    @cached_property
    def shape(self) -> ModelShape:
        """The model's."""
        assert self.spec.model.shape is not None
        return self.spec.model.shape

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a rank."""
        _, cp, _, _ = self.row.degrees
        return self.spec.trainer.micro_batch_size * self.row.seq // cp

    @cached_property
    def block(self) -> float:
        """Numbers of a block on a rank, before they are sharded."""
        _, _, tp, _ = self.row.degrees
        return sum(m.numel for m in matrices(self.shape) if m.role == "block") / tp

    @cached_property
    def edge(self) -> float:
        """Numbers of the embedding, and of the head, on a rank."""
        return self.shape.vocab_size * self.shape.hidden_size / self.row.degrees[2]

    def kept(self) -> float:
        """Bytes that a block keeps of a micro-batch."""
        shape, (_, _, tp, _) = self.shape, self.row.degrees
        heads = shape.num_attention_heads * head_dim(shape)
        keys = shape.num_key_value_heads * head_dim(shape)
        inner, width = shape.intermediate_size, shape.hidden_size
        entering = 2 * self.tokens * width / tp  # the residual, split along the sequence
        if self.row.program.recompute == "full":
            return entering
        attention = 2 * heads + 4 * shape.num_attention_heads  # its result, and a logsumexp a head
        if self.row.program.recompute == "op":  # of q, k, v, o, w1, w3, w2: q, v, w1 and w2's results
            return (
                entering
                + self.tokens * (attention + 2 * (heads + keys + inner)) / tp
                + 2 * self.tokens * width
            )
        # Nothing is computed again: q, k, v, o's input, two norms' inputs and results, w1, w3, silu, their product
        return (
            entering
            + self.tokens * (attention + 2 * (heads + 2 * keys) + 2 * 4 * inner) / tp
            + 10 * self.tokens * width
        )

    def working(self) -> float:
        """Bytes of a block on its way back: what it computes again, and the gradients that pass."""
        shape, (_, _, tp, _) = self.shape, self.row.degrees
        heads, inner = shape.num_attention_heads * head_dim(shape) / tp, shape.intermediate_size / tp
        width = shape.hidden_size
        mlp = 2 * 7 * inner if self.row.program.recompute == "full" else 2 * 5 * inner
        # norms and rotary embedding: fp32 copies and results, where nothing is fused
        others = 2 * 2 * width + 4 * heads if self.row.program.compiled else 20 * width / tp + 20 * heads
        gathered = (
            6 * 2 * width if tp > 1 else 2 * 2 * width
        )  # inputs, partial results and their gradients, whole
        return self.tokens * (mlp + others + gathered)

    def logits(self) -> float:
        """Bytes of the loss at its highest moment."""
        program, rows = self.row.program, self.shape.vocab_size / self.row.degrees[2]
        if program.loss_in_chunks > 1:
            return self.tokens * rows * (2 + program.logit_bytes / program.loss_in_chunks)
        return self.tokens * rows * program.logit_bytes + 2 * self.tokens * self.shape.hidden_size

    def stages(self) -> Iterator[tuple[float, bool, bool]]:
        """Blocks of each rank of a pipeline, and whether it has the embedding and the head.

        torchtitan's generate_split_points: the first and the last stage get no more than their share rounded down.
        """
        pp, each = self.row.degrees[3], self.row.program.stages_per_rank
        layers, count = self.shape.num_hidden_layers, self.row.degrees[3] * self.row.program.stages_per_rank
        least, more = divmod(layers, count)
        sizes = [least + (0 < stage <= more) for stage in range(count)]
        for rank in range(pp):
            mine = range(rank, count, pp)
            yield sum(sizes[stage] for stage in mine) * 1.0, rank == 0, rank == pp - 1
        assert sum(sizes) == layers and each >= 1

    def waiting(self, rank: int) -> float:
        """Micro-batches whose way back hasn't begun, times stages, over a rank's stages: 1F1B's warm-up."""
        pp, program = self.row.degrees[3], self.row.program
        if pp == 1:
            return 1.0
        v, m = program.stages_per_rank, program.micro_batches
        most = pp - rank if v == 1 else ((pp - rank - 1) * 2 + (v - 1) * pp + 1) / v
        return min(m, most)

    def peak(self) -> float:
        """Of the rank that holds most, as torch's allocator has reserved it."""
        ranks = [self._rank(rank, *stage) for rank, stage in enumerate(self.stages())]
        return self.row.program.reserved * max(ranks)

    def _rank(self, rank: int, blocks: float, first: bool, last: bool) -> float:
        shard, cp, _, pp = self.row.degrees
        shard = shard * cp if shard * cp > 1 else 1
        numbers = blocks * self.block + self.edge * (first + last)
        gradients = 4 * numbers / shard
        if self.row.lora is not None:
            return self._lora(blocks, shard)
        state = 12 * numbers / shard  # fp32 parameters and AdamW's moments
        kept = blocks * self.kept() * self.waiting(rank)
        if pp > 1:  # gathered all along, and gradients whole in fp32 until the last micro-batch
            held = (
                (2 + 4) * numbers + kept + 2 * 2 * self.tokens * self.shape.hidden_size / self.row.degrees[2]
            )
            own = self.working() + 2 * self.block
            return state + held + max(own, self.logits() if last else 0.0)
        ends = 2 * 2 * self.edge  # embedding and head, gathered
        loss = kept + ends + 2 * self.block + self.logits()
        back = kept + ends + gradients + self.working() + (2 * 2 + 2 + 2 * 4) * self.block
        return state + max(loss, back, gradients)

    def _lora(self, blocks: float, shard: int) -> float:
        """A frozen base in few bits: gathered block by block where it is shared, embedding and head in bf16."""
        scheme, method = quant.get(self.spec.quant.scheme), compress.get(self.spec.peft.name)
        own = [m for m in matrices(self.shape) if m.role == "block"]
        block = sum(scheme.memory(self.spec.quant, m, 2, 2).bytes for m in own)
        adapters = sum(method.memory(self.spec.peft, m).parameters for m in own)
        held = (
            blocks * block + 2 * 2 * self.edge + blocks * adapters * 4 * 2
        ) / shard  # bf16, AdamW's moments too
        gathered = (2 * (block + 2 * adapters) + 2 * 2 * self.edge) if shard > 1 else 0.0
        whole = 2 * max(m.numel for m in own)
        kept = blocks * self.kept()
        return held + gathered + kept + max(self.logits(), self.working() + whole)


# --- the table --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row with its plans."""

    row: Row
    program_gib: float
    hpcdl_gib: float | None
    time: StepTime | None

    @property
    def memory_error(self) -> float | None:
        """Of the program's plan, relative."""
        return None if self.row.gib is None else self.program_gib / self.row.gib - 1

    @property
    def planned_tokens(self) -> float | None:
        """A GPU's, where the plan knows the precision."""
        return None if self.time is None or not self.row.timed else self.time.tokens_per_s / self.row.ranks

    @property
    def speed_error(self) -> float | None:
        """Relative."""
        planned, told = self.planned_tokens, self.row.tokens_per_s
        return None if planned is None or told is None else planned / told - 1


def planned(row: Row) -> Line:
    """Both plans of a row."""
    spec = experiment(row)
    ranks = memory.ranks(spec, device="cuda")
    timed = replace(spec, trainer=replace(spec.trainer, compile=row.program.compiled and row.degrees[3] == 1))
    return Line(
        row=row,
        program_gib=Needs(row, spec).peak() / GIB,
        hpcdl_gib=max(each.peak for each in ranks) / GIB if ranks else None,
        time=time.step(timed, hardware(row)),
    )


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    found = [
        "| setup | GPUs | published GiB | program planned | error | hpcdl would need |"
        " published tokens/s a GPU | planned | error | source |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for line in lines:
        row = line.row
        speed = (
            "not in float8" if line.planned_tokens is None and not row.timed else _number(line.planned_tokens)
        )
        program = f"{line.program_gib:.1f}" if row.gib is not None else ""
        what = f"{row.what} ({row.beyond})" if row.beyond else row.what
        cells = [
            what, f"{row.ranks} {row.gpu}", _number(row.gib), program, _percent(line.memory_error),
            _number(line.hpcdl_gib), _number(row.tokens_per_s), speed, _percent(line.speed_error), row.source,
        ]  # fmt: skip
        found.append("| " + " | ".join(cells) + " |")
    return "\n".join(found) + "\n\n" + summary(lines)


def summary(lines: Sequence[Line]) -> str:
    """In one sentence."""
    held = [line for line in lines if not line.row.beyond]
    errors = sorted(abs(line.memory_error) for line in held if line.memory_error is not None)
    speeds = sorted(abs(line.speed_error) for line in lines if line.speed_error is not None)
    return (
        f"Memory, {len(errors)} rows: median error {errors[len(errors) // 2]:.1%}, worst {errors[-1]:.1%}."
        f" Speed, {len(speeds)} rows in bf16: median error {speeds[len(speeds) // 2]:.1%}, worst {speeds[-1]:.1%}.\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where a program's memory is off by more than GOAL."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="put the table between its marks in this page"
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    chosen = parser.parse_args(arguments)
    lines = [planned(row) for row in ROWS]
    if chosen.json:
        print(json.dumps([_plain(line) for line in lines], indent=1, ensure_ascii=False))
    else:
        print(table(lines))
    if chosen.write:
        page = chosen.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            print(f"{chosen.write} lacks the marks {BEGIN} and {END}", file=sys.stderr)
            return 2
        chosen.write.write_text(f"{before}{BEGIN}\n{table(lines)}{END}{after}", encoding="utf-8")
    good = all(abs(line.memory_error or 0) <= GOAL for line in lines if not line.row.beyond)
    leave([_plain(line) for line in lines], [(f"memory within {GOAL:.0%} in every row", good)])
    return 0 if good else 1


def _plain(line: Line) -> dict[str, Any]:
    row = line.row
    return {
        "setup": row.what, "gpus": row.ranks, "gpu": row.gpu, "source": row.source, "published_gib": row.gib,
        "program_gib": round(line.program_gib, 2), "memory_error": line.memory_error, "hpcdl_gib": line.hpcdl_gib,
        "published_tokens_per_s": row.tokens_per_s, "planned_tokens_per_s": line.planned_tokens,
        "speed_error": line.speed_error,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
