#!/usr/bin/env python3
"""All commands of the fake Slurm; each name in this folder is a link to this file."""

import contextlib
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])
TASKS = HOME / "tasks"


def settings():
    try:
        return json.loads((HOME / "settings.json").read_text())
    except FileNotFoundError:
        return {}


def fail(words, code=1):
    print(words, file=sys.stderr)
    sys.exit(code)


def log(name, **more):
    HOME.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k.startswith(("SLURM", "HPCDL_"))}
    with (HOME / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps({"argv": sys.argv[1:], "environment": kept, **more}) + "\n")


def read(task):
    return json.loads((TASKS / f"{task}.json").read_text())


def write(task, **changes):
    TASKS.mkdir(parents=True, exist_ok=True)
    file = TASKS / f"{task}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    temporary = TASKS / f".{task}.{os.getpid()}"
    temporary.write_text(json.dumps({**old, **changes}))
    temporary.replace(file)


def option(text, name):
    words = [word for line in text.splitlines() if line.startswith("#SBATCH") for word in split(line[7:])]
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found[-1] if found else None


def split(line):
    """The words of an #SBATCH line as sbatch has it: a backslash counts in all quotes, # begins a comment."""
    words, word, quote, escaped = [], None, "", False
    for char in line:
        if escaped:
            word, escaped = (word or "") + char, False
        elif char == "\\":
            escaped = True
        elif quote:
            quote, word = ("", word) if char == quote else (quote, word + char)
        elif char in "'\"":
            quote, word = char, word or ""
        elif char.isspace():
            words, word = (words, None) if word is None else ([*words, word], None)
        elif char == "#":
            break
        else:
            word = (word or "") + char
    return words if word is None else [*words, word]


def tasks_of(job):
    return sorted((p.stem for p in TASKS.glob(f"{job}_*.json")), key=lambda t: int(t.split("_")[1]))


def ids(argv):
    for word in argv:
        if re.fullmatch(r"\d+(_\d+)?", word):
            yield from [word] if "_" in word else tasks_of(word)


def test_only(text):
    """What sbatch says of a job that it doesn't submit: on standard error, the time in this process's zone."""
    log("test_only", script=text, timezone=os.environ.get("TZ"))
    if words := settings().get("refuse"):
        fail(f"allocation failure: {words}")
    words = "Job 7 to start at 2030-01-31T12:00:00 using 2 processors on nodes n1 in partition debug"
    print(f"sbatch: {settings().get('starts', words)}", file=sys.stderr)


def sbatch(argv):
    if argv[-1] == "--test-only":
        return test_only(sys.stdin.read())
    text = Path(argv[-1]).read_text()
    log("sbatch", script=text)
    if words := settings().get("refuse"):
        fail(f"sbatch: error: {words}")
    number = HOME / "last_job_id"
    job = int(number.read_text()) + 1 if number.exists() else 1
    number.write_text(str(job))
    script = HOME / f"{job}.sh"
    script.write_text(text)
    last = int((option(text, "array") or "0-0").split("%")[0].split("-")[1])
    for index in range(last + 1):
        write(
            f"{job}_{index}",
            state="PENDING",
            restarts=0,
            reason="None",
            comment=option(text, "comment") or "",
        )
    if settings().get("run"):
        command = [sys.executable, __file__, "slurmd", str(job)]
        subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    print(job if "--parsable" in argv else f"Submitted batch job {job}")


def slurmd(argv):
    """Runs an array's tasks one after the other, as the nodes would."""
    job = argv[0]
    script = HOME / f"{job}.sh"
    text = script.read_text()
    count = int(option(text, "nodes") or 1)
    for number, task in enumerate(tasks_of(job)):
        nodes = [f"n{i + 1}" for i in range(count)]
        environment = {
            **os.environ,
            "SLURM_JOB_ID": str(int(job) * 1000 + number),
            "SLURM_ARRAY_JOB_ID": job,
            "SLURM_ARRAY_TASK_ID": task.split("_")[1],
            "SLURM_JOB_NODELIST": ",".join(nodes),
            "SLURM_JOB_NUM_NODES": str(count),
            "SLURM_CPUS_PER_TASK": option(text, "cpus-per-task") or "1",
        }
        patterns = {"A": job, "a": task.split("_")[1], "%": "%"}
        output = re.sub("%(.)", lambda found, p=patterns: p[found.group(1)], option(text, "output"))
        with Path(output).open("ab") as out:
            process = subprocess.Popen(["bash", script], env=environment, stdout=out, stderr=out)
            write(task, state="RUNNING", pid=process.pid, nodes=",".join(nodes))
            code = process.wait()
        if read(task)["state"] == "RUNNING":
            write(task, state="COMPLETED" if code == 0 else "FAILED", exit_code=code)


def srun(argv):
    log("srun")
    if settings().get("srun_exit") is not None:
        sys.exit(settings()["srun_exit"])
    command = list(argv)
    while command and command[0].startswith("--"):
        command.pop(0)
    nodes = os.environ["HPCDL_NODES"].split()
    running = []
    for number, node in enumerate(nodes):
        environment = {
            **os.environ,
            "SLURM_NODEID": str(number),
            "SLURMD_NODENAME": node,
            "SLURM_STEP_ID": "0",
        }
        running.append(subprocess.Popen(command, env=environment))
    codes = [0]
    while running:
        for process in list(running):
            code = process.poll()
            if code is not None:
                running.remove(process)
                codes.append(code if code >= 0 else 128 - code)
                if code and "--kill-on-bad-exit=1" in argv:
                    for other in running:
                        other.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    sys.exit(max(codes))


