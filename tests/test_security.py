"""No secret in what is written, runs private by default, nothing of other users' executed: the login side."""

from __future__ import annotations

import ast
import json
import os
import pty
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import hpcdl
from hpcdl import experiment, secrets
from hpcdl.errors import ConfigError, RunFailedError, UsageError
from hpcdl.launch import __main__ as launch
from hpcdl.launch import code, secret_file, sweep
from hpcdl.launch.compose import Composer
from hpcdl.runs import cancel, private, query, terminal, wish
from hpcdl.runs import hurry as hurrying
from hpcdl.runs.files import append_line, locked, read_lines, write_json
from hpcdl.runs.hurry import hurry
from hpcdl.runs.reconcile import read, reconcile
from hpcdl.runs.store import parse_state
from hpcdl.spec.plain import load_yaml
from tests.factory import tiny_plain
from tests.fake_slurm import FakeSlurm
from tests.launch.test_code import git
from tests.runs.making import FakeJob, make_run
from tests.runs.making import FakeSlurm as RunsSlurm

TOKEN = "hf_Xq7secretsecretsecret42"
SOURCES = sorted(Path(hpcdl.__file__).parent.rglob("*.py"))


@pytest.fixture
def fresh() -> Iterator[None]:
    """The secrets of this process's environment are looked up anew."""
    secrets.of_this_process.cache_clear()
    yield
    secrets.of_this_process.cache_clear()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


