"""Random command lines of `hpcdl launch`: what tests/test_fuzz.py and tests/slurm/test_fuzz.py draw from.

Keys, types and options are read from hpcdl/spec and conf/: what is added there is drawn without a line here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import signal
import subprocess
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt
from hypothesis import strategies as st

from hpcdl.experiment import sections, words
from hpcdl.launch import __main__ as command
from hpcdl.launch import frozen, report
from hpcdl.launch.compose import Composer, config_folder

CPU_LIMIT_S = 20
"""CPU time that one command line may take before it counts as a hang: a thousand times what most take."""
NEVER = re.compile(
    r"Traceback|pydantic|omegaconf|antlr|https?:|<class|object at 0x|NoneType|(Dict|List)Config|Node\b|"
    r"\b[A-Z]\w*(Error|Exception)\b"
)
"""What a page for a user never says: Python's own names."""
PAGE = re.compile(r"(The config has \d+ faults?; nothing was submitted\.|\d+\. .+|   [a-z]+: +.*| {12}\S.*|)")
"""The lines of a page of faults; several fixes stand below one another."""


# --- what there is


@cache
def options() -> dict[str, list[str]]:
    """The files of each group in conf/."""
    folders = sorted(path for path in config_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


@cache
def keys() -> dict[str, Any]:
    """Every dotted key of the spec, of all methods, and its type."""
    found: dict[str, Any] = {}
    for name, hint in sections.top_level().items():
        found[name] = hint
        for cls in sections._classes(hint):
            for key, inner in words.hints(cls).items():
                found[f"{name}.{key}"] = inner
    found.pop("dry_run")  # which the fuzz itself sets
    return found


@cache
def in_files() -> dict[str, list[Any]]:
    """The values that conf/ gives each key."""
    found: dict[str, list[Any]] = {}
    for group, names in options().items():
        for name in names:
            content = yaml.safe_load((config_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
            for key, value in (content or {}).items():
                values = found.setdefault(f"{group}.{key}", [])
                if value not in values:
                    values.append(value)
    return found


# --- strategies

NUMBERS = [
    "0",
    "-1",
    "1",
    "3",
    "7",
    "1e-3",
    "1e308",
    "1e999",
    "-0.0",
    "nan",
    "inf",
    "-inf",
    str(2**31),
    str(2**63),
]
NUMBERS += [str(-(2**63) - 1), str(10**40), "9" * 5000, "0x10", "1_000", "007", "1.", ".5"]
ODD = [
    "", "null", "true", "yes", "None", "???", "''", '""', "[]", "{}", "[[]]", "[[1,[2,{a:{b:[]}}]]]",
    "{a:1}", "{1:2}", "{a:{b:{c:[1,2,{d:null}]}}}", "{true:1,null:2}", "[1,'a',null,true,1.5]", "${seed}",
    "${nope}", "${trainer}", "${optim.lr}", "${", "${}", "}", "${a:b}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH}", "${oc.decode:'['}", "${hydra:a}", "${oc.env:}", "${.}", "${..name}",
    "${seed}${seed}", "x${seed}y", "\\${seed}", "${${seed}}", "${oc.select:a,b}", "${oc.create:[1]}",
    "${oc.dict.keys:trainer}", "${hydra:runtime.cwd}", "${oc.deprecated:seed}", "'", '"', "'a", '"a\'b"',
    "'it\\'s'", "[", "]", "{", "}", "(", ")", "[1", "1]", "{a:", "a,b", "a,", ",", ",,", "[,]", "a b",
    " a ", "a\nb", "'a\nb'", "'a\rb'", "'a\n#SBATCH --wrap=x'", '"\n\n"', "a\tb", "\x1b[31m",
    "'\x1b[31m\x07'", "'\x7f'", "'\x85\u2028'", "한국어", "'한국어 실험'", "é", "e\u0301", "\u202e", "🙂", "'🙂'",
    "\udcff", "'\udcff'", "$(reboot)", "'$(reboot)'", "`x`", "'`x`'", "'a;b'", "a;b", "'&& x'", "'a # b'",
    "#", "'!x'", "~", "~x", "-x", "--x", "'-x'", "[--x]", "['--x y']", "\\", "'\\\\'", "a\\,b", "\\n", "%",
    "%A", "'%j %%'", "*", "'*'", "..", "/", "/dev/null", "/dev/zero", "/proc/self", "~root", "'../..'",
    "a/b", "a" * 300, "'" + "x" * 10000 + "'", "[" * 60 + "]" * 60, "[" * 2000 + "]" * 2000, "a=b", "==",
    ":", "a:b", "@", "@a", "+", "++", "!!python/x", "int(3)", "str(3)", "float(x)", "json_str('{')",
    "json_str('{\"a\":1}')", "extend_list(1)", "sort(3,1)", "tag(a,1)", "list(x)", "choice(1,2)",
    "choice()", "range(3)", "range(1,2,0)", "range(1.0,2.0,0)", "range(1,inf)", "range(nan,1)",
    "range(2,1)", "shuffle(range(1,1000000000))", "range(1,1000000000)", "range(-1e9,1e9)", "glob(*)",
    "glob([)", "interval(0,1)", "shuffle(1,2)", "shuffle(range(1,3))", "bool(x)", "nosuch(1)",
    "choice(range(1,3),2)",
]  # fmt: skip
"""Words that something in the chain from a shell to sbatch may take for more than a word."""
ALPHABET = "abz019 .,:;=+-~@/\\|$%&*?!#^_<>()[]{}'\"`\n\t\r\x01\x1b\x7f한é\u2028🙂"


def _of_type(hint: Any) -> st.SearchStrategy[str]:
    """Values that a field of this type takes, as they are typed."""
    members, optional = words.parts_of(hint)
    choices = [_of_member(member) for member in members]
    return st.one_of(*choices, *([st.just("null")] if optional else []))


def _of_member(hint: Any) -> st.SearchStrategy[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _numbers(args[0], args[1:])
    if origin is typing.Literal:
        return st.sampled_from([str(choice) for choice in args])
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(_of_type(args[0]), max_size=3).map(lambda items: f"[{','.join(items)}]")
        return st.tuples(*(_of_type(item) for item in args)).map(lambda items: f"[{','.join(items)}]")
    if origin in (dict, types.UnionType) or dataclasses.is_dataclass(hint):
        return st.sampled_from(["{}", "{a:1}", "{a:{b:c}}"])
    if hint in (int, float):
        return _numbers(hint, ())
    return (
        st.sampled_from(["true", "false"])
        if hint is bool
        else st.sampled_from(["a", "x1", "long", "'a b'", "a:2"])
    )


def _numbers(kind: type, bounds: Sequence[Any]) -> st.SearchStrategy[str]:
    low, high = 0.0, 64.0
    for bound in (one for many in bounds for one in (many if isinstance(many, Interval) else (many,))):
        match bound:
            case Ge():
                low = float(bound.ge)  # type: ignore[arg-type]
            case Gt():
                low = float(bound.gt) + (1 if kind is int else 1e-3)  # type: ignore[arg-type]
            case Le():
                high = float(bound.le)  # type: ignore[arg-type]
            case Lt():
                high = float(bound.lt) - (1 if kind is int else 1e-3)  # type: ignore[arg-type]
    high = max(low, high)
    if kind is int:
        return st.integers(int(low), int(high)).map(str)
    return st.floats(low, high, allow_nan=False).map(lambda number: f"{number:.4g}")


def _valid(below: str = "") -> st.SearchStrategy[str]:
    """A key of the spec with a value that its type takes, or that a file of conf/ has for it."""

    def of(key: str) -> st.SearchStrategy[str]:
        from_files = [words._typed(value) for value in in_files().get(key, ())]
        drawn = _of_type(keys()[key])
        return (st.sampled_from(from_files) | drawn if from_files else drawn).map(
            lambda value: f"{key}={value}"
        )

    plain = [
        key for key, hint in keys().items() if key.startswith(below) and not dataclasses.is_dataclass(hint)
    ]
    return st.sampled_from(plain).flatmap(of)


def _choice() -> st.SearchStrategy[str]:
    groups = [group for group in options() if group not in ("experiment", "cluster")]
    return st.sampled_from([f"{group}={option}" for group in groups for option in options()[group]])


def _wild_values() -> st.SearchStrategy[str]:
    return st.sampled_from(NUMBERS) | st.sampled_from(ODD) | st.text(ALPHABET, max_size=12)


def _prefix() -> st.SearchStrategy[str]:
    return st.sampled_from(["", "", "", "", "+", "++", "~"])


def _wild() -> st.SearchStrategy[str]:
    """A key of the spec, with anything."""
    return st.builds("{}{}={}".format, _prefix(), st.sampled_from(sorted(keys())), _wild_values())


def _misspelt() -> st.SearchStrategy[str]:
    def slip(key: str, place: int, letter: str) -> str:
        place %= len(key)
        return key[:place] + letter + key[place + 1 :]

    known = st.sampled_from(sorted(keys()))
    slips = st.builds(
        slip, known, st.integers(0, 40), st.sampled_from(["", "x", ".", "/", "@", "한", " ", "-", "0"])
    )
    below = st.builds("{}.{}".format, known, st.sampled_from(["a", "0", "-1", "a.b", "", "한", "name"]))
    return st.builds("{}{}={}".format, _prefix(), slips | below, st.just("1") | _wild_values())


def _unknown() -> st.SearchStrategy[str]:
    groups = st.sampled_from(sorted(options())) | st.sampled_from(
        ["modle", "hydra", "hydra/launcher", "a/b", "hydra.run.dir"]
    )
    package = st.sampled_from(["", "", "@x", "@_global_", "@model", "@a.b", "@", "@:x"])
    value = (
        st.sampled_from(["nope", "none", "[none,nope]", "[]", "{}", "null", "3", "../x", "a/b", "none.yaml"])
        | _wild_values()
    )
    return st.builds("{}{}{}={}".format, _prefix(), groups, package, value)


def _syntax() -> st.SearchStrategy[str]:
    known = st.sampled_from(sorted([*keys(), *options()]))
    return st.one_of(
        st.builds("~{}".format, known),
        known,
        _wild_values(),
        st.text(ALPHABET, max_size=16),
        st.builds("{}={}".format, st.text(ALPHABET, max_size=8), _wild_values()),
    )


def _sweep() -> st.SearchStrategy[str]:
    """A key with two values, good ones or odd ones."""

    def of(key: str) -> st.SearchStrategy[str]:
        values = st.lists(
            _of_type(keys()[key]) | st.sampled_from(["1", "x", "-2", "null", "'a b'"]), min_size=2, max_size=3
        )
        return values.map(lambda items: f"{key}={','.join(items)}")

    plain = [key for key, hint in keys().items() if not dataclasses.is_dataclass(hint)]
    groups = st.sampled_from(
        ["model=llama_tiny,nope", "peft=none,lora", "parallel=ddp,fsdp", "optim=adamw,sgd", "seed=range(3)"]
    )
    return st.sampled_from(plain).flatmap(of) | groups


CLUSTERS = ["cluster=slurm", "cluster=local"]


def command_lines(*, wild: bool, below: str = "") -> st.SearchStrategy[list[str]]:
    """Overrides of one launch.

    Args:
        wild: anything; else only keys, options and values that are right by themselves.
        below: of those, only keys that start so.
    """
    one = _valid(below) if below else st.one_of(_valid(), _valid(), _choice())
    if wild:
        one = st.one_of(_wild(), _wild(), _wild(), _misspelt(), _unknown(), _syntax(), _valid(), _sweep())
    lead = st.sampled_from([[], [], ["-m"]]) if wild else st.just([])
    choices = st.sampled_from([["+experiment=pretrain_tiny"]] * 4 + [[], ["+experiment=sweep_parallelism"]])
    cluster = st.sampled_from(CLUSTERS)
    return st.builds(
        lambda lead, choices, cluster, given: [*lead, *choices, cluster, *given],
        lead,
        choices,
        cluster,
        st.lists(one, min_size=1, max_size=3),
    )


# --- one command line


class HangError(Exception):
    """It took too long."""


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str
    scripts: tuple[str, ...]
    """What it would have submitted."""


class Fuzzed:
    """`hpcdl launch … dry_run=true` in this process, with one reading of conf/ for all command lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        composer = Composer()
        monkeypatch.setattr(command, "Composer", lambda **_: composer)
        monkeypatch.setattr(frozen, "folder_in", lambda *_: None)
        self.scripts: list[str] = []
        shown = report.dry_run

        def note(batches: Any, notes: Any) -> None:
            self.scripts += [report.backends.get(b.request.cluster.kind).render(b.request) for b in batches]
            shown(batches, notes)

        monkeypatch.setattr(report, "dry_run", note)

    def __call__(self, argv: Sequence[str]) -> Answer:
        """The answer; anything but an exit code is raised as it came."""
        self.scripts.clear()
        out, err = (
            io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, newline="\n")
            for errors in ("strict", "backslashreplace")
        )
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), deadline(argv):
            code = command.main([*argv, "dry_run=true"])
        said = [stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush()]  # type: ignore[attr-defined,func-returns-value]
        return Answer(code, said[0], said[1], tuple(self.scripts))


@contextlib.contextmanager
def deadline(argv: Sequence[str]) -> Iterator[None]:
    """By CPU time, so that a busy machine is no hang."""

    def ring(number: int, frame: object) -> None:
        raise HangError(f"more than {CPU_LIMIT_S} s: {argv}")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(argv: Sequence[str], answer: Answer) -> None:
    """Either valid scripts or one clear page."""
    if answer.code == 0:
        for script in answer.scripts:
            check_script(script)
        assert answer.scripts and answer.out
    else:
        check_page(argv, answer)


def check_script(script: str) -> None:
    """bash reads it, and each #SBATCH line is one line with an option of its own."""
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode(errors="replace")
    head = script.split("\n\n")[0].split("\n")
    if "HPCDL_LOCAL=1" in script:
        return
    assert head[0] == "#!/bin/bash" and all(line.startswith("#SBATCH --") for line in head[1:]), head
    assert script.count("#SBATCH --") >= len(head) - 1
    names = [line.split("=")[0] for line in head[1:]]
    assert names.count("#SBATCH --array") == 1 and not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f]", "".join(head)
    ), head


def check_page(argv: Sequence[str], answer: Answer) -> None:
    """Exit code 2; of each fault a key, a problem and a fix, a line each; nothing of Python's."""
    page = answer.err
    assert answer.code == 2, (answer.code, page)
    assert not answer.out, answer.out
    given = " ".join(argv)
    assert not [found[0] for found in NEVER.finditer(page) if found[0] not in given], page
    assert page.startswith("The config has "), page
    for line in page.split("\n"):
        assert PAGE.fullmatch(line), f"no line of a page: {line!r}\n{page}"
        assert len(line) < 4000, f"a line of {len(line)}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", page), f"control characters: {page!r}"
    blocks = re.split(r"\n\n", page.strip())[1:]
    assert blocks
    for block in blocks:
        assert "\n   problem: " in block and "\n   fix: " in block, f"no problem or no fix:\n{block}"


def tree(folder: Path) -> list[Path]:
    """What lies in a folder."""
    return sorted(folder.rglob("*"))
