"""What `make bench` keeps and writes: every benchmark a row, whatever came of it."""

from pathlib import Path

import _listed
import _page
import _record
import pytest
import run
from _listed import Benchmark

ONE = Benchmark(name="one", question="How quick is it?", minutes=1, quick=("--few",), seen="docs/one.md")
OTHER = Benchmark(name="other", question="And that?", minutes=2)
MEASURED = """
import sys
sys.path.insert(0, {folder!r})
from _results import tell
print("a note with | and <b>")
table = "| x | y |\\n|---|---|\\n| ours | **hpcdl loses** |"
sys.exit(tell({{"x": 1.5}}, table, [("x at most 1; 1.5", False), ("y at most 2; 1", True)], as_json=False))
"""
BROKEN = "import sys; print('half a table'); sys.exit('the peer has no such option')"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "one.py").write_text(MEASURED.format(folder=str(Path(run.__file__).parent)))
    return tmp_path


def bench(one: Benchmark, place: Path, *, quick: bool = False) -> _record.Record:
    return run.run(one, quick=quick, place=place, results=place / "results")


def written(place: Path) -> str:
    return _page.page((ONE, OTHER), _record.read_all(place / "results"))


def test_a_missed_goal_and_a_losing_row_are_on_the_page(place: Path) -> None:
    record = bench(ONE, place, quick=True)
    text = written(place)
    assert record.verdict == "1 of 2 goals MISSED"
    assert record.figures == {"x": 1.5}
    assert _record.read(place / "results", "one") == record, "what is kept is what was measured"
    assert "`python benchmarks/one.py --few`" in text
    assert "goal: x at most 1; 1.5: **MISSED**" in text
    assert "goal: y at most 2; 1: met" in text
    assert "\n| ours | **hpcdl loses** |" in text, "tables stand as tables"
    assert "~~~text\na note with | and <b>\n~~~" in text, "all else word for word"
    assert record.machine["cpu"] in text
    assert f"1 of 2 goals MISSED, quick | {_page.day(record)} |" in text


def test_what_was_never_run_says_so(place: Path) -> None:
    assert "| [`other`](#other) | not run by `make bench` yet |" in written(place)
    assert "Figures of earlier measurements are in `docs/one.md`." in written(place)


def test_one_that_fails_is_a_row_above_its_last_result(place: Path) -> None:
    good = bench(ONE, place)
    (place / "one.py").write_text(BROKEN)
    for _ in range(2):  # failing again doesn't lose it
        failed = bench(ONE, place)
    text = written(place)
    assert failed.verdict == "FAILED"
    assert "the peer has no such option" in text
    assert f"FAILED; the last result is of {_page.day(good)}" in text
    assert "| ours | **hpcdl loses** |" in text
    assert "half a table" not in text


def test_a_traceback_is_no_missed_goal(place: Path) -> None:
    (place / "one.py").write_text("raise ValueError('odd')")
    record = bench(ONE, place)
    assert record.fault is not None
    assert record.fault.startswith("exit code 1, and no result")
    assert "ValueError: odd" in record.fault


def test_one_that_lacks_something_is_not_started(place: Path) -> None:
    needy = Benchmark(name="one", question="", minutes=1, needs=(_listed.memory(1e6),))
    record = bench(needy, place)
    assert (record.verdict, record.ran) == ("not run", False)
    assert "needs 1e+06 GiB of memory" in written(place)


def test_one_that_takes_for_ever_is_ended(tmp_path: Path) -> None:
    code = "import time; time.sleep(600)"
    reason = run.outcome((run.sys.executable, "-c", code), tmp_path / "left", tmp_path / "output", 0.2)
    assert reason == "not done after 0 minutes: ended"


def test_every_benchmark_is_listed() -> None:
    helpers = {"run"}
    scripts = {file.stem for file in Path(run.__file__).parent.glob("[!_]*.py")} - helpers
    assert {one.name for one in _listed.BENCHMARKS} == scripts


def test_what_is_asked_for_must_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "--only", "launch,trianing"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert "no such benchmark: trianing" in capsys.readouterr().err
