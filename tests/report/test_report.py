"""`hpcdl report`: what is in it, where it goes, what must never be in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hpcdl import cli, secrets
from tests.report.making import at, full_run, sweep
from tests.runs.making import make_run

NASTY = "</script><img src=x onerror=alert(1)>\"'&`|\x1b[31m\u202e\x00<!--${{7*7}}"
"""Ends a script, makes an element, ends an attribute and a table's cell, colours a terminal, turns what follows."""


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def report(runs_dir: Path, *words: str) -> int:
    return cli.main(["report", "--runs-dir", str(runs_dir), *words])


def as_json(runs_dir: Path, *words: str) -> dict[str, Any]:
    file = runs_dir / "out.json"
    assert report(runs_dir, *words, "--output", str(file)) == 0
    return dict(json.loads(file.read_text(encoding="utf-8")))


class Page(HTMLParser):
    """The elements, texts and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(runs_dir: Path, *words: str) -> tuple[str, Page]:
    file = runs_dir / "out.html"
    assert report(runs_dir, *words, "--output", str(file)) == 0
    text = file.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_run_has_its_parts(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = full_run(runs_dir)
    assert report(runs_dir, run.path.name) == 0
    assert capsys.readouterr().out.split() == [str(run.path / "report.html")]
    text = (run.path / "report.html").read_text()
    page = Page(text)
    titles = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    for title in (
        "Loss",
        "Throughput",
        "Own time of the ranks",
        "Memory of the ranks",
        "Memory of the nodes",
        "CPU of the nodes",
        "GPU use",
        "Network",
    ):
        assert any(each.startswith(f"{title} (") for each in titles), title
    for words in (
        "rank 1, node c1: 1.80 times the others' own time",
        "SIGKILL: killed (rank 3, node c2)",
        "#SBATCH --nodes=2",
        "--config-name spec",
        "planned peak of rank 0: 260 MiB",
        "GPU-hours",
        "H100",
    ):
        assert words in "".join(page.texts), words
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert page.count("h1") == 1 and page.count("h2") >= 8


def test_the_numbers_of_a_run(runs_dir: Path) -> None:
    made = as_json(runs_dir, full_run(runs_dir).path.name)
    assert made["run"]["step"] == 20 and len(made["curves"]["loss"]) == 20
    assert made["cost"]["lost_share"] == pytest.approx(18 / 80)
    assert [each["outcome"] for each in made["tries"]] == ["requeued", "finished"]
    nodes = {node["node"]: node for node in made["nodes"]}
    assert nodes["c2"]["lost"] and not nodes["c2"]["in_last_try"] and nodes["c2"]["samples"] == 0
    assert nodes["c1"]["ranks"] == [0, 1] and nodes["c3"]["ranks"] == [2, 3] and nodes["c3"]["gpus"] == 2
    assert nodes["c1"]["warnings"] == [
        "straggler: rank 1, node c1: 1.80 times the others' own time since step 12: delay (waits for a processor)"
    ]
    rows = {row["name"]: row for row in made["memory"]["rows"]}
    assert rows["activations"]["planned_bytes"] < rows["activations"]["measured_bytes"]
    assert made["spec"]["cluster.nodes"] == 2


def test_ranks_are_on_the_nodes_where_they_were_seen(runs_dir: Path) -> None:
    """Torchrun numbers them as the nodes' agents come to its rendezvous, not as the job lists the nodes."""
    run = full_run(runs_dir)
    files = [run.path / f"system-{node}.jsonl" for node in ("c1", "c3")]
    texts = [file.read_text() for file in files]
    for file, text in zip(files, reversed(texts), strict=True):
        file.write_text(re.sub('"node": "c[13]"', f'"node": "{file.stem[-2:]}"', text))
    nodes = {node["node"]: node["ranks"] for node in as_json(runs_dir, run.path.name)["nodes"]}
    assert (nodes["c1"], nodes["c3"], nodes["c2"]) == ([2, 3], [0, 1], [])


def test_a_run_in_the_queue_and_one_with_nothing_in_it(runs_dir: Path) -> None:
    run = make_run(runs_dir, kind="local", submission=None, state="FAILED", reason="never started")
    text, _ = page_of(runs_dir, run.path.name)
    assert "No step has been logged." in text and "It has not been on any node." in text