# --- what is secret ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *(
            (name, True)
            for name in ("WANDB_API_KEY", "HF_TOKEN", "TOKEN", "KEY", "MY_SECRET_X", "DB_PASSWORD")
        ),
        *(
            (name, True)
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "SLURM_JWT", "MYSQL_PWD", "GH_PAT")
        ),
        *(
            (name, False)
            for name in ("PATH", "PWD", "OLDPWD", "MAX_TOKENS", "TOKENIZERS_PARALLELISM", "MONKEY")
        ),
        *((name, False) for name in ("AWS_REGION", "AWS_PROFILE", "HF_TOKEN_PATH", "PUBLIC_KEY", "KEYBOARD")),
    ],
)
def test_names_of_secrets(name: str, is_one: bool) -> None:
    assert secrets.is_name(name) is is_one


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("export HF_TOKEN=abc", "export HF_TOKEN=[hidden]"),
        ('export HF_TOKEN="a b"; true', 'export HF_TOKEN="[hidden]"; true'),
        ("true; export my_token=abc", "true; export my_token=[hidden]"),
        ("--comment=API_KEY=x1", "--comment=API_KEY=[hidden]"),
        ("git clone https://me:pw@host/x.git", "git clone https://me:[hidden]@host/x.git"),
        ("https://ghp0123456789012345678@host/x", "https://[hidden]@host/x"),
        ("https://host/x?sig=abcd%3D&y=1", "https://host/x?sig=[hidden]&y=1"),
        ("wandb login --relogin 0123456789abcdef", "wandb login --relogin [hidden]"),
        ("hf auth login --token abc", "hf auth login --token [hidden]"),
        ("curl -H 'Authorization: Bearer abcdefgh1'", "curl -H 'Authorization: Bearer [hidden]'"),
        (f"x = '{TOKEN}'", "x = '[hidden]'"),
        ("os.environ['HF_TOKEN'] = 'abcdef'", "os.environ['HF_TOKEN'] = '[hidden]'"),
        ('{"HF_TOKEN": "abcdef"}', '{"HF_TOKEN": "[hidden]"}'),
        ('password = "swordfish"', 'password = "[hidden]"'),
        ("HF_TOKEN: abcdef", "HF_TOKEN: [hidden]"),
    ],
)
def test_secrets_in_texts_are_hidden(text: str, shown: str) -> None:
    assert secrets.mask(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("export HF_TOKEN=$(cat ~/.hf)", 'export HF_TOKEN="$OTHER"', "HF_TOKEN=${X:-}", "export HF_TOKEN="),
        *("SSH_KEY=/home/me/.ssh/id_rsa", "tokenizer.pad_token=<s>", "password = getpass()", "sort_key=3"),
        *(
            "git@github.com:a/b",
            "https://me@host/x",
            "https://me:$PW@host",
            "TOKEN=os.environ['X']",
            "key: value",
        ),
        *("hf auth login --token $HF_TOKEN", "srun --ntasks-per-core=1", "12:30:11 step 3 tokens_per_s=12"),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert secrets.mask(text) == text


def test_known_values_are_found_in_every_form() -> None:
    hider = secrets.Hider(
        secrets.values({"A_TOKEN": 'quo"te\\d ключ', "B_KEY": "short", "URL": "x://u:longpass@h"})
    )
    for form in (
        'quo"te\\d ключ',
        json.dumps('quo"te\\d ключ'),
        repr('quo"te\\d ключ'),
        "at x://u:longpass@h",
    ):
        shown = hider.hide(f"<{form}>")
        assert secrets.HIDDEN in shown and "te" not in shown and "longpass" not in shown
        assert hider.hide_bytes(f"<{form}>".encode()).decode() == shown
    assert hider.hide("short") == "short"
    lines = secrets.Hider(["-----BEGIN\nabcdefgh\nklmnopqr\n-----END"])
    assert lines.hide("2026 [rank 0] klmnopqr") == f"2026 [rank 0] {secrets.HIDDEN}"
    assert secrets.Hider([]).hide("x") == "x"


# --- in a config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "at"),
    [
        ("cluster__env", {"WANDB_API_KEY": "sesame"}, "cluster.env.WANDB_API_KEY"),
        ("cluster__env", {"MY_TOKEN": "12345678"}, "cluster.env.MY_TOKEN"),
        ("cluster__env", {"PROXY": "http://me:sesame@proxy"}, "cluster.env.PROXY"),
        ("cluster__setup", ["module load x", "export HF_TOKEN=sesame"], "cluster.setup.1"),
        ("cluster__extra", ["--comment=TOKEN=sesame"], "cluster.extra.0"),
        ("cluster__srun_args", ["--export=ALL,HF_TOKEN=sesame"], "cluster.srun_args.0"),
        ("data__paths", ["https://me:sesame@host/data.txt"], "data.paths.0"),
        ("tracker__entity", "hf_sesamesesamesesame1", "tracker.entity"),
        ("model__hub_id", "https://me:sesame@hf.co/x", "model.hub_id"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_shown(key: str, given: Any, at: str) -> None:
    checked = experiment.check(tiny_plain(**{key: given}))
    assert checked.spec is None and not checked.impossible, "a sweep with such a point is refused as a whole"
    fault = next(fault for fault in checked.faults if fault.key == at)
    assert fault.value == secrets.HIDDEN and "shell's history" in fault.problem
    assert secrets.FILE in fault.allowed + fault.fix
    assert "sesame" not in str(ConfigError(checked.faults))


def test_a_secret_of_the_environment_is_refused_under_any_name(
    monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    from hpcdl.experiment import secrets as rule

    monkeypatch.setenv("LAB_PASSWORD", "correct horse battery")
    rule._known.cache_clear()
    found = experiment.check(tiny_plain(cluster__setup=["./fetch 'correct horse battery'"])).faults
    rule._known.cache_clear()
    assert [fault.key for fault in found] == ["cluster.setup.0"] and "of your environment" in found[0].problem


def test_no_fault_of_such_a_config_shows_the_secret() -> None:
    plain = tiny_plain(cluster__env={"1_TOKEN": "sesame77"}, cluster__partition="a b")
    checked = experiment.check({**plain, "HF_TOKEN": "sesame78"})
    text = str(ConfigError(checked.faults))
    assert "cluster.env.1_TOKEN" in text and "cluster.partition" in text
    assert "sesame" not in text
    with pytest.raises(ConfigError) as caught:
        sweep.read(Composer(), ["-m", "+cluster.env.HF_TOKEN=sesame1,sesame2"][1:], multirun=True)
    assert "sesame" not in str(caught.value) and "HF_TOKEN" in str(caught.value)


def test_where_secrets_come_from_instead() -> None:
    lines = ["export HF_TOKEN=$(cat ~/.hf)", "source ~/secrets.sh", 'export WANDB_API_KEY="$LAB_KEY"']
    assert not experiment.check(tiny_plain(cluster__setup=lines)).faults


# --- the user's file of secrets --------------------------------------------------------------------------------


def test_the_file_of_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# mine\nexport HF_TOKEN='with space 1'\n\nWANDB_API_KEY=abcdefgh # wandb's\nEMPTY=\n")
    file.chmod(0o600)
    environment = {"HPCDL_SECRETS": str(file), "WANDB_API_KEY": "from the shell"}
    secret_file.load(environment)
    assert environment["HF_TOKEN"] == "with space 1" and environment["EMPTY"] == ""
    assert environment["WANDB_API_KEY"] == "from the shell"
    file.chmod(0o640)
    with pytest.raises(RunFailedError, match=r"can be read by others than you\nfix: chmod 600"):
        secret_file.load(environment)
    file.chmod(0o600)
    file.write_text("HF_TOKEN=one two\n")
    with pytest.raises(RunFailedError, match="line 1: not NAME=VALUE") as caught:
        secret_file.load(environment)
    assert "two" not in str(caught.value)
    file.unlink()
    with pytest.raises(RunFailedError, match="is not there on this node"):
        secret_file.load(environment)
    monkeypatch.setenv("HOME", str(tmp_path))
    secret_file.load({})  # none was named, none is needed


# --- what git had ----------------------------------------------------------------------------------------------


def test_the_code_snapshot_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    git(folder, "remote", "add", "origin", "https://me:sesame@host/mine.git")
    for name in ("train.py", ".env", "my key.pem"):
        (folder / name).write_text("one\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    (folder / "train.py").write_text('one\nAPI_KEY = "sesame"\nlr = 1\n# corrrect horse\n')
    (folder / ".env").write_text("HF_TOKEN=sesame\n")
    (folder / "my key.pem").write_text("sesame\n")
    (folder / "notes.env").write_text("TOKEN=sesame")
    git(folder, "config", "diff.external", "touch ran-my-code #")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LAB_SECRET", "corrrect horse")
    files = code.snapshot()
    assert "sesame" not in str(files) and "corrrect horse" not in str(files)
    record = json.loads(files["mine.json"])
    assert record["left_out"] == [".env", "my key.pem"] and record["hidden"] == 2
    assert record["untracked"] == ["notes.env"]
    assert '+API_KEY = "[hidden]"\n+lr = 1\n+# [hidden]' in files["mine.diff"]
    assert not (folder / "ran-my-code").exists()
    git(folder, "checkout", "-q", ".")
    diff = tmp_path / "diff"
    diff.write_text(files["mine.diff"])
    git(folder, "apply", str(diff))  # its lines are where they were


# --- who may read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("readers", "allowed"), [("owner", 0o700), ("group", 0o750), ("all", 0o755)])
@pytest.mark.parametrize("umask", [0, 0o077])
def test_what_a_launch_writes_is_for_whom_was_asked(
    readers: str, allowed: int, umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.set()
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    argv = [*("+experiment=pretrain_tiny", "cluster=slurm", "seed=0,1", f"runs_dir={tmp_path}/runs", "-m")]
    before = os.umask(umask)
    try:
        assert launch.main([*argv, f"readable_by={readers}"]) == 0
        assert os.umask(umask) == umask, "the process's own is as it was"
        (run, *_) = query.find("pretrain_tiny", tmp_path / "runs")
        run.event("looked")  # by a command of the user's, under another umask
    finally:
        os.umask(before)
    seen = {}
    for path in (tmp_path / "runs", *(tmp_path / "runs").rglob("*")):
        if not path.is_symlink():
            seen[path] = stat.S_IMODE(path.stat().st_mode)
    wrong = {p: oct(m) for p, m in seen.items() if m != (allowed if p.is_dir() else allowed & 0o666)}
    assert not wrong and len(seen) > 12
    assert all(TOKEN not in path.read_text(errors="replace") for path in files_below(tmp_path))


def test_sharing_later_opens_the_folders_above(tmp_path: Path) -> None:
    with private.made_for("owner", tmp_path / "runs"):
        (tmp_path / "runs").mkdir()
    with private.made_for("group", tmp_path / "runs"):
        (tmp_path / "runs" / "shared").mkdir()
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "runs" / "shared").stat().st_mode) == 0o750


def test_a_cache_is_for_whom_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's umask lets nobody in; a group that shares a cache has said so by its folder."""
    from hpcdl.worker.cache import once

    with private.made_for("owner"):
        for name, mode in (("shared", 0o770), ("own", None)):
            monkeypatch.setenv("HPCDL_CACHE", str(tmp_path / name))
            if mode:
                (tmp_path / name).mkdir()
                (tmp_path / name).chmod(mode)
            made = once(
                tmp_path / name / "models" / "x", lambda path: (path / "file").write_text("") and None
            )
            found = [stat.S_IMODE(path.stat().st_mode) for path in (made.parent, made, made / "file")]
            assert found == ([0o770, 0o770, 0o660] if mode else [0o700, 0o700, 0o600])


def test_a_folder_of_runs_that_others_may_write_in_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "open" / "runs"
    folder.mkdir(parents=True)
    assert private.warnings_about(folder) == []
    (tmp_path / "open").chmod(0o777)
    (said,) = private.warnings_about(folder)
    assert "everybody may write in" in said and f"chmod o-w {tmp_path}/open" in said
    (tmp_path / "open").chmod(0o1777)
    assert private.warnings_about(folder) == []


# --- other users' files ----------------------------------------------------------------------------------------


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file another user's; where only root could, in the eyes of this process."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(
            private, "is_mine", lambda asked, mine=private.is_mine: asked != path and mine(asked)
        )


def test_another_users_run_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs").path
    private.require_mine(run)
    (run / "spec.yaml").write_text("cluster: {}\n")
    run.chmod(0o777)
    with pytest.raises(UsageError, match="everybody may write in it"):
        private.require_mine(run)
    run.chmod(0o700)
    give_away(run, monkeypatch)
    with pytest.raises(UsageError, match=r"hpcdl runs your own only\nfix: launch the experiment yourself"):
        private.require_mine(run)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_in_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs").path
    (run / "spec.yaml").symlink_to("/etc/passwd")
    give_away(run / "spec.yaml", monkeypatch)
    with pytest.raises(UsageError, match=r"spec.yaml in your run directory belongs to user 54321: remove it"):
        private.require_mine(run)


def test_a_file_that_goes_while_a_run_is_looked_at_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the files do that other nodes' agents try the disk with."""
    (tmp_path / ".probe-c2-320").touch()
    entries = list(os.scandir(tmp_path))
    (tmp_path / ".probe-c2-320").unlink()
    monkeypatch.setattr(private.os, "scandir", lambda _: entries)
    private.require_mine(tmp_path)


def test_another_users_run_is_not_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs", state="RUNNING", kind="slurm", job_id="7_0")
    give_away(run.path, monkeypatch)
    said: list[str] = []
    assert cancel.cancel([run], cancel.How(), said.append) == []
    assert "only they can cancel it" in said[0] and not run.stop_file.exists()


@pytest.mark.parametrize("theirs", [False, True])
def test_looking_at_another_users_run_touches_no_job_of_ours(
    theirs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their state file names a job of ours, which somebody wished to be cancelled, and to be started now."""
    slurm = RunsSlurm()
    soon = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%S")
    slurm.jobs["7"] = [FakeJob("PENDING", tasks="0", reason="BeginTime", start=soon)]
    run = make_run(tmp_path / "runs", state="PENDING", kind="slurm", job_id="7_0")
    wish.make(run, now=True)
    run.event("requeued")
    monkeypatch.setattr(hurrying, "SETTLED_S", 0.0)
    if theirs:
        give_away(run.path, monkeypatch)
    hurry(reconcile(read([run]).views, slurm.slurm()), slurm.slurm())
    assert ("scancel" in slurm.names()) is not theirs
    assert any("StartTime=now" in call for call in slurm.calls) is not theirs


@pytest.mark.parametrize(
    "change",
    [
        *({"job_id": text} for text in ("--user=me", "1;touch x", "../1", 7)),
        *({"submission": text} for text in ("../../elsewhere", "/etc", "-x", "")),
        *({"agent_pid": "1"}, {"reason": None}, {"node_list": [1]}, {"max_steps": "many"}, {"state": ["x"]}),
    ],
)
def test_a_made_up_state_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    plain = json.loads(make_run(tmp_path).state_file.read_text())
    assert parse_state(plain, tmp_path)
    if change == {"submission": ""}:
        assert parse_state({**plain, **change}, tmp_path)  # as good as none
        return
    with pytest.raises(UsageError, match="not a state file that hpcdl wrote"):
        parse_state({**plain, **change}, tmp_path)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    target = tmp_path / "precious"
    target.write_text("as it was")
    for name in ("events.jsonl", "metrics.jsonl", ".lock"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(target)
    run.state_file.unlink()
    run.state_file.symlink_to(target)
    mine = run.path / f".state.json.{os.uname().nodename}.{os.getpid()}.tmp"
    mine.symlink_to(target)
    for write in (
        lambda: run.event("x"),
        lambda: append_line(run.metrics_file, {"step": 1}),
        lambda: locked(run.path / ".lock").__enter__(),
        lambda: write_json(run.state_file, {}),
    ):
        with pytest.raises(UsageError, match="is a symbolic link: nothing is written through it"):
            write()
    mine.unlink()
    write_json(run.state_file, {"new": 1})
    assert not run.state_file.is_symlink() and target.read_text() == "as it was"


def test_a_pipe_in_another_users_run_is_not_waited_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    for file in (run.events_file, run.metrics_file):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    for look in (run.events, run.step):
        with pytest.raises(OSError, match="no ordinary file"):
            look()
    run.state_file.unlink()
    os.mkfifo(run.state_file)
    with pytest.raises(UsageError, match="not a state file that hpcdl wrote"):
        run.read_state()


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    from yaml import YAMLError

    spec = tmp_path / "spec.yaml"
    spec.write_text(f"cluster: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(YAMLError):
        load_yaml(spec)
    (tmp_path / "model").mkdir()
    spec.rename(tmp_path / "model" / "evil.yaml")
    with pytest.raises(ConfigError):
        sweep.read(Composer(config_dir=str(tmp_path)), ["model=evil"], multirun=False)
    target = {"_target_": "os.system", "_args_": [f"touch {tmp_path}/ran"]}
    assert experiment.check({**tiny_plain(), "model": target}).spec is None
    assert not (tmp_path / "ran").exists()


# --- on a terminal ---------------------------------------------------------------------------------------------


def test_a_log_line_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path, state="FAILED", reason="bad\x1b]0;title\x07 \x9b2J \u202egpj.exe", job_id=None)
    run.logs.mkdir(exist_ok=True)
    (run.logs / "n1-try0.0.log").write_text(
        "2026-01-31T12:00:00.000+00:00 [rank 0] \x1b[2Jgone \x1b[31mred\x1b[0m\n"
    )
    for verb in ("logs", "status"):
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "hpcdl", verb, str(run.path)]
        done = subprocess.Popen(
            command, stdout=follower, stderr=follower, env={**os.environ, "TERM": "xterm"}
        )
        os.close(follower)
        seen = b""
        while chunk := _read(leader):
            seen += chunk
        assert done.wait() == 0 and terminal.MARK.encode() in seen, seen
        assert not [
            bad for bad in (b"\x1b]0", b"\x1b[2J", b"\x07", "\x9b".encode(), "\u202e".encode()) if bad in seen
        ]
    raw = subprocess.run(
        [sys.executable, "-m", "hpcdl", "logs", str(run.path)], capture_output=True, check=True
    )
    assert b"\x1b[2Jgone" in raw.stdout, "a file gets what was written"


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_what_is_shown_of_a_progress_bar() -> None:
    assert terminal.harmless("10%\r20%\r30%\nnext\r\n") == "30%\nnext\n"
    assert terminal.harmless("a\tb\x00\x7f\x9b") == "a\tb" + 3 * terminal.MARK


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    append_line(tmp_path / "x.jsonl", {"text": "a\u2028b\x85c"})
    assert read_lines(tmp_path / "x.jsonl") == [{"text": "a\u2028b\x85c"}]


# --- the sources themselves --------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.name}:{node.lineno} {ast.unparse(node.func)}", node


def test_nothing_is_loaded_that_could_run() -> None:
    for where, call in calls():
        name, words = where.split(" ", 1)[1], {k.arg: ast.unparse(k.value) for k in call.keywords}
        if name.endswith("torch.load"):
            assert words.get("weights_only") == "True", where
        assert not name.startswith(("pickle.load", "marshal.", "shelve.", "dill.", "joblib.")), where
        assert name not in ("eval", "exec", "FileSystemReader", "yaml.unsafe_load", "yaml.full_load"), where
        assert words.get("allow_pickle") in (None, "False") and words.get("shell") in (None, "False"), where
        if name == "yaml.load":
            assert "oader" in words["Loader"], where
        if name.endswith(".from_pretrained") and not name.startswith(("PeftModel", "GenerationConfig")):
            assert None in words and ("NO_CODE" in words[None] or "ONLY_WEIGHTS" in words[None]), where
    texts = "".join(path.read_text() for path in SOURCES)
    assert "trust_remote_code=True" not in texts and '"trust_remote_code": True' not in texts
    known = {  # a mount point of containers; a folder whose owner and mode are looked at before it is used
        'SCRATCH = "/tmp"': "hpcdl/launch/containers.py",
        'Path(f"/tmp/hpcdl-ssh-{os.getuid()}")': "hpcdl/launch/remote/connection.py",
    }
    for each in known:
        assert each in texts, "no longer there"
        texts = texts.replace(each, "")
    assert '"/tmp' not in texts, "names in /tmp can be foretold; tempfile makes others"
