"""Secrets, permissions and quoting on the real cluster."""

from __future__ import annotations

import json
import re
import shlex

from hpcdl.launch.slurm import _word
from tests.launch.test_security import words
from tests.slurm.cluster import Cluster, Launched
from tests.slurm.test_runs import LONG

SECRET = "hf_Xq7secretsecretsecret42"
LAB = "only in the file 7"
NASTY = '한국어 실험/$(touch MARK) `touch MARK`/it\'s "q" 100% %A_%a %%/a#b * [z]? ~ !! {a,b} ;touch MARK'


def test_a_secret_reaches_the_workers_and_no_file(cluster: Cluster) -> None:
    """In a folder whose name would do something if anybody read it: sbatch, bash, srun, Slurm's file names."""
    runs_dir = f"{cluster.home}/{NASTY}"
    secrets = f"{cluster.home}/secrets.env"
    cluster.shell(f"printf '%s\\n' 'LAB_PASSWORD=\"{LAB}\"' > {secrets}; chmod 600 {secrets}; umask")
    words = [
        "hpcdl",
        "launch",
        "cluster=slurm_docker",
        *LONG,
        "cluster.setup=['test -n \"$HF_TOKEN\"']",
        "parsable=true",
    ]
    line = f"umask 0; export HF_TOKEN={SECRET} HPCDL_SECRETS={secrets} HPCDL_RUNS={shlex.quote(runs_dir)}"
    printed = cluster.shell(f"{line}; {shlex.join(words)}")
    run = Launched(*next(text for text in printed.splitlines() if text.count("\t") == 2).split("\t"))
    assert run.run_dir.startswith(runs_dir)
    as_named = f"HPCDL_RUNS={shlex.quote(runs_dir)}"

    def trains() -> bool | None:
        status = json.loads(cluster.shell(f"{as_named} hpcdl status {run.run_id} --json"))
        assert status["state"] in ("PENDING", "RUNNING"), status
        return status["step"] >= 1 or None

    cluster.until(trains, "the first step")
    node = cluster.shell(f"squeue -h -j {run.array_id} -o %N").split()[0]
    arguments = cluster.root(node, "ps -eww -o args")
    # The brackets: not this very shell.
    environment = cluster.root(
        node, "cat /proc/$(pgrep -f '[h]pcdl.worker.main' | tail -1)/environ | tr '\\0' '\\n'"
    )
    shown = cluster.shell(
        f"scontrol show job -dd {run.array_id}; scontrol write batch_script {run.array_id} -"
    )
    assert (
        "hpcdl.worker.main" in arguments and SECRET not in arguments + shown and LAB not in arguments + shown
    )
    assert SECRET in environment and LAB in environment, "the workers have both"
    assert "slurm-" in shown and "HF_TOKEN=" not in shown.replace('"$HF_TOKEN"', "")
    cluster.shell(f"{as_named} hpcdl cancel {run.run_id}")
    left = cluster.shell(f"grep -rlaE '{SECRET}|{LAB}' {shlex.quote(runs_dir)}; true")
    assert left == ""
    # Slurm's own output file is among them. Links have no modes.
    open_to_others = cluster.shell(f"find {shlex.quote(cluster.home + '/한국어 실험')} ! -type l -perm /077")
    assert open_to_others == "", open_to_others
    names = cluster.shell(f"find {shlex.quote(runs_dir)} -name 'slurm-*.out' -o -name 'MARK*'").split("\n")
    assert names[0].endswith(f"slurm-{run.array_id}_0.out") and names[1:] == [""]
    assert cluster.shell(f"find {cluster.home} /shared/home -name 'MARK*' -newer {secrets}") == ""


def test_sbatch_reads_a_header_as_it_was_meant(cluster: Cluster) -> None:
    """Its rules are its own: a backslash counts in single quotes, too. sbatch -vvvvv tells what it has read."""
    lines = [f"#SBATCH --comment={_word(word)}" for word in words()]
    cluster.run("bash", "-c", 'printf "%s\\n" "$@" > header.sh', "bash", "#!/bin/bash", *lines, "true")
    told = cluster.shell("sbatch -vvvvv --test-only header.sh 2>&1", check=False)
    assert re.findall(r'Found in script, argument "--comment=(.*)"\n', told) == words()
