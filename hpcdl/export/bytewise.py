"""hpcdl's byte tokenizer as files that any tool reads: a byte-level BPE without merges, and four special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = {256: "<|bos|>", 257: "<|eos|>", 258: "<|pad|>", 259: "<|turn|>"}
CHAT = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|turn|>{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""hpcdl.worker.tokenizer.plain_chat."""


def letters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE (Radford et al., GPT-2, 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def write(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json into `folder`."""
    cutter: dict[str, Any] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": word, **flags} for number, word in SPECIAL.items()],
        "pre_tokenizer": cutter, "decoder": cutter,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {letter: byte for byte, letter in enumerate(letters())}, "merges": [],
        },
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT,
        "bos_token": SPECIAL[256], "eos_token": SPECIAL[257], "pad_token": SPECIAL[258],
    }  # fmt: skip
    for name, content in (("tokenizer.json", whole), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
