"""The worker: what torchrun starts once a process. Reads spec.yaml, trains, writes below the run directory.

main.py           the order of things, on one screen
process.py        who am I: rank, device, process group          threads.py     CPU threads, cores, NUMA nodes
signals.py        asked to stop? all ranks agree                 errors.py      what a failing rank leaves behind
heartbeat.py      signs of life for the agent                    preflight.py   what the nodes' links carry
unable.py         last words where nothing can be imported
model.py          weights from a folder, the hub, a package      convert.py     GGUF → safetensors, once
streamed.py       the model of offload=stream
network.py        the fine-tuning method, then the strategy      optim.py       optimizer and learning rate
data/             source → split → tokens → packed sequences → batches; tasks/ say what an example is
rl/               policy gradients, in the place of loop.py; rewards/: what answers are worth
loop.py           steps, evaluation, metrics, stop               evaluate.py    loss on held-out text
checkpoint.py     atomic save, in the background (staging.py)    resume.py      which checkpoint to go on from
metrics.py        metrics.jsonl, throughput, MFU                 trackers.py    wandb, tensorboard
communication.py  calls, bytes, seconds in collectives           result.py      result.json, card, plot, adapter
check_adapter.py  the same loss in plain peft?   growth.py       what grows in this process (alive.py)
"""
