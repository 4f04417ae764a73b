"""A tokenizer of the `tokenizers` library as llama.cpp's metadata has it.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and BPE with byte fallback, which is what SentencePiece's BPE becomes
(Llama 2, Mistral, TinyLlama). How text is cut before merging is told from the cutter itself; the gate then compares
the tokens of held-out text, so a cutter that only looks alike is found.

Source: https://github.com/ggml-org/llama.cpp (src/llama-vocab.cpp, gguf-py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.export.source import Source, read_json

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of tokens."""
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTERS = {_CASED + r"\p{N}{1,3}" + _REST: "llama-bpe", _CASED + r"\p{N}" + _REST: "qwen2"}
"""Regular expressions before a byte-level BPE, and llama.cpp's names of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds."""

    model: str
    """gpt2: byte-level BPE; llama: SentencePiece's BPE."""
    pre: str
    """How text is cut before merging."""
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_first: bool = False
    """Whether a space goes before a text."""
    ids: dict[str, int]
    """Of `bos`, `eos`, `unk`, `pad`, where they are known."""
    begins: bool = False
    """Whether a text begins with bos."""
    template: str | None = None
    """The chat template."""


def read(source: Source, rows: int) -> Vocabulary:
    """The vocabulary, filled up to the rows of the embedding.

    Raises:
        HpcdlError: it is of another kind, or cuts text in a way that llama.cpp has no name for.
    """
    path = source.tokenizer / "tokenizer.json"
    found = read_json(path)
    if not found:
        raise HpcdlError(f"{path} isn't there: a tokenizer of the tokenizers library is what can be exported")
    model = found["model"]
    if model.get("type") != "BPE":
        raise HpcdlError(
            f"{path} is a {model.get('type')} tokenizer; BPE and SentencePiece's BPE can be exported"
        )
    words = dict(model["vocab"].items())
    kinds = dict.fromkeys(words, NORMAL)
    for added in found.get("added_tokens") or ():
        words[added["content"]] = added["id"]
        kinds[added["content"]] = CONTROL if added.get("special") else USER
    if len(words) > rows or max(words.values(), default=0) >= rows:
        raise HpcdlError(f"{path} has {len(words)} tokens, and the embedding {rows} rows")
    common: dict[str, Any] = {"ids": _ids(source, words), "begins": bool(source.prefix)}
    common["template"] = source.tokenizer_config.get("chat_template")
    if model.get("byte_fallback"):
        return _sentencepiece(found, words, kinds, rows, common)
    tokens, listed = _filled(words, kinds, rows)
    merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or ()]
    # llama.cpp wants a list of merges, and GGUF has no empty one: one that can't come about
    return Vocabulary(
        model="gpt2", pre=_cutter(found, path), tokens=tokens, kinds=listed,
        merges=merges or [f"{tokens[-1]} {tokens[-1]}"], **common,
    )  # fmt: skip


def _ids(source: Source, words: dict[str, int]) -> dict[str, int]:
    ids = {"eos": source.eos_id, "pad": source.pad_id}
    for short in ("bos", "unk"):
        given = source.tokenizer_config.get(f"{short}_token")
        word = given.get("content") if isinstance(given, dict) else given
        if word in words:
            ids[short] = words[word]
    return ids | ({"bos": source.prefix[0]} if source.prefix else {})


def _filled(words: dict[str, int], kinds: dict[str, int], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    listed = [UNUSED] * rows
    for word, number in words.items():
        tokens[number], listed[number] = word, kinds[word]
    return tokens, listed


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [step for each in part[inner] for step in _steps(each, inner)] if inner in part else [part]


def _cutter(found: dict[str, Any], path: Path) -> str:
    """llama.cpp's name of how a byte-level BPE cuts text."""
    steps = _steps(found.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    # llama.cpp leaves out Qwen's NFC too; text that it changes is told by the gate
    plain = {step["type"] for step in _steps(found.get("normalizer"), "normalizers")} <= {"NFC"}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and plain:
        regex = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and (regex or not found["model"].get("merges")):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex:
            pattern = steps[0].get("pattern", {}).get("Regex")
            if pattern in CUTTERS:
                return CUTTERS[pattern]
    raise HpcdlError(
        f"{path} cuts text in a way that can't be exported ({', '.join(kinds) or 'not at all'}); what can: that of"
        " GPT-2, SmolLM, Llama 3 and Qwen 2"
    )


def _sentencepiece(
    found: dict[str, Any], words: dict[str, int], kinds: dict[str, int], rows: int, common: dict[str, Any]
) -> Vocabulary:
    """Scores are the ranks of merges, lower ones later: SentencePiece's own scores say no more than this order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(found["model"].get("merges") or ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    for word in words:
        if kinds[word] == NORMAL and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[word] = BYTE
    unknown = found["model"].get("unk_token")
    if unknown in kinds:
        kinds[unknown] = UNKNOWN
        common["ids"].setdefault("unk", words[unknown])
    tokens, listed = _filled(words, kinds, rows)
    last = -float(len(ranks) + 1)
    scores = [-float(ranks[word]) if word in ranks else last for word in tokens]
    before = [
        *_steps(found.get("normalizer"), "normalizers"),
        *_steps(found.get("pre_tokenizer"), "pretokenizers"),
    ]
    first = any(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in before
    )
    return Vocabulary(
        model="llama", pre="default", tokens=tokens, kinds=listed, scores=scores, space_first=first, **common
    )