def scontrol(argv):
    if argv[:2] == ["show", "hostnames"]:
        print("\n".join(argv[2].split(",")))
        return
    log("scontrol")
    if argv == ["-o"]:  # commands on standard input, as an answer for many jobs is asked for
        asked = sys.stdin.read().splitlines()
        if "show partition" in asked:
            print(settings().get("defaults", "DefMemPerNode           = UNLIMITED"))
            return
        failures = [line for line in asked if not show_jobs(line.split()[-1])]
        for _ in failures:
            print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        sys.exit(1 if failures else 0)
    if argv[:2] == ["show", "node"]:
        address = settings().get("addresses", {}).get(argv[-1])
        if address is None:
            fail(f"Node {argv[-1]} not found")
        state = settings().get("node_states", {}).get(argv[-1], "IDLE")
        port = f" Port={settings()['port']}" if "port" in settings() else ""
        print(
            f"NodeName={argv[-1]} Arch=x86_64 CPUTot=4 NodeAddr={address} NodeHostName={argv[-1]}{port} "
            f"Version=22.05.8 State={state} Partitions=debug"
        )
        return
    if argv[:2] == ["show", "job"]:
        if text := settings().get("job_show"):
            print(text)
            return
        task = argv[-1]
        if not (TASKS / f"{task}.json").exists():
            fail("slurm_load_jobs error: Invalid job id specified")
        show_jobs(task)
        return
    if argv[0] == "requeue":
        if words := settings().get("requeue_refused"):
            fail(words)
        for task in ids(argv[1:]):
            write(task, state="PENDING", restarts=read(task)["restarts"] + 1, reason="BeginTime")
        return
    if argv[0] == "update":
        return
    fail(f"fake scontrol: {argv}")


def show_jobs(word):
    """Prints a job's or an array's records; whether there are any."""
    found = [task for task in ids([word]) if (TASKS / f"{task}.json").exists()]
    for task in found:
        record = read(task)
        print(
            f"JobId=7 ArrayJobId={task.split('_')[0]} ArrayTaskId={task.split('_')[1]} JobName=x "
            f"JobState={record['state']} Reason={record['reason']} Restarts={record['restarts']} "
            f"ExitCode={record.get('exit_code', 0)}:0 Comment={record['comment']}"
        )
    return bool(found)


def squeue(argv):
    wanted = argv[argv.index("-j") + 1].split(",") if "-j" in argv else [p.stem for p in TASKS.glob("*.json")]
    form = argv[argv.index("-o") + 1]
    for task in ids(wanted):
        record = read(task)
        if record["state"] not in ("PENDING", "RUNNING") and "all" not in argv:
            continue
        job, index = task.split("_")
        values = {"F": job, "K": index, "T": record["state"], "r": record["reason"], "k": record["comment"]}
        values |= {"S": "N/A", "N": record.get("nodes", ""), "i": task, "A": job}
        print(re.sub(r"%(\w)", lambda m, v=values: v[m.group(1)], form))


def sacct(argv):
    wanted = argv[argv.index("-j") + 1].split(",")
    fields = argv[argv.index("-o") + 1].split(",")
    for task in ids(wanted):
        record = read(task)
        values = {"JobID": task, "State": record["state"], "ExitCode": f"{record.get('exit_code', 0)}:0"}
        print("|".join(values.get(name, "") for name in fields))


def scancel(argv):
    log("scancel")
    for task in ids(argv):
        record = read(task)
        if record["state"] in ("PENDING", "RUNNING"):
            write(task, state="CANCELLED")
        if record["state"] == "RUNNING":
            os.kill(record["pid"], signal.SIGTERM)


def sinfo(argv):
    if "-e" in argv:
        log("sinfo")
        print("\n".join(settings().get("node_kinds", [])))
        return
    if "%N" in argv:
        print("\n".join(settings().get("partition_nodes", ["n1", "n2", "n3", "n4"])))
        return
    print("PARTITION AVAIL TIMELIMIT NODES STATE NODELIST\ndebug* up 1-00:00:00 4 idle n[1-4]")


def mode(name):
    """How this call behaves: the command's modes in their turn, the last of them for ever after."""
    modes = settings().get("modes", {}).get(name, [])
    if not modes:
        return "well"
    with (HOME / f"{name}.turns").open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.seek(0)
        turn = len(file.read())
        file.write("x")
    return modes[min(turn, len(modes) - 1)]


def behave(name, how, arguments):
    """What a command does that a controller in trouble doesn't answer as it should."""
    if how == "away":
        fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    if how == "hang":
        time.sleep(600)
    if how == "garbage":
        print("\x00\x1b[2J<html>504 Gateway Time-out</html>")
        return
    if how == "slow":
        time.sleep(0.5)
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        globals()[name](arguments)
    text = answer.getvalue()
    if how == "lost":
        fail(f"{name}: error: Batch job submission failed: Socket timed out on send/recv operation")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "taken_hang":
        time.sleep(600)
    if how == "nothing":
        return
    print(text[: len(text) // 2] if how == "cut" else text, end="", flush=True)
    if how == "failing":
        fail(f"{name}: error: slurm_receive_msg: Zero Bytes were transmitted or received")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if name == "fake.py":
        name, arguments = arguments[0], arguments[1:]
    if settings().get("down") and name not in ("srun", "slurmd"):
        fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    how = mode(name)
    if how == "well":
        globals()[name](arguments)
    else:
        behave(name, how, arguments)
