"""The `hpcdl` command: one short function a verb. Imports little; each verb imports what it needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from hpcdl.errors import HpcdlError, UsageError, nearest_name

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell has it: 128 and the number of SIGPIPE."""
SORTS = (
    *("tokens_per_s", "efficiency", "step_s", "memory", "comm", "loss", "eval_loss"),
    *("strategy", "processes", "state", "run"),
)
"""What `compare --sort` takes: the keys of hpcdl.runs.compare.SORTS, which this file doesn't import."""
TOOLS = {
    "eval": "perplexity, size, memory and speed of a model (hpcdl eval --help)",
    "generate": "how a model goes on from a text (hpcdl generate --help)",
    "merge": "adapters into their base: a model that needs no peft (hpcdl merge --help)",
    "quantize": "a model in few bits: a folder that is loaded again (hpcdl quantize --help)",
    "prune": "weights of a model taken out: a folder with zeros in it (hpcdl prune --help)",
}
"""Commands of hpcdl.launch.tools, which composes configs and is imported only for them."""
CONFIRM_FROM = 10
"""Cancelling so many runs asks first."""
EXAMPLES = """\
examples:
  hpcdl launch +experiment=lora_llama               on this machine
  hpcdl launch +experiment=lora_llama cluster=slurm into Slurm's queue
  hpcdl launch -m +experiment=lora_llama seed=0,1,2 a sweep: one array job
  hpcdl status                                      the last runs
  hpcdl status latest                               all about one
  hpcdl logs -f 123_4                               what array task 4 prints
  hpcdl cancel latest                               save a checkpoint, stop
  hpcdl resubmit sweep-1a2b3c4d --only failed,oom   those go on
  hpcdl compare sweep-1a2b3c4d                      its runs side by side

RUN is a run id or its beginning, a job id (123, 123_4), a run's directory,
an experiment's name, a sweep's id, or `latest`. Runs lie in --runs-dir, by
default $HPCDL_RUNS, by default ./runs.

exit codes: 0 done, 1 a run failed, 2 called or configured wrongly,
            3 Slurm could not be reached, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest name for a slip of the pen; every fault ends as UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().rstrip()}")

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        nearest = nearest_name(str(value), names)
        hint = f"; nearest name: {nearest}" if nearest else ""
        if action.option_strings:
            option = action.option_strings[0]
            raise UsageError(f"{option} {value}: there is no such choice{hint}\nchoices: {', '.join(names)}")
        raise UsageError(f"no command is called {value}{hint}\ncommands: {', '.join(names)} (hpcdl --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. A user's fault is one message, without traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except HpcdlError as error:
        from hpcdl.runs import terminal

        print(terminal.line(f"hpcdl: {error}", to=sys.stderr), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has had enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["launch"]:
        from hpcdl.launch.__main__ import main as launch

        return int(launch(arguments[1:]))
    if arguments and arguments[0] in TOOLS:
        from hpcdl.launch import tools

        return tools.main(arguments[0], arguments[1:])
    parser = _parser()
    options, more = parser.parse_known_args(arguments or ["--help"])
    if any(word.startswith("-") for word in more) or (more and not hasattr(options, "words")):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # words after an option, which argparse doesn't take for the command's own
        options.words += more
    verb: Callable[[argparse.Namespace], int] = options.verb
    return verb(options)


def _parser() -> argparse.ArgumentParser:
    from hpcdl import __version__

    parser = _Parser(
        prog="hpcdl",
        description="Describe a deep-learning experiment once, run it anywhere, look at its runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpcdl {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    verbs.add_parser(
        "launch", help="validate, submit or run an experiment (hpcdl launch --help)", add_help=False
    )
    for name, summary in TOOLS.items():
        verbs.add_parser(name, help=summary, add_help=False)
    _add_status(verbs)
    _add_logs(verbs)
    _add_follow(verbs)
    _add_cancel(verbs)
    _add_resubmit(verbs)
    _add_result(verbs)
    _add_checkpoints(verbs)
    _add_compare(verbs)
    return parser


if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[_Parser]


def _add(verbs: Verbs, name: str, verb: Callable[[argparse.Namespace], int], text: str) -> _Parser:
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--runs-dir", metavar="DIR", help="folder of all runs (default: $HPCDL_RUNS, or runs)"
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_status(verbs: Verbs) -> None:
    parser = _add(verbs, "status", _status, "the last runs as a table, or all about one")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="one run: all about it; several: a table")
    parser.add_argument("--json", action="store_true", help="for scripts: an object for one RUN, else a list")
    parser.add_argument("-n", type=_count, default=20, metavar="N", help="rows of the table (default: 20)")
    parser.add_argument("--all", action="store_true", help="every run")


def _add_logs(verbs: Verbs) -> None:
    parser = _add(verbs, "logs", _logs, "what a run's ranks print, of all nodes in the order of time")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument("--node", metavar="NAME", help="of this node only")
    parser.add_argument("--rank", type=_count, metavar="R", help="of this global rank only")
    parser.add_argument(
        "--try", dest="attempt", metavar="T", help="of this try only: 0, or 0.1 (launch.requeue)"
    )


def _add_follow(verbs: Verbs) -> None:
    parser = _add(verbs, "follow", _follow, "progress of runs until they are over; exits as they do")
    parser.add_argument("runs", nargs="+", metavar="RUN")


def _add_cancel(verbs: Verbs) -> None:
    parser = _add(verbs, "cancel", _cancel, "save a checkpoint and end runs (a name: all its runs)")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--now", action="store_true", help="don't wait for a checkpoint")
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="S", help="longest wait, in seconds (120)"
    )
    parser.add_argument("--yes", action="store_true", help=f"don't ask, even for {CONFIRM_FROM} runs or more")


def _add_resubmit(verbs: Verbs) -> None:
    parser = _add(verbs, "resubmit", _resubmit, "runs that ended too early go on from their last checkpoint")
    parser.add_argument(
        "words", nargs="+", metavar="RUN|KEY=VALUE", help="runs or sweeps; cluster.mem_gb=16, …"
    )
    parser.add_argument(
        "--only",
        metavar="STATES",
        help="failed,timeout,oom,node_fail,preempted (the default), cancelled",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted (dry_run=true)")
    parser.add_argument("--yes", action="store_true", help=f"don't ask, even for {CONFIRM_FROM} runs or more")


def _add_result(verbs: Verbs) -> None:
    parser = _add(verbs, "result", _result, "what a finished run has achieved")
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help="(default: latest)")
    parser.add_argument("--json", action="store_true", help="result.json as it is")


def _add_checkpoints(verbs: Verbs) -> None:
    parser = _add(verbs, "checkpoints", _checkpoints, "what a run can go on from; 1 if any of it is damaged")
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest", help="(default: latest)")
    parser.add_argument("--verify", action="store_true", help="read every byte, and compare the checksums")
    parser.add_argument("--json", action="store_true", help="for scripts: a list, the oldest first")


def _add_compare(verbs: Verbs) -> None:
    parser = _add(verbs, "compare", _compare, "runs side by side: speed, scaling, memory, loss")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, or a sweep: all its points")
    parser.add_argument(
        "--sort", default="tokens_per_s", choices=SORTS, metavar="KEY", help=f"one of {', '.join(SORTS)}"
    )
    parser.add_argument("--json", action="store_true", help="everything, points that were refused included")
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE.png",
        help="a picture (default: beside the sweep, or ./compare.png)",
    )


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _console() -> Console:
    from hpcdl.runs import terminal

    console = terminal.console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # whoever reads a file or a pipe wants whole lines
    return console


def _status(options: argparse.Namespace) -> int:
    from hpcdl.runs import patience, query, status
    from hpcdl.runs.hurry import hurry
    from hpcdl.runs.reconcile import read, reconcile
    from hpcdl.runs.store import all_runs

    folder = query.runs_dir(options.runs_dir)
    runs = query.find_all(options.runs, folder) if options.runs else list(all_runs(folder))
    reading = read(runs)
    if len(runs) == 1 and options.runs and reading.faults:
        raise UsageError(reading.faults[0])
    waits = patience.Patience(patience.of_environment(patience.LOOK_S))
    checked = hurry(reconcile(reading.views, patience=waits))
    views = sorted(checked, key=lambda view: view.state.created, reverse=True)
    single = len(options.runs) == 1 and len(views) == 1
    if options.json:
        _print_json(status.as_json(views[0]) if single else [status.as_json(view) for view in views])
    elif single:
        status.print_detail(_console(), views[0])
    elif not views:
        print(
            f"no run yet in {folder}: hpcdl launch starts one; --runs-dir or $HPCDL_RUNS names another folder"
        )
    else:
        rows = views if options.all or options.runs else views[: options.n]
        status.print_table(_console(), rows, views)
    _left_out(reading.faults)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from hpcdl.runs import logs, query, terminal

    run = query.find_one(options.run, query.runs_dir(options.runs_dir))
    wanted = logs.Wanted(node=options.node, rank=options.rank, attempt=options.attempt)

    def write(line: str) -> None:
        print(terminal.line(line), flush=options.follow)

    if options.follow:
        logs.follow(run, wanted, write, _remark)
    else:
        logs.show(run, wanted, write, _remark)
    return 0


def _follow(options: argparse.Namespace) -> int:
    from hpcdl.runs import follow, query

    runs = query.find_all(options.runs, query.runs_dir(options.runs_dir))
    if len(runs) == 1:
        # Looking at a run must not be able to end it: that is what cancel is for.
        return follow.exit_code(follow.follow(runs[0], on_interrupt="leave"))
    return max(follow.exit_code(state) for state in follow.follow_all(runs))


def _cancel(options: argparse.Namespace) -> int:
    from hpcdl.runs import cancel, query
    from hpcdl.runs.state import ACTIVE

    runs = query.find_all(options.runs, query.runs_dir(options.runs_dir))
    if len(runs) >= CONFIRM_FROM and not options.yes and not _confirmed(len(runs), "Cancel", "cancelled"):
        return 1
    views = cancel.cancel(runs, cancel.How(now=options.now, limit_s=options.limit), _say)
    return 1 if any(view.state.state in ACTIVE for view in views) else 0


def _say(line: str) -> None:
    from hpcdl.runs import terminal

    print(terminal.line(line))


def _confirmed(count: int, verb: str, done: str) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"{count} runs would be {done}: say --yes")
    return input(f"{verb} {count} runs? [y/N] ").strip().lower() in ("y", "yes")


def _resubmit(options: argparse.Namespace) -> int:
    from hpcdl.launch import resubmit
    from hpcdl.runs import query

    words = [*options.words, *(["dry_run=true"] if options.dry_run else [])]
    chosen = resubmit.choose(words, options.only, query.runs_dir(options.runs_dir))
    if chosen.left_out:
        print(f"hpcdl: left as they are: {chosen.left_out}", file=sys.stderr)
    ask = chosen.count >= CONFIRM_FROM and not (options.yes or chosen.options.dry_run)
    if ask and not _confirmed(chosen.count, "Resubmit", "resubmitted"):
        return 1
    return resubmit.submit(chosen)


def _result(options: argparse.Namespace) -> int:
    from hpcdl.runs import query, result
    from hpcdl.runs.reconcile import look

    view = look(query.find_one(options.run, query.runs_dir(options.runs_dir)))
    record = result.load(view)
    if options.json:
        _print_json(record)
    else:
        result.print_result(_console(), view, record)
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from hpcdl.runs import checkpoints, query

    run = query.find_one(options.run, query.runs_dir(options.runs_dir))
    found = checkpoints.collect(run, verify=options.verify)
    if options.json:
        _print_json(checkpoints.as_json(found))
    else:
        checkpoints.print_list(_console(), run, found)
    return 1 if any(each.damage for each in found) else 0


def _compare(options: argparse.Namespace) -> int:
    from pathlib import Path

    from hpcdl.runs import compare, compare_plot, compare_view, query

    file = compare_plot.check_name(Path(options.plot)) if options.plot else None
    comparison = compare.collect(options.runs, query.runs_dir(options.runs_dir), options.sort)
    if options.json:
        _print_json(compare_view.as_json(comparison))
    else:
        compare_view.print_comparison(_console(), comparison)
    _left_out(comparison.left_out)
    if options.plot is not None:
        file = file or compare_plot.default_file(comparison)
        compare_plot.draw(comparison, file)
        _remark(f"plot: {file}")
    return 0


def _print_json(value: object) -> None:
    import json

    from hpcdl.runs import terminal

    print(terminal.line(json.dumps(value, indent=1, ensure_ascii=False)))


def _left_out(faults: Sequence[str]) -> None:
    from hpcdl.runs import terminal

    for fault in faults:
        print(terminal.line(f"hpcdl: left out: {fault}", to=sys.stderr), file=sys.stderr)


def _remark(line: str) -> None:
    """A remark beside the log: on standard error, so that a pipe gets the log only."""
    from hpcdl.runs import terminal

    sys.stdout.flush()
    print(terminal.line(f"[{line}]", to=sys.stderr), file=sys.stderr, flush=True)
