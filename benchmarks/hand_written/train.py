"""What one writes by hand: a Llama trained with DDP, torch and transformers only (and peft with --lora).

The same work as hpcdl's experiments pretrain_tiny and lora_llama: Python's reference text in packed
sequences, held-out loss before and after, AdamW with warm-up and cosine, clipping, a line a step.

    torchrun --nproc-per-node 2 train.py --max-steps 3
"""

import argparse
import contextlib
import json
import math
import random
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, encode = load(args)
    model = DistributedDataParallel(model)
    train, held_out = sequences(encode, args.seq_len)
    optimizer, schedule = optimization(model, args)
    before = evaluate(model, held_out[: args.eval_samples])
    say(args, event="evaluation", step=0, eval_loss=before)
    for step in range(1, args.max_steps + 1):
        loss = training_step(model, optimizer, batch(train, step, args), args.micro_batch_size)
        schedule.step()
        say(args, event="step", step=step, loss=loss)
    after = evaluate(model, held_out[: args.eval_samples])
    say(args, event="evaluation", step=args.max_steps, eval_loss=after)
    save(model, optimizer, args)
    dist.barrier()
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of a model; without it a tiny one with random weights")
    parser.add_argument("--lora", type=int, help="LoRA of this rank on all linear layers")
    parser.add_argument("--max-steps", type=int, default=3)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def load(args):
    """The model, and what turns text into tokens."""
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        encode = lambda text: tokenizer(text).input_ids  # noqa: E731
    else:
        model, encode = LlamaForCausalLM(tiny()), lambda text: [*text.encode(), 256]
    model.config.use_cache = False
    if args.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
        model = get_peft_model(model, lora)
    return model, encode


def tiny():
    return LlamaConfig(
        vocab_size=272,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def sequences(encode, seq_len):
    """Packed sequences of the training text and of the held-out text, (n, seq_len + 1) each."""
    texts = [topics[name] for name in sorted(topics)]
    random.Random(0).shuffle(texts)
    cut = max(1, len(texts) // 20)
    packed = []
    for part in (texts[cut:], texts[:cut]):
        tokens = torch.tensor([token for text in part for token in encode(text)])
        packed.append(tokens[: len(tokens) // (seq_len + 1) * (seq_len + 1)].view(-1, seq_len + 1))
    return packed


def optimization(model, args):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=(0.9, 0.95))

    def factor(step):
        if step < args.warmup_steps:
            return (step + 1) / args.warmup_steps
        done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done)))

    return optimizer, LambdaLR(optimizer, factor)


def batch(data, step, args):
    """This rank's part of the global batch."""
    first = (step - 1) * args.global_batch_size % (len(data) - args.global_batch_size)
    return data[first : first + args.global_batch_size][dist.get_rank() :: dist.get_world_size()]


def training_step(model, optimizer, rows, micro_batch_size):
    """One optimizer step; returns the loss over the global batch."""
    micro = rows.split(micro_batch_size)
    total = torch.zeros(())
    for i, part in enumerate(micro):
        last = i == len(micro) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            loss = next_token_loss(model, part) * len(part) / len(rows)
            loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return (total / dist.get_world_size()).item()


def next_token_loss(model, rows):
    logits = model(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, rows):
    """Mean loss over the held-out sequences, shared among the ranks."""
    model.eval()
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    total = torch.tensor([0.0, len(mine)])
    for part in mine.split(8):
        total[0] += next_token_loss(model.module, part) * len(part)
    dist.all_reduce(total)
    model.train()
    return (total[0] / total[1]).item()


def save(model, optimizer, args):
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, args.out / "checkpoint.pt")


def say(args, **line):
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
