"""What a run's nodes are doing: samples of each, and what follows from them.

records.py     the lines of system-<node>.jsonl, and how they are read
sampler.py     the thread of each node's agent that takes and writes them; allowance.py: how many bytes of them
processes.py   ranks, loaders and all else below an agent       gpus.py        through nvidia-ml-py
node.py        cores; memory, with plan/free.py           network.py     interfaces, InfiniBand
series.py      memory against steps                             trend.py       a robust slope
leaks.py       does a process leak?                             watching.py    the agent that looks for leaks
looking.py     what it asks the process that grows              stragglers.py  who is waited for; judging.py: by chance?
"""
