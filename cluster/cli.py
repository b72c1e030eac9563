"""The command line: `branchline serve`; `status`, `scale`, `drain`, `update` and `stop` for what runs; `generate`,
`chat` and `info` by the SDK; `explain`; `keys`.

Each command imports what it needs when it runs: those that talk to a running system work where only the SDK
is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXIT_CODES = """exit codes:
  0    done
  1    another error
  2    wrong usage, configuration, model or request
  3    no gateway or no worker that could serve, no room, or no system that could be steered
  4    the deadline passed
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.command == "serve":
        from cluster.launch import serve

        return serve(arguments)
    if arguments.command == "explain":
        from cluster import explain

        return explain.run(arguments)
    if arguments.command in ("status", "scale", "drain", "update", "stop"):
        from cluster import operate

        return operate.run(arguments)
    if arguments.command == "keys":
        from cluster import keys

        return keys.run(arguments)
    from cluster import ask

    return ask.run(arguments)


def _parser() -> argparse.ArgumentParser:
    from cluster.flags import add_model_flags, add_serve_flags
    from cluster.keys import add_keys_flags
    from cluster.operate import add_operate_flags
    from cluster.options import add_option_flags, add_sample_flags

    parser = _with_exit_codes(
        argparse.ArgumentParser(prog="branchline", description="Disaggregated LLM serving with tree speculation.")
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_serve_flags(_command(commands, "serve", "run a system on Ray until Ctrl-C"))

    generate = _command(commands, "generate", "complete one prompt, streaming the text")
    generate.add_argument("prompt", metavar="PROMPT", help="the prompt, or - to read it from standard input")
    _add_target(generate)
    add_option_flags(generate)
    add_sample_flags(generate)
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's message of a chat")
    generate.add_argument("--system", metavar="TEXT", help="the chat's system message; implies --chat")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end, not the text")

    chat = _command(commands, "chat", "talk with the model; /reset starts anew, /exit ends")
    _add_target(chat)
    add_option_flags(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")

    info = _command(commands, "info", "what is being served, and the load now")
    _add_target(info)
    info.add_argument("--json", action="store_true", help="print one JSON object")

    explain = _command(commands, "explain", "run a prompt in this process, without a server, and draw each draft tree")
    explain.add_argument("--prompt", required=True, metavar="TEXT")
    explain.add_argument("--chat", action="store_true", help="the prompt is a user's message of a chat")
    explain.add_argument("--steps", type=int, default=8, metavar="N", help="iterations to show (default: %(default)s)")
    explain.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    explain.add_argument("--top-p", type=float, default=1.0, metavar="P")
    explain.add_argument("--top-k", type=int, default=0, metavar="K")
    explain.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text")
    explain.add_argument(
        "--json", action="store_true", help="print a JSON object for each step, and one for the totals"
    )
    add_model_flags(explain)

    operating = {
        "status": "the processes of a running system, and what they do",
        "scale": "add workers and gateways, or take some away, while serving",
        "drain": "end one process when it has finished what it has",
        "update": "replace the workers, one after the other, by ones with another configuration or draft head",
        "stop": "end a running system",
    }
    for name, text in operating.items():
        add_operate_flags(_command(commands, name, text), name)

    add_keys_flags(_command(commands, "keys", "API keys for the gateway"))
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return _with_exit_codes(commands.add_parser(name, help=text, description=text))


def _with_exit_codes(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.epilog = EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    from cluster.access import add_access_flags

    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="the gateway")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that a call may take")
    add_access_flags(parser)


if __name__ == "__main__":
    sys.exit(main())
