"""The `hpcdl` command: finds the verb and tells its faults. Imports little; each verb (hpcdl/verbs/) what it needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from hpcdl.errors import HpcdlError, UsageError, nearest_name
from hpcdl.verbs import get, names
from hpcdl.verbs._common import aside

INTERRUPTED = 130
BROKEN_PIPE = 141
"""As a shell has it: 128 and the number of SIGPIPE."""
TOOLS = {
    "eval": "perplexity, size, memory and speed of a model (hpcdl eval --help)",
    "generate": "how a model goes on from a text (hpcdl generate --help)",
    "merge": "adapters into their base: a model that needs no peft (hpcdl merge --help)",
    "quantize": "a model in few bits: a folder that is loaded again (hpcdl quantize --help)",
    "prune": "weights of a model taken out: a folder with zeros in it (hpcdl prune --help)",
    "export": "a model as GGUF or ONNX, proved before it is named (hpcdl export --help)",
}
"""Commands of hpcdl.launch.tools, which composes configs and is imported only for them."""
EXAMPLES = """\
examples:
  hpcdl plan +experiment=lora_llama                 what it would take
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
    return guarded(lambda: _run(arguments))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of what is done, its faults told."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except HpcdlError as error:
        aside(f"hpcdl: {error}")
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
    return _elsewhere(options, verb) if getattr(options, "runs_key", None) else verb(options)


def _elsewhere(options: argparse.Namespace, verb: Callable[[argparse.Namespace], int]) -> int:
    """A command on runs, of which some may lie on another machine (hpcdl.launch.remote)."""
    from hpcdl.runs import away

    if options.host is None and not away.is_any(options.runs_dir):
        return verb(options)
    from hpcdl.launch.remote import verbs

    return verbs.run(options, verb)


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
    for name in names():
        verb = get(name)
        own = verbs.add_parser(name.replace("_", "-"), help=verb.HELP, description=verb.HELP)
        own.add_argument(
            "--runs-dir", metavar="DIR", help="folder of all runs (default: $HPCDL_RUNS, or runs)"
        )
        own.set_defaults(verb=verb.run)
        verb.add(own)
        if key := getattr(verb, "RUNS", None):
            own.add_argument(
                "--host", metavar="HOST", help="its runs lie there (cluster.login_host), and it is done there"
            )
            own.set_defaults(verb_name=name, runs_key=key)
    return parser
