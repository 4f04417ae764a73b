"""Prompts with what tells a right answer: a reward's own, or those of `data`; the same on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from typing import cast

from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec
from hpcdl.tasks.policy_gradient import Config
from hpcdl.worker import rewards, tasks
from hpcdl.worker.data.batches import Order
from hpcdl.worker.data.prepare import Rows, heldout_indices
from hpcdl.worker.data.records import Record
from hpcdl.worker.data.sources import KINDS
from hpcdl.worker.rewards import Problem
from hpcdl.worker.rl import draw
from hpcdl.worker.tokenizer import Tokenizer

DRAWS = 100
"""Times that a problem is drawn until it is none of those held out."""


class Problems:
    """Those to train on, and those held out; each with its reward."""

    train: Rows | None = None
    """There is no text that a model could be pruned by, or rounded."""

    def __init__(self, spec: ExperimentSpec, tokenizer: Tokenizer) -> None:
        """Reads the reward, and the problems where they are data.

        Raises:
            HpcdlError: one of them can't be had.
        """
        self._config, self._spec, self._tokenizer = cast(Config, spec.task), spec, tokenizer
        assert self._config.reward is not None, "checked before submission"
        self._reward = rewards.load(self._config.reward)
        self._given: list[Problem] = []
        self._heldout: list[Problem] = []
        self._kept: frozenset[Problem] = frozenset()
        content = [self._reward.path.read_text(encoding="utf-8"), tokenizer.digest, spec.data.kind]
        if spec.data.kind != "none":
            content.append(self._read())
            self._order = Order(len(self._given), spec.seed)
        self.digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()
        """Names the content: two runs with the same digest are asked the same, and told the same."""

    def _read(self) -> str:
        data = self._spec.data
        source = KINDS[data.kind](data, self._spec.seed)
        found = [_asked(record) for record in source.records()]
        if len(found) < 2:
            raise HpcdlError(
                f"data={data.kind} has {len(found)} problems: at least 2 are needed, one held out"
            )
        heldout = heldout_indices(len(found), data.split, self._spec.seed)
        for number, problem in enumerate(found):
            (self._heldout if number in heldout else self._given).append(problem)
        fitting = [problem for problem in self._given if len(self.tokens(problem)) <= self.room]
        if not fitting:
            raise HpcdlError(
                f"no prompt has room in data.seq_len={data.seq_len} beside an answer of"
                f" task.max_new_tokens={self._config.max_new_tokens}"
            )
        self._given = fitting
        self._heldout = [each for each in self._heldout if len(self.tokens(each)) <= self.room] or fitting[:1]
        return source.digest()

    @property
    def room(self) -> int:
        """Tokens that a prompt may have."""
        return self._spec.data.seq_len - self._config.max_new_tokens

    def of(self, iteration: int) -> list[Problem]:
        """An iteration's, which counts from 1."""
        count = self._config.prompts
        first = (iteration - 1) * count
        if self._given:
            return [self._given[row] for row in self._order.rows(first, count)]
        return [self._other(first + number) for number in range(count)]

    def heldout(self) -> list[Problem]:
        """`trainer.eval_samples` at most, the same at each evaluation."""
        most = self._spec.trainer.eval_samples
        if self._given:
            return self._heldout[:most]
        return [self._made(draw.HELDOUT + draw.PROBLEM, number) for number in range(most)]

    def _other(self, number: int) -> Problem:
        """One to train on: drawn anew while it is among those held out; a reward may know no others than these."""
        if not self._kept:
            self._kept = frozenset(self.heldout())
        made = self._made(draw.PROBLEM, number)
        for again in range(1, DRAWS):
            if made not in self._kept:
                break
            made = self._made(draw.PROBLEM, number, again)
        return made

    def _made(self, purpose: int, *place: int) -> Problem:
        assert self._reward.problem is not None, "checked before submission"
        made = self._reward.problem(random.Random(draw.number(self._spec.seed, purpose, *place)))
        if len(self.tokens(made)) > self.room:
            raise HpcdlError(
                f"task.reward={self._config.reward}: a prompt of {len(self.tokens(made))} tokens has no room in"
                f" data.seq_len={self._spec.data.seq_len} beside an answer of {self._config.max_new_tokens}"
            )
        return made

    def tokens(self, problem: Problem) -> list[int]:
        """A prompt as the model reads it."""
        how = tasks.get("sft" if self._config.chat else "pretrain")
        return how.prompt(problem.prompt, self._tokenizer)

    def text(self, tokens: Sequence[int]) -> str:
        """An answer as it reads, without its end."""
        return self._tokenizer.decode([each for each in tokens if each != self._tokenizer.eos_id])

    def worth(self, problem: Problem, answer: str) -> float:
        """What the reward says.

        Raises:
            HpcdlError: it fails, or says no number.
        """
        try:
            value = float(self._reward.reward(problem, answer))
        except Exception as error:
            raise HpcdlError(
                f"task.reward={self._config.reward} fails on {answer!r}: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise HpcdlError(
                f"task.reward={self._config.reward} says {value} of {answer!r}: a reward is finite"
            )
        return value


def _asked(record: Record) -> Problem:
    """The first question of a document, and its answer."""
    turns = {message["role"]: message["content"] for message in reversed(record.messages)}
    if "user" not in turns or "assistant" not in turns:
        raise HpcdlError(
            "task.method=grpo: a document without a question and its answer; check data.prompt_field and"
            " data.answer_field, or take data=none with a reward that makes its own problems"
        )
    return Problem(turns["user"], turns["assistant"])
