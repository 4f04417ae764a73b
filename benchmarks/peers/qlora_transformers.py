"""QLoRA as transformers, bitsandbytes and peft document it: for benchmarks/under_8gb.py.

Sources: https://huggingface.co/docs/peft/developer_guides/quantization (BitsAndBytesConfig with NF4 and double
quantization, prepare_model_for_kbit_training, LoRA on all linear layers).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        args.folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    load_s = time.perf_counter() - started
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    took, loss = [], None
    for _ in range(args.steps):
        tokens = torch.randint(0, 256, (1, args.seq_len))
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - started)
    model.eval()
    started = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.generate(
            input_ids=tokens[:, :20], min_new_tokens=args.tokens, max_new_tokens=args.tokens, do_sample=False,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
    step_s = sum(took) / len(took)
    print(
        json.dumps(
            {
                "load_s": round(load_s, 2),
                "step_s": round(step_s, 2),
                "tokens_per_s": round(args.seq_len / step_s, 2),
                "loss_after": float(loss),
                "write_tokens_per_s": round(args.tokens / (time.perf_counter() - started), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
