#!/usr/bin/env python3
"""All commands of the fake Slurm; each name in this folder is a link to this file."""

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
    found = re.search(rf"^#SBATCH --{name}=(\S+)", text, re.M)
    return found.group(1).strip("'\"") if found else None


def tasks_of(job):
    return sorted((p.stem for p in TASKS.glob(f"{job}_*.json")), key=lambda t: int(t.split("_")[1]))


def ids(argv):
    for word in argv:
        if re.fullmatch(r"\d+(_\d+)?", word):
            yield from [word] if "_" in word else tasks_of(word)


def sbatch(argv):
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
    print(f"Submitted batch job {job}")


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
        output = (
            option(text, "output").replace("%A", job).replace("%a", task.split("_")[1]).replace("%%", "%")
        )
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
    if argv[:2] == ["show", "node"]:
        address = settings().get("addresses", {}).get(argv[-1])
        if address is None:
            fail(f"Node {argv[-1]} not found")
        print(
            f"NodeName={argv[-1]} Arch=x86_64 CPUTot=4 NodeAddr={address} NodeHostName={argv[-1]} Version=22.05.8"
        )
        return
    if argv[:2] == ["show", "job"]:
        if text := settings().get("job_show"):
            print(text)
            return
        task = argv[-1]
        if not (TASKS / f"{task}.json").exists():
            fail("slurm_load_jobs error: Invalid job id specified")
        record = read(task)
        print(
            f"JobId=7 ArrayJobId={task.split('_')[0]} ArrayTaskId={task.split('_')[1]} JobName=x "
            f"JobState={record['state']} Reason={record['reason']} Restarts={record['restarts']} ExitCode=0:0"
        )
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
    print("PARTITION AVAIL TIMELIMIT NODES STATE NODELIST\ndebug* up 1-00:00:00 4 idle n[1-4]")


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if name == "fake.py":
        name, arguments = arguments[0], arguments[1:]
    if settings().get("down") and name not in ("srun", "slurmd"):
        fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    globals()[name](arguments)
