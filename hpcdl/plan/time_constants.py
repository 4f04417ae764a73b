"""What the plan of a step's time counts with, beside the rates of a device (hpcdl.plan.devices)."""

from __future__ import annotations

STATE_NUMBERS = {"adamw": 2.0, "adamw8bit": 0.5, "sgd": 1.0}
"""Of optimizer state a trained number, in fp32 numbers."""
OPTIMIZER_BYTES = {"adamw": 28, "sgd": 20, "adamw8bit": 30}
"""Moved a trained number: weight, gradient and state read, weight and state written (fused kernels)."""
SLOW_8BIT = {"cpu": 20.0, "cuda": 1.5}
"""bitsandbytes' steps against torch's fused AdamW: measured on 2 cores of a Zen 4; on GPUs not measured here."""
DEQUANTIZE = {"cpu": 6.0, "cuda": 1.6}
"""Bytes as if moved for each byte read and written by what makes 4-bit weights whole: it looks values up. On a CPU
bitsandbytes makes 58.7M weights in 0.09–0.16 s."""
FUSED = 0.4
"""Of the bytes that elementwise operations move, what is left where torch.compile has fused them."""
IN_PLACE = {"cpu": 4.0, "cuda": 1.0}
"""How much quicker than elsewhere memory moves where nothing new is allocated: fused AdamW, 28–35 GB/s on one core."""
BACKWARD_MOVED = 1.5
"""Bytes that a block's elementwise operations move backward, against forward."""
CLIP_BYTES = {False: 4, True: 12}
"""For the norm of the gradients, and for clipping them too."""

OPERATIONS = {"block": 62, "backward": 90, "adapter": 14, "head": 20, "edge": 40, "tensor": 3}
"""torch operations started: of a block forward, and backward; for each adapted matrix; of a chunk of the loss; of
embedding, mask, rotary angles and last norm; for each trained tensor of an optimizer's step."""
WRAPPED = {"fsdp": 230, "tp": 400, "cp": 95, "pp": 90, "recompute": 250, "autocast": 40, "rpc": 200}
"""The same of what else goes on in Python, as time on one core over the time of an operation: of FSDP, DTensors,
context parallel and autocast a block and pass; of a pipeline's schedule a stage, micro-batch and pass; of checkpointing
a block computed again; of the parameter server a tensor. CPU time of two ranks, a Llama of width 128 and
4 blocks, against DDP's, on a machine that did other work: good to a quarter."""
STEP_OPERATIONS = 300
"""Of a step besides: loader, gathering and writing numbers, learning rate, signals."""
MASKED = 0.6
"""Of FlashAttention's rate what SDPA's memory-efficient kernel reaches, which takes masks; an estimate."""
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
"""As hpcdl.distributed.losses has them (which imports torch); a test compares them."""
PARKING_BYTES_PER_S = {"host": 20e9, "disk": 0.5e9}
"""Over PCIe 4.0, as copies to pinned memory reach it, and to a disk of the node."""
HOST_BYTES_PER_S = 40e9
"""Of a host's memory where its cores take the optimizer's step, a GPU's share of them."""
