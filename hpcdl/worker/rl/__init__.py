"""Policy gradients: samples taken by all ranks, gone over by all ranks, the same whatever their number.

draw.py          what is random: a function of (seed, purpose, iteration, sample), never of a rank
exchange.py      every rank's rows on all ranks
loop.py          iterations, evaluations, metrics, checkpoints, for any Learner
finish.py        what is left: the result, its card, its plot
advantages.py    generalised advantage estimation; advantages within a group
environments.py  copies of an environment, played by a policy
policy.py        the network that plays, its loss (PPO, REINFORCE), its engine
playing.py       the Learner of an environment
problems.py      prompts with what tells a right answer, and their reward
writing.py       answers, with a cache of keys and values, under any data-parallel strategy
lesson.py        a language model's loss (GRPO), and its logarithms of probabilities
answering.py     the Learner of a language model
"""
