"""The Learner of a language model: all ranks write answers, and share each update.

Source: Shao et al., "DeepSeekMath", 2024, section 4.1 (GRPO).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcdl.compress import none
from hpcdl.distributed import data_parallel
from hpcdl.distributed.clipped import Terms
from hpcdl.distributed.decoder import Stage
from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.losses import IGNORE
from hpcdl.spec import ExperimentSpec
from hpcdl.tasks.policy_gradient import Config
from hpcdl.worker import model, network
from hpcdl.worker.control import gather
from hpcdl.worker.data.batches import share
from hpcdl.worker.rewards import Problem
from hpcdl.worker.rl import draw
from hpcdl.worker.rl.advantages import within_groups
from hpcdl.worker.rl.exchange import all_rows
from hpcdl.worker.rl.lesson import Lesson, adapters_off, logs_of
from hpcdl.worker.rl.loop import Iteration
from hpcdl.worker.rl.problems import Problems
from hpcdl.worker.rl.writing import gathered, lengths, manner, write
from hpcdl.worker.sample import has_adapter
from hpcdl.worker.tokenizer import Tokenizer
from hpcdl.worker.training import Ready


def terms(config: Config) -> Terms:
    """What the loss is made of."""
    return Terms(clip=config.clip, kl_coef=config.kl_coef, temperature=config.temperature)


class Answerer:
    """Answers with the policy as it is, then goes over what all ranks have written."""

    counts = "tokens"

    def __init__(self, spec: ExperimentSpec, ready: Ready[Problems]) -> None:
        """Takes the model under its strategy, whose loss is a Lesson already; loads the reference, where one is held.

        Args:
            spec: the experiment.
            ready: the model and the problems.
        """
        self.engine: Engine = ready.engine
        self.config = cast(Config, spec.task)
        self._spec, self._problems, self._net = spec, ready.data, ready.net
        self._lesson = cast(Lesson, ready.lesson)
        self._tokenizer: Tokenizer = ready.tokenizer
        self._rank, self._ranks = ready.grid.data_place
        wrapped = ready.engine.stages[0]
        self._stage = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        self.engine.stages.train()
        self._reference: nn.Module | None = None
        if self.config.kl_coef and not has_adapter(ready.net.model):
            self._reference = self._second_copy(ready)

    def _second_copy(self, ready: Ready[Problems]) -> nn.Module:
        """The model as the run began with it, frozen; sharded as the policy is."""
        untrained = replace(self._spec, peft=none.Config(name="none"))
        net = network.prepare(untrained, model.load(self._spec, ready.place), self.engine.device)
        net.model.requires_grad_(False)
        stage, dims, config = Stage(net.model), ready.grid.dims, cast(Any, self._spec.parallel)
        Lesson(stage, terms(self.config), self.engine.device)
        if dims.dp_shard > 1 or config.cpu_offload:
            return data_parallel.fully_shard(config, stage, ready.grid, bf16=net.autocast).eval()
        return stage.to(self.engine.device).eval()

    # --- an iteration -------------------------------------------------------------------------------------

    def iterate(self, iteration: int, learning_rate: float, settle: Callable[[], None]) -> Iteration:
        """Answers, then takes the optimizer's steps."""
        started = time.perf_counter()
        problems = [each for each in self._problems.of(iteration) for _ in range(self.config.group)]
        chances = [
            draw.stream(self._spec.seed, draw.WRITE, iteration, number).random(self.config.max_new_tokens)
            for number in range(len(problems))
        ]
        written = self._answers(problems, np.stack(chances))
        rows = self.samples(problems, written)
        sampling_s = time.perf_counter() - started
        settle()
        norms = []
        for chosen in self._minibatches(iteration):
            mine = share(chosen, self._rank, self._ranks)
            self._lesson.accumulate(self.engine, self._micro_batches(rows, mine), len(chosen))
            norms.append(self.engine.step(learning_rate, self._spec.trainer.max_grad_norm))
        sums = gather(list(self._lesson.measured()), self.engine.device).sum(dim=0)
        means = sums / (self.config.samples * self.config.epochs)
        worth, count = written["worth"], written["count"]
        groups = worth.view(self.config.prompts, self.config.group)
        return Iteration(
            measured={
                "reward": float(worth.mean()),
                "reward_std": float(worth.std()),
                "silent_groups": float((groups.amax(1) == groups.amin(1)).double().mean()),
                "answer_tokens": float(count.double().mean()),
                **dict(zip(Lesson.names, means.tolist(), strict=True)),
                "grad_norm": float(np.mean(norms)),
            },
            count=int(count.sum()) + sum(len(self._problems.tokens(each)) for each in problems),
            sampling_s=sampling_s,
        )

    def _answers(self, problems: Sequence[Problem], chances: Any | None) -> Batch:
        """All ranks' answers, in the problems' order: `tokens` `(problems, most)`, `count` of them, `worth` fp64.

        Those that are written together are the same whatever the number of ranks: so are the matrix products, to the
        last bit, that say what is drawn.
        """
        device, most = self.engine.device, self.config.max_new_tokens
        how = manner(self._tokenizer, most, self.config.temperature)
        size = self.config.write_batch
        found: dict[str, list[Tensor]] = {
            "number": [torch.zeros(0, dtype=torch.int64, device=device)],
            "tokens": [torch.zeros(0, most, dtype=torch.int64, device=device)],
            "worth": [torch.zeros(0, dtype=torch.float64, device=device)],
        }
        parallel = cast(Any, self._spec.parallel)
        with gathered(self._stage, how.pad_id, reshard=parallel.reshard_after_forward), self.engine.context():
            for first in range(self._rank * size, len(problems), self._ranks * size):
                some = problems[first : first + size]
                drawn = None if chances is None else torch.from_numpy(chances[first : first + size])
                tokens = write(self._stage, [self._problems.tokens(each) for each in some], how, drawn)
                worth = [self._worth(*pair) for pair in zip(some, tokens.tolist(), strict=True)]
                found["number"].append(torch.arange(first, first + len(some), device=device))
                found["tokens"].append(tokens)
                found["worth"].append(torch.tensor(worth, dtype=torch.float64, device=device))
        rows = all_rows({name: torch.cat(each) for name, each in found.items()}, self._ranks)
        order = rows.pop("number").argsort()
        rows = {name: each[order] for name, each in rows.items()}
        return {**rows, "count": lengths(rows["tokens"], how.eos_id)}

    def _worth(self, problem: Problem, tokens: Sequence[int]) -> float:
        eos = self._tokenizer.eos_id
        written = tokens[: tokens.index(eos)] if eos in tokens else tokens
        return self._problems.worth(problem, self._problems.text(written))

    def samples(self, problems: Sequence[Problem], written: Batch) -> Batch:
        """What GRPO goes over, a row an answer: the model's inputs, and what the loss needs to know."""
        prompts = [self._problems.tokens(each) for each in problems]
        rows = sequences(prompts, written["tokens"], written["count"], self._tokenizer.pad_id)
        worth = written["worth"].view(-1, self.config.group)
        rows["advantages"] = within_groups(worth).flatten().float()
        rows["weights"] = 1.0 / written["count"].float()
        mine = share(np.arange(len(prompts)), self._rank, self._ranks)
        batches = self._micro_batches(rows, mine)
        logs: Batch = {}
        self._stage.eval()
        with self.engine.context():
            if self.config.updates(self._spec.trainer.global_batch_size) > 1:
                logs["old"] = logs_of(self._stage, batches)
            if self.config.kl_coef and self._reference is not None:
                logs["reference"] = logs_of(self._reference, batches)
            elif self.config.kl_coef:
                with adapters_off(self._net.model):
                    logs["reference"] = logs_of(self._stage, batches)
        self._stage.train()
        return {**rows, **(all_rows(logs, self._ranks) if logs else {})}

    def _minibatches(self, iteration: int) -> Iterator[Any]:
        """Rows of each optimizer step's samples, over all ranks."""
        batch = self._spec.trainer.global_batch_size
        for epoch in range(self.config.epochs):
            order = draw.permutation(self._spec.seed, iteration, epoch, self.config.samples)
            yield from (order[at : at + batch] for at in range(0, len(order), batch))

    def _micro_batches(self, rows: Batch, mine: Any) -> list[Batch]:
        """Some rows, a forward pass' worth each."""
        size, device = self._spec.trainer.micro_batch_size, self.engine.device
        parts = [torch.from_numpy(mine[at : at + size]).to(device) for at in range(0, len(mine), size)]
        return [{name: each[part] for name, each in rows.items()} for part in parts]

    # --- evaluation ---------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Mean reward of the likeliest answers to held-out problems, `trainer.eval_samples` of them at most."""
        written = self._answers(self._problems.heldout(), None)
        return {"eval_reward": float(written["worth"].mean())}

    def worth(self, evaluated: Mapping[str, float]) -> float:
        """The mean reward."""
        return evaluated["eval_reward"]


def sequences(prompts: Sequence[Sequence[int]], answers: Tensor, counts: Tensor, pad_id: int) -> Batch:
    """Prompts with their answers, padded on the right; only answers are targets.

    Args:
        prompts: tokens.
        answers: `(rows, most)`, padded.
        counts: tokens of each answer, `(rows,)`.
        pad_id: fills the rest, which no token attends to.
    """
    sizes = counts.tolist()
    longest = max(len(prompt) + size for prompt, size in zip(prompts, sizes, strict=True))
    tokens = torch.full((len(prompts), longest), pad_id, device=answers.device)
    labels = torch.full((len(prompts), longest), IGNORE, device=answers.device)
    for row, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=answers.device)
        part = slice(len(prompt), len(prompt) + size)
        tokens[row, part] = labels[row, part] = answers[row, :size]
    positions = torch.arange(longest - 1, device=answers.device).expand(len(prompts), -1)
    return {"input_ids": tokens[:, :-1], "position_ids": positions, "labels": labels[:, 1:]}
