"""Documents → rows → batches."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcdl.errors import HpcdlError
from hpcdl.worker import tasks
from hpcdl.worker.cache import once
from hpcdl.worker.data.batches import IGNORE, Order, batch, share
from hpcdl.worker.data.pack import START, TARGET, fill, rows
from hpcdl.worker.data.prepare import Dataset, Rows, heldout_indices, open_dataset
from hpcdl.worker.data.records import Example, Record
from hpcdl.worker.data.sources import KINDS
from hpcdl.worker.tokenizer import ByteTokenizer
from tests.factory import tiny_spec

pytestmark = pytest.mark.torch
BYTES = ByteTokenizer()


def dataset(**dotted: Any) -> Dataset:
    return open_dataset(tiny_spec(**dotted), BYTES)


def as_batch(part: Rows, chosen: list[int] | None = None) -> dict[str, np.ndarray]:
    import torch

    wanted = np.array(chosen if chosen is not None else range(len(part)))
    return {k: v.numpy() for k, v in batch(part, wanted, torch.device("cpu")).items()}


def learned(part: Rows) -> list[str]:
    """The target tokens of each row, as text."""
    labels = as_batch(part)["labels"]
    return [BYTES.decode([int(t) for t in row if t != IGNORE]) for row in labels]


# --- split -----------------------------------------------------------------------------------------------


def test_split_is_stable_and_of_the_size_asked() -> None:
    assert len(heldout_indices(1000, 0.05, 0)) == 50
    assert heldout_indices(1000, 0.05, 0) == heldout_indices(1000, 0.05, 0) != heldout_indices(1000, 0.05, 1)
    assert len(heldout_indices(3, 0.01, 0)) == 1
    assert sorted(heldout_indices(10, 0.3, 7)) == [0, 6, 9]  # must never change: resumed runs rely on it


def test_no_document_on_both_sides(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"<{i:03d}>" * 5}) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    data = dataset(data__kind="jsonl", data__paths=[str(tmp_path / "*.jsonl")], data__split=0.2)
    train, heldout = "".join(learned(data.train)), "".join(learned(data.heldout))
    ids = {f"<{i:03d}>" for i in range(60)}
    in_train, in_heldout = ({i for i in ids if i in text} for text in (train, heldout))
    assert in_train | in_heldout == ids
    assert not in_train & in_heldout
    assert len(in_heldout) == 12


# --- packing ---------------------------------------------------------------------------------------------


def examples(*lengths: int) -> list[Example]:
    start, made = 0, []
    for length in lengths:
        made.append(Example(tokens=list(range(start, start + length)), targets=[True] * length))
        start += length
    return made


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [(5, 9, 1, 30, 2), (9, 9, 9), (8,), (17, 16, 15)])
def test_each_token_is_a_target_once(packing: bool, lengths: tuple[int, ...]) -> None:
    """All but the first of each document, which nothing stands before."""
    tokens, flags, counts = fill(rows(examples(*lengths), 9, packing=packing, cut=True), 9, 0, np.uint16)
    targets = sorted(tokens[:, 1:][(flags[:, 1:] & TARGET) > 0].tolist())
    firsts = set(np.cumsum((0, *lengths)).tolist())
    assert targets == [t for t in range(sum(lengths)) if t not in firsts]
    assert counts[:, 0].sum() == len(targets)


def test_whole_examples_side_by_side() -> None:
    tokens, flags, _ = fill(rows(examples(4, 4, 4, 20, 3), 9, packing=True, cut=False), 9, 99, np.uint16)
    assert tokens.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 99],
        [8, 9, 10, 11, 99, 99, 99, 99, 99],
        [12, 13, 14, 15, 16, 17, 18, 19, 20],
        [32, 33, 34, 99, 99, 99, 99, 99, 99],
    ]
    assert (flags & START).astype(bool).sum() == 5


def test_question_that_fills_the_row_is_left_out() -> None:
    long = Example(tokens=list(range(20)), targets=[False] * 15 + [True] * 5)
    assert list(rows([long], 9, packing=True, cut=False)) == []


def test_positions_and_labels_stop_at_borders() -> None:
    tokens, flags, counts = fill(rows(examples(3, 4, 5), 9, packing=True, cut=True), 9, 0, np.uint16)
    got = as_batch(Rows(tokens, flags, counts))
    assert got["input_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert got["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert got["labels"][0].tolist() == [1, 2, IGNORE, 4, 5, 6, IGNORE, 8]
    assert got["labels"][1].tolist()[:3] == [9, 10, 11]
    assert counts.tolist() == [[6, 8], [3, 4]]


# --- tasks -----------------------------------------------------------------------------------------------


def test_sft_learns_answers_only(tmp_path: Path) -> None:
    pairs = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(20)]
    turns = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "more"),
        ("assistant", "no"),
    ]
    talk = {"messages": [{"role": r, "content": c} for r, c in turns]}
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(x) for x in [*pairs, talk]))
    data = dataset(
        data__kind="jsonl", data__paths=[str(tmp_path / "c.jsonl")], task__name="sft", data__seq_len=128,
        data__packing=False, trainer__global_batch_size=4,
    )  # fmt: skip
    # Token 259 (end of turn) is learned too; decode leaves it out.
    said = sorted(text.strip() for part in (data.train, data.heldout) for text in learned(part))
    assert said == sorted([*(f"answer {i}" for i in range(20)), "hello\n\nno"])
    inputs = as_batch(data.train)["input_ids"][0]
    assert "question" in BYTES.decode(inputs.tolist())


def test_sft_wants_answers() -> None:
    with pytest.raises(HpcdlError, match="task=sft needs conversations"):
        tasks.get("sft").example(Record(text="plain"), BYTES)
    assert (
        tasks.get("sft").example(Record(messages=({"role": "user", "content": "only asks"},)), BYTES) is None
    )


def test_pretrain_takes_conversations_as_text() -> None:
    made = tasks.get("pretrain").example(Record(messages=({"role": "user", "content": "hi"},)), BYTES)
    assert made is not None
    assert made.tokens[0] == BYTES.bos_id and made.tokens[-1] == BYTES.eos_id
    assert BYTES.decode(made.tokens) == "User: hi\n\n"
    assert all(made.targets)


# --- sources ---------------------------------------------------------------------------------------------


def records(**dotted: Any) -> list[Record]:
    spec = tiny_spec(**{f"data__{key}": value for key, value in dotted.items()})
    return list(KINDS[spec.data.kind](spec.data, spec.seed).records())


def test_pydoc_has_a_document_a_topic() -> None:
    found = records(kind="pydoc")
    assert len(found) > 50
    assert any('The "while" statement' in (r.text or "") for r in found)


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"{i} " * 300 for i in range(10)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "b.txt").write_text("short")
    found = [r.text or "" for r in records(kind="text", paths=[str(tmp_path / "*.txt")])]
    assert "\n\n".join(found[:-1]) == "\n\n".join(paragraphs)
    assert len(found) == 4 and found[-1] == "short"


def test_synthetic_depends_on_the_seed_alone() -> None:
    spec = tiny_spec()
    sources = [KINDS["synthetic"](spec.data, seed) for seed in (0, 0, 1)]
    first, same, other = ([r.text for r in s.records()] for s in sources)
    assert first == same != other
    assert sources[0].digest() == sources[1].digest() != sources[2].digest()


def test_hf_reads_a_local_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows_ = [{"question": f"q{i}", "answer": f"a{i}", "messages": None} for i in range(5)]
    datasets.Dataset.from_list(rows_).save_to_disk(str(tmp_path / "d"))
    found = records(kind="hf", dataset=str(tmp_path / "d"), prompt_field="question")
    assert [m["content"] for m in found[3].messages] == ["q3", "a3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "t.jsonl:2: not JSON"),
        ("[1]", "t.jsonl:2: not a JSON object"),
        (
            '{"body": "x", "id": 1}',
            "t.jsonl:2: has body, id, but needs messages, or prompt and answer, or text",
        ),
        ('{"messages": [{"role": "user"}]}', "messages must be a list of {role, content}"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(HpcdlError) as caught:
        records(kind="jsonl", paths=[str(tmp_path / "t.jsonl")])
    assert message in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(HpcdlError, match=r"nothing\*\.txt matches no file"):
        records(kind="text", paths=[str(tmp_path / "nothing*.txt")])


# --- order -----------------------------------------------------------------------------------------------


def test_order_is_the_same_for_every_number_of_ranks() -> None:
    order = Order(100, seed=3)
    for step in (0, 7, 40):
        whole = order.rows(step * 8, 8).tolist()
        for ranks in (1, 2, 4, 8):
            parts = [
                share(Order(100, seed=3).rows(step * 8, 8), rank, ranks).tolist() for rank in range(ranks)
            ]
            assert [row for part in parts for row in part] == whole


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    order = Order(10, seed=0)
    first, second = order.rows(0, 10).tolist(), order.rows(10, 10).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert order.rows(5, 10).tolist() == first[5:] + second[:5]


# --- enough, and once ------------------------------------------------------------------------------------


def test_too_little_data_is_said() -> None:
    with pytest.raises(
        HpcdlError, match=r"too little data: \d+ training sequences of 32 tokens, but one step takes"
    ):
        dataset(trainer__global_batch_size=100000)
    with pytest.raises(HpcdlError, match="has 1 document: at least 2"):
        dataset(data__num_samples=1)


def test_other_settings_are_other_rows() -> None:
    base = {"data__seq_len": 96}
    changes: list[dict[str, Any]] = [
        {}, {"data__seq_len": 40}, {"seed": 1}, {"task__name": "sft"}, {"data__packing": False}, {"data__split": 0.1},
    ]  # fmt: skip
    digests = {dataset(**{**base, **changed}).digest for changed in changes}
    assert len(digests) == 6
    assert dataset(**base).digest == dataset(**base, optim__lr=3.0).digest


def _build_slowly(folder: Path, marks: Path) -> None:
    def build(temporary: Path) -> None:
        (marks / f"{multiprocessing.current_process().pid}").write_text("")
        for part in range(200):
            (temporary / f"{part}").write_text("x" * 1000)

    once(folder, build)
    assert len(list(folder.iterdir())) == 200  # never seen half-made


def test_one_process_builds_and_the_others_wait(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path / "cache" / "thing", marks)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert len(list(marks.iterdir())) == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".thing.lock", "thing"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        once(tmp_path / "thing", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".thing.lock"]
