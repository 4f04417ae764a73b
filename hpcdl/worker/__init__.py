"""The worker: what torchrun starts once a process. Reads spec.yaml, trains, writes below the run directory.

main.py        the order of things, on one screen
process.py     who am I: rank, device, threads, process group       mesh.py     the device mesh
signals.py     asked to stop? all ranks agree                       errors.py   what a failing rank leaves behind
model.py       weights from a folder, the hub, a package, a seed    convert.py  GGUF → safetensors, once
network.py     checkpointing, compile, the model with its loss      losses.py   cross-entropy in chunks
data/          source → split → tokens → packed sequences → batches; tasks/ say what an example is
optim.py       optimizer and learning rate                          loop.py     steps, evaluation, metrics, stop
checkpoint.py  atomic save in the background, loading (staging.py, resume.py)   metrics.py  metrics.jsonl, throughput, MFU
trackers.py    wandb, tensorboard                                   monitor.py  system-<node>.jsonl
result.py      result.json, card, plot, adapter                     check_adapter.py  the same loss in plain peft?
"""