def test_nothing_that_others_wrote_becomes_markup(runs_dir: Path) -> None:
    run = full_run(runs_dir, word=NASTY, name=f"x{'y' * 80}")
    with run.events_file.open("a") as events:  # half of a character, which UTF-8 has no bytes for
        events.write(f'{{"time": "{at(150)}", "event": "warning", "message": "\\ud800"}}\n')
    clean = Page(page_of(runs_dir, full_run(runs_dir, "bbbb11112222").path.name)[0])
    text, page = page_of(runs_dir, run.path.name)
    assert page.count("script") == clean.count("script") == 1
    assert page.count("img") == 0 and "<!--" not in text and "49" not in re.findall(r"\$\{\{(.*?)\}\}", text)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)
    assert "<img src=x onerror=alert(1)>" in "".join(page.texts)  # it is there, as text


def test_nothing_is_asked_of_anyone(runs_dir: Path) -> None:
    text, page = page_of(runs_dir, full_run(runs_dir).path.name)
    policy = next(
        attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert not any(attrs.get(key) for tag, attrs in page.tags for key in ("src", "srcset", "action"))
    assert all((attrs.get("href") or "#").startswith("#") for tag, attrs in page.tags if tag == "a")
    assert "url(" not in text and "@import" not in text and page.count("link") == 0


def test_no_secret_of_this_environment(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-very-secret")
    secrets.of_this_process.cache_clear()
    try:
        run = full_run(runs_dir, word="0123456789abcdef-very-secret")
        run.job_file.write_text("export HF_TOKEN=hf_abcdefghijklmnopqrstuvwx\n")
        assert (
            report(runs_dir, run.path.name, "--format", "html,md,json", "--output", str(runs_dir / "all"))
            == 0
        )
        for form in ("html", "md", "json"):
            text = (runs_dir / f"all.{form}").read_text()
            assert "very-secret" not in text and "hf_abcdefghij" not in text and secrets.HIDDEN in text
    finally:
        secrets.of_this_process.cache_clear()


def test_markdown_says_the_same_and_nothing_in_it_is_markup(runs_dir: Path) -> None:
    run = full_run(runs_dir, word="a|b <img src=x> [l](http://x) ```\n# not a heading")
    assert report(runs_dir, run.path.name, "--format", "md") == 0
    text = (run.path / "report.md").read_text()
    body, _, files = text.partition("## spec.yaml")
    assert not re.search(r"(?<!\\)(<img|\]\()|\n# not", body)
    assert body.count("\n# ") == 0 and body.startswith("# tiny")
    assert "| activations | 40 MiB | 44 MiB |" in body and "████" not in body and "▁" in body
    tables = [line for line in body.splitlines() if line.startswith("| 0.")]
    assert len(tables) == 2 and all(len(re.findall(r"(?<!\\)\|", line)) == 12 for line in tables)
    assert files.count("\n````") == 4  # the texts hold three backticks


def test_a_sweep_has_its_parts(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = sweep(runs_dir, 8)
    assert report(runs_dir, name, "--format", "html,md,json") == 0
    files = capsys.readouterr().out.split()
    assert files == [str(runs_dir / ".sweeps" / f"{name}-report.{form}") for form in ("html", "md", "json")]
    page = Page(Path(files[0]).read_text())
    text = "".join(page.texts)
    for words in (
        "optim.lr",
        "can't be",
        "ValueError: loss is nan",
        "7",
        "hpcdl resubmit sweep-1a2b3c4d",
        "Over seeds",
    ):
        assert words in text, words
    titles = [attrs.get("aria-label") or "" for tag, attrs in page.tags if tag == "svg"]
    for title in ("Scaling", "Scaling efficiency", "optim.lr", "Speed against memory", "Loss"):
        assert any(each.startswith(f"{title} (") for each in titles), title
    made = json.loads(Path(files[2]).read_text())
    assert made["states"] == {"COMPLETED": 7, "FAILED": 1} and len(made["refused"]) == 1
    assert made["best"]["loss"]["run_id"].startswith("000000")
    assert made["cost"]["cpu_hours"] == pytest.approx(sum(row["cpu_hours"] for row in made["rows"]))
    assert made["cost"]["cpu_hours"] == pytest.approx(
        90 / 3600 * sum(row["processes"] for row in made["rows"])
    )
    assert "| 000000ffffff |" in Path(files[1]).read_text()


def test_a_sweep_with_nasty_names(runs_dir: Path) -> None:
    name = sweep(runs_dir, 6, word=NASTY)
    text, page = page_of(runs_dir, name)
    assert page.count("script") == 1 and page.count("img") == 0 and "<!--" not in text
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)


def test_many_points_have_a_band_and_few_lines(runs_dir: Path) -> None:
    text, page = page_of(runs_dir, sweep(runs_dir, 62))
    lines = [attrs for tag, attrs in page.tags if tag == "path"]
    assert sum("band" in str(attrs.get("class")) for attrs in lines) == 2
    assert len(lines) < 60 and len(text) < 300_000
    assert sum(tag == "tr" for tag, _ in page.tags) > 62


def test_several_runs_are_side_by_side(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = full_run(runs_dir), full_run(runs_dir, "bbbb11112222", optim__lr=0.5)
    monkeypatch.chdir(runs_dir)
    assert report(runs_dir, first.path.name, second.path.name) == 0
    assert capsys.readouterr().out.split() == [str(runs_dir / "report.html")]
    assert "optim.lr" in (runs_dir / "report.html").read_text()


def test_prices_make_money_of_hours(runs_dir: Path) -> None:
    run = full_run(runs_dir)
    made = as_json(runs_dir, run.path.name, "--price-gpu-hour", "2.5", "--price-cpu-hour", "0.1")["cost"]
    assert made["money"] == pytest.approx(2.5 * made["gpu_hours"] + 0.1 * made["cpu_hours"])
    assert as_json(runs_dir, run.path.name)["cost"]["money"] is None


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["--output", "a.md"], ["a.md"]),
        (["--output", "a.json"], ["a.json"]),
        (["--output", "page"], ["page"]),
        (["--output", "sub/"], ["sub/report-aaaa11112222.html"]),
        (
            ["--output", "sub", "--format", "md,json"],
            ["sub/report-aaaa11112222.md", "sub/report-aaaa11112222.json"],
        ),
        (["--output", "a.html", "--format", "html,md"], ["a.html", "a.md"]),
        (["--output", "v1.2", "--format", "html,md"], ["v1.2.html", "v1.2.md"]),
        (["--output", "a.txt", "--format", "json"], ["a.txt"]),
    ],
)
def test_where_it_goes(
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    files: list[str],
) -> None:
    full_run(runs_dir)
    monkeypatch.chdir(runs_dir)
    (runs_dir / "sub").mkdir()
    assert report(runs_dir, "aaaa11112222", *words) == 0
    assert capsys.readouterr().out.split() == files
    for name in files:
        text = (runs_dir / name).read_text()
        start = {".md": "# tiny", ".json": "{", ".txt": "{"}.get(Path(name).suffix, "<!doctype html>")
        assert text.startswith(start)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "htm"], "no format is called 'htm'; nearest name: html"),
        (["--format", ""], "no format is called ''"),
        (["--output", "none/a.html"], "there is no folder none; make it first: mkdir -p none"),
        (["--price-gpu-hour", "cheap"], "'cheap' is no price"),
        (["--price-gpu-hour", "-1"], "'-1' is no price"),
        (["--price-cpu-hour", "nan"], "'nan' is no price"),
    ],
)
def test_what_is_wrong_is_said(
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    full_run(runs_dir)
    monkeypatch.chdir(runs_dir)
    assert report(runs_dir, "aaaa11112222", *words) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_place_that_can_not_be_written(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = full_run(runs_dir)
    (run.path / "report.html").mkdir()
    assert report(runs_dir, run.path.name) == 2
    assert "can't be written (Is a directory); --output FILE names another place" in capsys.readouterr().err


FILES = ("spec.yaml", "events.jsonl", "metrics.jsonl", "memory.json", "result.json", "system-c1.jsonl")
WRONG = '{"step": "x", "loss": {}, "time": 5, "measured": 7, "sample": []}\n'


@pytest.mark.parametrize(
    ("files", "text"),
    [
        *((FILES, text) for text in ("", "[1, 2]\n", '{"a": ', "cluster: 7\nparallel: [x]\n", WRONG)),
        *(((file,), WRONG) for file in FILES),
        (("spec.yaml",), "cluster: 7\nparallel: [x]\n"),
    ],
)
def test_files_that_somebody_has_spoilt(runs_dir: Path, files: tuple[str, ...], text: str) -> None:
    run = full_run(runs_dir)
    for file in files:
        (run.path / file).write_text(text)
    assert report(runs_dir, run.path.name, "--format", "html,md,json") == 0
