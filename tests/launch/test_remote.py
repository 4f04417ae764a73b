"""Remote submission without a login node: words through shells, what ssh says, records, whose run it is."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import ConfigError, UsageError
from hpcdl.experiment import login
from hpcdl.launch.remote import connection, envelope, probe, verbs
from hpcdl.launch.remote.connection import Connection, Done, HostError
from hpcdl.runs import away
from hpcdl.runs.away import Known, Place
from hpcdl.spec import ClusterSpec
from tests.runs.making import make_run

NASTY = [
    "a b",
    "$(touch pwned)",
    "`id`",
    "'\"'",
    "한글 이름",
    "new\nline",
    "!boom",
    "\\",
    "-rf",
    "",
    "*",
    "~",
    "; exit 3",
]
PLACE = Place(host="me@login", folder="/scratch/me/runs", python="/env/bin/python")
SEEN = {"run_id": "0123456789ab", "name": "mine", "state": "RUNNING", "job_id": "7_0", "run_dir": "/x"}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH, and a private one for sockets."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "bin"


def program(path: Path, name: str, text: str) -> None:
    (path / name).write_text(f"#!/bin/bash\n{text}\n")
    (path / name).chmod(0o755)


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh", "ksh"])
def test_words_arrive_as_they_are_whatever_shell_a_user_has(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / ".bash_profile").write_text("echo welcome to the cluster\n")
    show = envelope.words([sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *NASTY])
    done = subprocess.run(
        [shell, "-c", envelope.enveloped(envelope.marked(f"cd\n{show}"))],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    noise, own = envelope.after_mark(done.stdout)
    assert json.loads(own) == NASTY and noise == "" and "welcome" in done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("given", "key", "words"),
    [
        ({"login_host": "-oProxyCommand=touch x"}, "cluster.login_host", "is no host's name"),
        ({"login_host": "me@-x"}, "cluster.login_host", "is no host's name"),
        ({"login_host": "me@host; id"}, "cluster.login_host", "is no host's name"),
        ({"login_host": "ssh://me@host:22"}, "cluster.login_host", "is no host's name"),
        ({"login_host": "host\n"}, "cluster.login_host", "is no host's name"),
        ({"login_host": "me@host", "kind": "local"}, "cluster.login_host", "only Slurm has a login node"),
        ({"login_dir": ""}, "cluster.login_dir", "is empty"),
        ({"login_dir": "a\nb"}, "cluster.login_dir", "characters that no path should"),
        ({"login_python": "-c"}, "cluster.login_python", "taken for an option"),
    ],
)
def test_what_ssh_is_handed_is_a_name_and_a_path(given: dict[str, Any], key: str, words: str) -> None:
    cluster = ClusterSpec(**{"kind": "slurm", **given})
    (fault,) = [fault for rule in login.RULES for fault in rule(cluster)]
    assert fault.key == key and words in fault.problem and fault.fix


@pytest.mark.parametrize("host", ["login", "me@login.site.edu", "a-b_c", "u.ser+x@10.0.0.1"])
def test_names_that_ssh_takes_are_taken(host: str) -> None:
    cluster = ClusterSpec(
        kind="slurm", login_host=host, login_dir="~/한글 runs", login_python="~/env/bin/python"
    )
    assert not [fault for rule in login.RULES for fault in rule(cluster)]


@pytest.mark.parametrize(
    ("said", "problem", "fix"),
    [
        ("ssh: Could not resolve hostname nohost: Name or service not known", "no host has this name", "ssh me@nohost"),
        ("ssh: connect to host nohost port 22: Connection refused", "nothing listens there", "is it up"),
        ("ssh: connect to host nohost port 22: Connection timed out", "no answer", "VPN"),
        ("me@nohost: Permission denied (publickey).", "refuses to let you in", "ssh-copy-id me@nohost"),
        ("No ED25519 host key is known for x\nHost key verification failed.", "its key is not known", "by hand"),
        ("@@@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
         "another machine", "ssh-keygen -R nohost"),
        ("/h/.ssh/config: terminating, 1 bad configuration options", "its configuration", "says where"),
        ("\x1b[2Jkex_exchange_identification: read: Connection reset", "kex_exchange_identification", "must work"),
    ],
)  # fmt: skip
def test_what_ssh_says_is_told_with_what_to_do(said: str, problem: str, fix: str, path: Path) -> None:
    program(path, "ssh", f'[[ $1 == -G ]] && exit 0\ncat <<"END" >&2\n{said}\nEND\nexit 255')
    with pytest.raises(HostError) as caught:
        Connection("me@nohost").open()
    error = caught.value
    assert problem in error.problem and fix in error.fix and "\x1b" not in str(error)
    assert error.exit_code == 3 and error.fault.key == "cluster.login_host"


def test_an_own_shared_connection_is_made_unless_the_user_has_one(path: Path) -> None:
    program(path, "ssh", "echo hostname login; echo controlmaster false; echo serveraliveinterval 0")
    options = Connection("me@login").options
    (socket,) = [each.partition("=")[2] for each in options if each.startswith("ControlPath=")]
    folder = Path(socket).parent
    assert folder.stat().st_mode & 0o777 == 0o700 and {"BatchMode=yes", "ControlMaster=auto"} <= set(options)
    assert "ServerAliveInterval=15" in options and not any(" " in word for word in options)
    program(path, "ssh", "echo controlmaster auto; echo controlpath ~/x; echo serveraliveinterval 5")
    options = Connection("me@login").options
    assert not any(each.startswith(("Control", "ServerAlive")) for each in options)
    folder.chmod(0o755)
    program(path, "ssh", "exit 0")
    with pytest.raises(HostError, match="nobody else can enter"):
        _ = Connection("me@login").options


def test_without_ssh_or_rsync_it_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(path, "ssh", "exit 0")
    monkeypatch.setenv("PATH", str(path))
    with pytest.raises(ConfigError, match="rsync is not installed here"):
        probe.ask(Connection("login"), PLACE, write=False)
    (path / "ssh").unlink()
    with pytest.raises(HostError, match="ssh is not installed here"):
        _ = Connection("login").options


FOUND = {"python": "/p", "folder": "/r", "missing": [], "refused": "", "free": 2**40, "codes": [],
         "rsync": "/usr/bin/rsync", "sbatch": "/usr/bin/sbatch"}  # fmt: skip


@pytest.mark.parametrize(
    ("done", "key", "words"),
    [
        (Done(203, "", "", ""), "cluster.login_python", "there is no /env/bin/python on me@login"),
        (Done(202, "Python 3.9.2\n", "", ""), "cluster.login_python", "it is Python 3.9.2"),
        (Done(1, "", "x\nImportError: libssl", ""), "cluster.login_python", "can't be run on me@login: ImportError"),
        (Done(0, json.dumps({**FOUND, "missing": ["hydra", "yaml"]}), "", ""), "cluster.login_python",
         "it lacks hydra-core, pyyaml"),
        (Done(0, json.dumps({**FOUND, "rsync": None}), "", ""), "cluster.login_host", "it has no rsync"),
        (Done(0, json.dumps({**FOUND, "sbatch": None}), "", ""), "cluster.login_host", "no sbatch"),
        (Done(0, json.dumps({**FOUND, "refused": "/r: Permission denied"}), "", ""), "cluster.login_dir",
         "nothing can be written there: /r: Permission denied"),
        (Done(0, json.dumps({**FOUND, "free": 2**20}), "", ""), "cluster.login_dir", "its disk has 1 MiB left"),
        (Done(0, json.dumps(FOUND), "", "hello\n"), "cluster.login_host", "its shell prints text"),
    ],
)  # fmt: skip
def test_what_a_login_node_lacks_is_told_before_anything_is_sent(
    done: Done, key: str, words: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(path, "rsync", "exit 1")
    program(path, "ssh", "exit 0")
    monkeypatch.setattr(Connection, "capture", lambda *_, **__: done)
    with pytest.raises(ConfigError) as caught:
        probe.ask(Connection("me@login"), PLACE, write=True)
    (fault,) = caught.value.faults
    assert fault.key == key and words in fault.problem and fault.fix


def test_records_of_runs_stand_a_torn_line_and_are_each_once(tmp_path: Path) -> None:
    first = Known(
        run_id="0123456789ab", name="mine", run_dir="/scratch/me/runs/mine/0123456789ab", submitted="1"
    )
    away.keep(tmp_path, PLACE, [first])
    second = Known(
        run_id="ba9876543210", name="other", run_dir="/x", job_id="12_3", sweep="sweep-1", submitted="2"
    )
    away.keep(tmp_path, PLACE, [second, Known(**{**vars_of(first), "job_id": "7_0"})])
    file = tmp_path / ".remote" / PLACE.name / "runs.jsonl"
    file.write_text(file.read_text() + '{"run_id": "half')
    assert away.places(tmp_path) == [PLACE]
    known = away.known(tmp_path, PLACE)
    assert [run.run_id for run in known] == ["ba9876543210", "0123456789ab"] and known[1].job_id == "7_0"
    for word in ("ba9876543210", "ba98", "other", "sweep-1", "12_3", "12", "/x", "/x/"):
        assert [away.fits(run, word) for run in known] == [True, False], word
    assert not any(away.fits(run, word) for run in known for word in ("b", "1", "", "-", "latest"))
    assert (tmp_path / ".remote").stat().st_mode & 0o777 == 0o700


def vars_of(run: Known) -> dict[str, Any]:
    return {name: getattr(run, name) for name in Known.__slots__}


def asked(verb: str, words: Any, folder: Path, **more: Any) -> argparse.Namespace:
    key = {"logs": "run", "resubmit": "words"}.get(verb, "runs")
    return argparse.Namespace(verb_name=verb, runs_key=key, host=None, runs_dir=str(folder), json=False,
                              **{key: words}, **more)  # fmt: skip


@pytest.fixture
def two_clusters(tmp_path: Path) -> Path:
    for place, run_id in ((PLACE, "0123456789ab"), (Place(host="b", folder="/b"), "ba9876543210")):
        run = Known(
            run_id=run_id, name=f"on-{place.host}", run_dir="/x", submitted="2026-01-01T00:00:00.000+00:00"
        )
        away.keep(tmp_path, place, [run])
    return tmp_path


def test_each_word_is_asked_for_where_its_runs_lie(
    two_clusters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_run(two_clusters, name="here")
    done: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        verbs.Away, "do", lambda self, _, words: done.append((self.place.host, list(words))) or 0
    )

    def here(options: argparse.Namespace) -> int:
        words = getattr(options, options.runs_key)
        done.append(("here", [words] if isinstance(words, str) else words))
        return 0

    for verb, words, wanted in (
        ("logs", "0123", [("me@login", ["0123"])]),
        ("logs", own.path.name, [("here", [own.path.name])]),
        ("logs", "latest", [("here", ["latest"])]),  # it is younger than the others
        ("resubmit", ["on-b", "cluster.mem_gb=8"], [("b", ["on-b", "cluster.mem_gb=8"])]),
        (
            "status",
            ["on-b", "here", "on-me@login"],
            [("b", ["on-b"]), ("here", ["here"]), ("me@login", ["on-me@login"])],
        ),
        ("logs", "nobody", [("here", ["nobody"])]),  # which says that there is none
    ):
        assert verbs.run(asked(verb, words, two_clusters), here) == 0
        assert done == wanted, verb
        done.clear()
    with pytest.raises(UsageError, match="different machines"):
        verbs.run(asked("cancel", ["on-b", "here"], two_clusters), here)
    for host in ("-oProxyCommand=x", "a b"):
        options = asked("logs", "x", two_clusters)
        options.host = host
        with pytest.raises(UsageError, match="is no host's name"):
            verbs.run(options, here)


def test_a_host_that_is_away_makes_no_states_up(
    two_clusters: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(
        path,
        "ssh",
        "[[ $1 == -G ]] && exit 0\necho 'ssh: connect to host x: Connection timed out' >&2\nexit 255",
    )
    away.saw(two_clusters, PLACE, [SEEN])
    options = asked("status", ["0123456789ab"], two_clusters)
    assert verbs.run(options, lambda _: 9) == 0
    out = capsys.readouterr().out
    assert "doesn't answer: no answer" in out and "UNKNOWN  (RUNNING at " in out
    options.json = True
    assert verbs.run(options, lambda _: 9) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["state"] == "UNKNOWN" and row["last_state"] == "RUNNING" and row["host"] == "me@login"
    assert "unknown since" in row["reason"] and row["job_id"] == "7_0"
    with pytest.raises(HostError, match="no answer"):
        verbs.run(asked("logs", "0123456789ab", two_clusters), lambda _: 9)


def test_a_local_socket_folder_of_somebody_else_is_refused(path: Path) -> None:
    program(path, "ssh", "exit 0")
    (path.parent / "hpcdl-ssh").symlink_to("/tmp")
    with pytest.raises(HostError, match="folder of yours"):
        connection._socket_folder()


def test_who_has_had_enough_has_not_cut_the_connection(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(path, "ssh", "[[ $1 == -G ]] && exit 0\nexit 255")
    reader, writer = os.pipe()
    assert connection._is_read(writer)
    os.close(reader)
    assert not connection._is_read(writer)
    os.close(writer)
    with pytest.raises(HostError, match="was cut"):
        Connection("login").stream("")
    monkeypatch.setattr(connection, "_is_read", lambda _: False)
    assert Connection("login").stream("") == 141
