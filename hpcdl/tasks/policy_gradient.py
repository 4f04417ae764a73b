"""Policy gradients: REINFORCE and PPO in environments, GRPO on language models.

Each of the loop's steps is an iteration: samples are taken with the policy as it is, then `epochs` times gone over
in optimizer steps of `trainer.global_batch_size` samples. The equations and their sources are beside the code,
in hpcdl/worker/rl/ and hpcdl/distributed/clipped.py; docs/rl.md puts them together.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec import ExperimentSpec, TaskSpec
from hpcdl.spec.parallel import ParallelDims

PLANNED = False
"""Whether the closed form of a step's memory (hpcdl.plan) is this task's too: it writes with a cache, and under
`peft=none` holds a second model, the reference."""
READS_TEXT = False
"""Whether `data` must have text: environments have none, and a reward may make its own problems."""
PLACES = {"reward": "code"}
"""What names a file, to be made absolute (hpcdl.experiment.places)."""

REWARDS = Path(__file__).parents[1] / "worker" / "rewards"
"""A file a reward, found by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """What is played or answered, and what the loss is made of."""

    method: Literal["ppo", "reinforce", "grpo"] = "ppo"
    """`reinforce` with baseline and `ppo` play an environment, `grpo` has a language model answer."""
    epochs: Annotated[int, Ge(1)] = 4
    """Times that an iteration's samples are gone over; `reinforce`: once."""
    clip: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """ε: how far the new policy's probability of a sample may be from the old one's, as a ratio; ppo and grpo."""

    environment: str = "CartPole-v1"
    """Gymnasium's id, or `module:id` of one that a module of yours registers; ppo and reinforce."""
    envs: Annotated[int, Ge(1)] = 8
    """Copies of it, over all ranks."""
    steps: Annotated[int, Ge(1)] = 500
    """Steps that each copy takes an iteration; what comes after the last is estimated by the value."""
    gamma: Annotated[float, Interval(gt=0, le=1)] = 0.99
    """Discount of a reward one step later."""
    gae_lambda: Annotated[float, Interval(ge=0, le=1)] = 0.95
    """λ of generalised advantage estimation; `reinforce` takes 1, the return less the baseline."""
    value_coef: Annotated[float, Ge(0)] = 0.5
    """Weight of the value's squared error."""
    entropy_coef: Annotated[float, Ge(0)] = 0.0
    """Weight of the entropy bonus."""

    reward: str | None = None
    """What an answer is worth; grpo: a file of hpcdl/worker/rewards by name, or the path of your own .py."""
    chat: bool = False
    """Whether a prompt is a question in the model's chat template; else a text that goes on."""
    prompts: Annotated[int, Ge(1)] = 8
    """Problems of an iteration, over all ranks."""
    group: Annotated[int, Ge(2)] = 8
    """Answers to each: they are compared with one another."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """Longest answer."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Answers are drawn from softmax(logits / this); that is the policy which is trained."""
    kl_coef: Annotated[float, Ge(0)] = 0.04
    """β: weight of the divergence from the model that the run began with; 0: there is no such reference."""
    write_batch: Annotated[int, Ge(1)] = 64
    """Answers that are written at a time on a rank; the same ones together whatever the number of ranks."""

    @property
    def plays(self) -> bool:
        """Whether it is about an environment."""
        return self.method != "grpo"

    @property
    def samples(self) -> int:
        """Samples of an iteration: steps in an environment, or answers."""
        return self.envs * self.steps if self.plays else self.prompts * self.group

    def updates(self, batch: int) -> int:
        """Optimizer steps of an iteration, of `batch` samples each."""
        return self.epochs * (self.samples // batch)


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """A model and data that the method can do something with, and ranks that each hold or gather all of it."""
    yield from _plays(config, spec) if config.plays else _answers(config, spec)
    yield from _batches(config, spec)
    yield from _strategy(config, spec)
    for section, chosen in (("prune", spec.prune.name), ("offload", spec.offload.name)):
        if chosen != "none":
            yield _other(
                section, chosen, "policy gradients have no text to look at, and write with a cache", "none"
            )


def why_unplanned(spec: ExperimentSpec) -> str:
    """Why hpcdl.plan knows no closed form, and what there is besides a training's own."""
    config = spec.task
    if not isinstance(config, Config) or config.plays:
        return "task=policy_gradient plays an environment, whose own memory nobody knows"
    second = config.kl_coef > 0 and spec.peft.name == "none"
    reference = (
        ", and beside the policy a second copy of the model is held, the reference (none with peft=lora, or with"
        " task.kl_coef=0)"
    )
    return f"task=policy_gradient writes answers with a cache{reference if second else ''}"


def _plays(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    how = f"task.method={config.method} plays {config.environment}"
    if spec.model.mlp is None:
        yield _other("model", spec.model.name, f"{how}, and this is a language model", "mlp")
    if spec.data.kind != "none":
        yield _other("data", spec.data.kind, f"{how}: no text is read", "none")
    for section, chosen in (("peft", spec.peft.name), ("quant", spec.quant.scheme)):
        if chosen != "none":
            yield _other(section, chosen, f"{how} with a few thousand weights, all of them trained", "none")
    if spec.cluster.world_size > config.envs:
        yield Fault(
            key="task.envs",
            value=str(config.envs),
            problem=f"there are {spec.cluster.world_size} processes, and each plays at least one",
            allowed=f"at least {spec.cluster.world_size}",
            fix=f"task.envs={spec.cluster.world_size}",
        )
    if config.method == "reinforce" and config.epochs != 1:
        yield Fault(
            key="task.epochs",
            value=str(config.epochs),
            problem="REINFORCE's gradient is that of the policy which took the samples: they serve once",
            allowed="1; task.method=ppo goes over them several times",
            fix="task.epochs=1",
        )


def _answers(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    if spec.model.mlp is not None:
        yield _other("model", spec.model.name, "task.method=grpo needs a language model", "llama_tiny")
    if config.max_new_tokens >= spec.data.seq_len:
        yield Fault(
            key="task.max_new_tokens",
            value=str(config.max_new_tokens),
            problem=f"leaves no room for a prompt in data.seq_len {spec.data.seq_len}",
            allowed=f"1 to {spec.data.seq_len - 1}",
            fix=f"data.seq_len={2 * config.max_new_tokens}",
        )
    if getattr(spec.quant, "calibration_samples", 0):
        yield _other(
            "quant", spec.quant.scheme, "calibration looks at text, and policy gradients read none", "nf4"
        )
    yield from _reward(config, spec)


def _reward(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    names = sorted(path.stem for path in REWARDS.glob("[!_]*.py"))
    allowed = f"one of {', '.join(names)}, or the path of a .py with a function reward(problem, answer)"
    if config.reward is None:
        yield _of_reward(
            "null", "GRPO needs to know what an answer is worth", allowed, fix="task.reward=sums"
        )
        return
    path = reward_file(config.reward)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError:
        near = nearest_name(config.reward, names)
        problem = "there is no such reward"
        yield _of_reward(config.reward, problem, allowed, near, f"task.reward={near or names[0]}")
        return
    except (SyntaxError, ValueError) as error:
        yield _of_reward(config.reward, f"is no Python: {error}", allowed, fix=f"mend {path}")
        return
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "reward" not in functions:
        yield _of_reward(
            config.reward, "has no function reward(problem, answer)", allowed, fix=f"mend {path}"
        )
    elif spec.data.kind == "none" and "problem" not in functions:
        problem = f"task.reward={config.reward} makes no problems of its own, and data=none has none"
        yield _other(
            "data", "none", problem, "jsonl", "jsonl or hf, with a prompt and an answer in each line"
        )
    elif spec.data.kind not in ("none", "jsonl", "hf"):
        problem = "is plain text: a problem is a prompt, and what tells a right answer"
        yield _other("data", spec.data.kind, problem, "none", "none (the reward's own), jsonl, hf")


def reward_file(name: str) -> Path:
    """The file of a reward: your own by its path, else hpcdl's by name."""
    return Path(name) if name.endswith(".py") else REWARDS / f"{name}.py"


def _batches(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    batch, samples = spec.trainer.global_batch_size, config.samples
    made = "task.envs × task.steps" if config.plays else "task.prompts × task.group"
    if samples % batch or (config.method == "reinforce" and samples != batch):
        exact = config.method == "reinforce"
        divisors = [each for each in range(1, samples + 1) if samples % each == 0]
        near = samples if exact else min(divisors, key=lambda d: (abs(d - batch), d))
        yield Fault(
            key="trainer.global_batch_size",
            value=str(batch),
            problem=f"{'is not' if exact else 'does not divide'} the {samples} samples of an iteration ({made})",
            allowed=str(samples) if exact else f"a divisor of {samples}",
            nearest=str(near),
            fix=f"trainer.global_batch_size={near}",
        )


def _strategy(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    name = spec.parallel.name
    if not hasattr(spec.parallel, "reshard_after_forward"):  # off the mesh: copies that train by themselves
        problem = "ranks with weights of their own would take samples from other policies than they train"
        yield _other("parallel", name, f"task=policy_gradient: {problem}", "ddp", "ddp, fsdp, hsdp")
        return
    for part in ("tp", "pp", "cp"):
        if getattr(dims, part) > 1:
            problem = "answers are written by whole models, each rank its own; a part of one writes none"
            yield _degree(part, getattr(dims, part), problem)
    if config.plays and dims.dp_shard > 1:
        yield _degree("dp_shard", dims.dp_shard, "a network of a few thousand weights is copied")


def _degree(part: str, degree: int, problem: str) -> Fault:
    return Fault(
        key=f"parallel.{part}",
        value=str(degree),
        problem=f"task=policy_gradient: {problem}",
        allowed="1",
        nearest="1",
        fix="parallel=ddp",
    )


def _of_reward(value: str, problem: str, allowed: str, nearest: str = "", fix: str = "") -> Fault:
    return Fault(key="task.reward", value=value, problem=problem, allowed=allowed, nearest=nearest, fix=fix)


def _other(section: str, value: str, problem: str, nearest: str, allowed: str = "") -> Fault:
    return Fault(
        key=section,
        value=value,
        problem=problem,
        allowed=allowed or nearest,
        nearest=nearest,
        fix=f"{section}={nearest}",
    )


def is_played(spec: Any) -> bool:
    """Whether an experiment's task plays an environment, so that there is no language model."""
    return isinstance(spec.task, Config) and spec.task.plays
