"""Command line: `run script.py` runs an unmodified NKI script in the simulator, `lint PATH...` checks kernels."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from nkisim import __version__
from nkisim.hardware import TARGET_VARIABLE, TARGETS
from nkisim.install import PACKAGES, install
from nkisim.latency import estimate, perfetto, plot
from nkisim.latency.report import summary
from nkisim.lint import cli as lint
from nkisim.nki import PRECISE_VARIABLE, recording
from nkisim.nki import __version__ as nki_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; a script's own exit and errors pass through."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["trace"]:
        # Its options may stand behind the script, which gets the others, and whatever follows `--`.
        end = given.index("--") if "--" in given else len(given)
        options, rest = parser.parse_known_args(given[:end])
        options.args = [*rest, *given[end + 1 :]]
    else:
        options = parser.parse_args(given)
    if options.command == "lint":
        if not options.paths and not options.rules:
            parser.error("lint PATH: received none")
        return lint.run(options)
    if not os.path.isfile(options.script):
        parser.error(f"script: received {options.script}, which is no file")
    if options.command == "run":
        run(options.script, options.args, options.target, options.all_float32, options.only)
        return 0
    return trace(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nkisim", description="A strict CPU simulator of AWS NKI.")
    parser.add_argument("--version", action="version", version=f"nkisim {__version__} (NKI {nki_version})")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    script = commands.add_parser(
        "run", help="run an unmodified script: `import nki` and `import neuronxcc` find the simulator"
    )
    script.add_argument("--target", choices=sorted(TARGETS), help=f"sets {TARGET_VARIABLE} for the script")
    script.add_argument(
        "--all-float32", action="store_true", help=f"store every float as float32: sets {PRECISE_VARIABLE}=0"
    )
    script.add_argument(
        "--only", choices=PACKAGES, help="replace only this package, where AWS's own of the other name is installed"
    )
    script.add_argument("script", help="path of the script")
    script.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    timed = commands.add_parser(
        "trace",
        usage="%(prog)s [-h] [-o FILE.json] [--plot FILE.png] [--kernel NAME] [--target TARGET] script [--] [args ...]",
        help="run a script and model the time of its kernels' largest launches",
        allow_abbrev=False,
    )
    timed.add_argument("-o", "--output", metavar="FILE.json", help="write a Chrome trace, for ui.perfetto.dev")
    timed.add_argument("--plot", metavar="FILE.png", help="draw the timeline (needs the extra `bench`)")
    timed.add_argument("--kernel", metavar="NAME", action="append", help="only this kernel; may be repeated")
    timed.add_argument("--target", choices=sorted(TARGETS), default="trn2", help="default: %(default)s")
    timed.add_argument("script", help="path of the script; arguments that are not options of `trace` are its own")
    lint.add_arguments(
        commands.add_parser("lint", help="report what the NKI compiler rejects though Python accepts it")
    )
    return parser


def trace(options: argparse.Namespace) -> int:
    """Run a script, print the modelled time of each kernel's largest launch, and write trace and plot."""
    code = 0
    with recording() as traces:
        try:
            run(options.script, options.args, options.target)
        except SystemExit as end:
            # The script's own verdict stands, but what it launched can be looked at.
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    wanted = options.kernel or list(traces)
    missing = [name for name in wanted if name not in traces]
    if missing or not traces:
        print(f"trace: no launch of {', '.join(missing) or 'any kernel'}; launched: {', '.join(traces) or 'none'}")
        return code or 1
    estimates = {name: estimate(traces[name]) for name in wanted}
    print()
    for name, result in estimates.items():
        print(summary(name, result), end="\n\n")
    if options.output:
        perfetto.write(estimates, options.output)
        print(f"wrote {options.output}: open it in ui.perfetto.dev or chrome://tracing")
    if options.plot:
        plot.timeline(estimates, options.plot)
        print(f"wrote {options.plot}")
    return code


def run(
    script: str,
    args: Sequence[str] = (),
    target: str | None = None,
    all_float32: bool = False,
    only: str | None = None,
) -> None:
    """Run `script` as `python script args...` would, with `import nki` and `import neuronxcc` finding the simulator.

    Raises:
        RuntimeError: AWS's nki or neuronxcc is installed; `only` names the one that is not.
    """
    # As for `python script`; before `install`, so that a package beside the script is seen.
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    install(*(() if only is None else (only,)))
    if target is not None:
        os.environ[TARGET_VARIABLE] = target
    if all_float32:
        os.environ[PRECISE_VARIABLE] = "0"
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
