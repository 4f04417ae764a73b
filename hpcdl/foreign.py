"""Models and adapters of others are loaded without running anything of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained` of a config, tokenizer or model: without it transformers asks whoever sits at the
terminal whether a folder's own Python may run."""
ONLY_WEIGHTS: dict[str, Any] = {**NO_CODE, "weights_only": True}
"""For models: files that torch has pickled hold tensors and nothing else. Where there are safetensors, these are
taken."""


def refuse_imports(adapter: Path) -> None:
    """Refuses an adapter whose config has peft import a module by its name (LoRA for Megatron).

    Raises:
        HpcdlError: it has.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # peft says what is wrong with it
    if isinstance(config, dict) and config.get("megatron_config"):
        raise HpcdlError(
            f"{adapter}/adapter_config.json names a Python module that is to be imported"
            f" (megatron_core={config.get('megatron_core')}): hpcdl runs no code of an adapter's"
        )
