"""The torch side of the strategies: what `build()` of hpcdl/parallel/ calls on compute nodes.

mesh.py           this rank's place in the device mesh
decoder.py        a Llama-like decoder as stages: blocks, cuts, names that stay the whole model's
losses.py         linear + cross-entropy in chunks; over a vocabulary that is sharded too
parallelize.py    the order in which everything is put around the model: one function
engine.py         what the loop drives: forward and backward, gradient norm, step, evaluation, state
tensor.py         tensor and sequence parallel
context.py        attention over a sequence that several ranks share
stages.py         how a pipeline is laid out: blocks by cost, stages on ranks, what schedules ask for (no torch)
pipeline.py       pipeline schedules
local.py          copies that are averaged now and then: local SGD, DiLoCo
server.py         parameter server over RPC
hogwild.py        one copy in shared memory, no locks
stream.py         a layer in memory at a time, updated on its way back
shelf.py          tensors in a working file           residence.py  a model whose weights lie there
slices.py         the output head, a slice of the vocabulary at a time
collectives.py    many tensors in few collectives
"""
