from __future__ import annotations

import pytest

from hpcdl.launch import voices
from hpcdl.launch.voices import Voices

WHOLE = (
    b"\x1e[rank 0] one\n\x1e[rank 1] two\nwords of torchrun\n\x1e[rank 0] \xff\xfe\n"
    b"\x1e[rank 12] [rank 3] is what it says\n"
)
LINES = [
    b"[rank 0] one",
    b"[rank 1] two",
    b"words of torchrun",
    b"[rank 0] \xff\xfe",
    b"[rank 12] [rank 3] is what it says",
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_however_it_comes(size: int) -> None:
    heard = Voices()
    lines = [line for at in range(0, len(WHOLE), size) for line in heard.take(WHOLE[at : at + size])]
    assert lines + heard.end() == LINES


def test_pieces_of_a_line_are_put_together_rank_by_rank() -> None:
    """As torchrun passes them on: a header for each piece, whatever other ranks say in between."""
    heard = Voices()
    assert heard.take(b"\x1e[rank 0] ha\x1e[rank 1] whole\n\x1e[rank 0] lf\n") == [
        b"[rank 1] whole",
        b"[rank 0] half",
    ]


def test_a_progress_bar_is_a_line_a_state() -> None:
    """torchrun reads its carriage returns as line ends."""
    heard = Voices()
    lines = heard.take(b"\x1e[rank 0] \n\x1e[rank 0]  10%|#\x1e[rank 0] \n\x1e[rank 0]  20%|##")
    assert lines + heard.end() == [b"[rank 0] ", b"[rank 0]  10%|#", b"[rank 0]  20%|##"]


def test_torchruns_own_words_after_a_line_without_an_end() -> None:
    """It is by them that a failure is known: they must not be taken for the rank's."""
    record = (
        b"E1123 13:16:06.038000 17645 torch/distributed/elastic/multiprocessing/api.py:1002] "
        b"failed (exitcode: -6) local_rank: 0"
    )
    heard = Voices()
    lines = heard.take(b"\x1e[rank 2] no end" + record + b"\nmore\n") + heard.end()
    assert lines == [record, b"more", b"[rank 2] no end"]


def test_a_ranks_own_log_records_are_its_own() -> None:
    text = b"[rank 2] [rank2]:W1123 13:16:06.038000 17645 torch/_dynamo/convert_frame.py:906] slow"
    assert Voices().take(b"\x1e" + text + b"\n") == [text]


def test_the_mark_itself_in_what_a_rank_prints() -> None:
    assert Voices().take(b"\x1e[rank 0] a\x1eb, a record separator that is text\n") == [
        b"[rank 0] a\x1eb, a record separator that is text"
    ]


def test_a_question_that_nobody_answers_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Voices()
    assert heard.take(b"\x1e[rank 0] overwrite? [y/n] ") == heard.late() == []
    monkeypatch.setattr(voices, "PATIENCE_S", -1.0)
    assert heard.late() == [b"[rank 0] overwrite? [y/n] "]
    assert heard.end() == []


def test_very_long_lines() -> None:
    text = b"\x1e[rank 0] " + b"x" * 300_000 + b"\n"
    heard = Voices()
    lines = [line for at in range(0, len(text), 65536) for line in heard.take(text[at : at + 65536])]
    assert [len(line) for line in lines] == [300_009]
