"""The flags of `branchline generate` and `chat` that are a request's options. Imports the SDK only."""

from __future__ import annotations

import argparse

from branchline.client import GenerateOptions, InvalidRequestError


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """What is not given is left to the gateway."""
    add = parser.add_argument
    add("--max-tokens", type=int, metavar="N", help="default: what the context leaves")
    add("--min-tokens", type=int, metavar="N", help="no end-of-sequence token before this many tokens")
    add("--temperature", type=float, metavar="T", help="0, the default, is greedy")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--min-p", type=float, metavar="P", help="keep tokens at least this likely relative to the likeliest one")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: disfavour tokens of prompt and output")
    add("--presence-penalty", type=float, metavar="X", help="disfavour tokens of the output, once")
    add("--frequency-penalty", type=float, metavar="X", help="disfavour tokens of the output, for each occurrence")
    add(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=BIAS",
        help="add BIAS to the logit of the token ID; may be repeated",
    )
    add("--bad-word", action="append", metavar="TEXT", help="keep this text out of the output; may be repeated")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--ignore-eos", action="store_true", help="go on past the model's end-of-sequence tokens")
    add("--draft-nodes", type=int, metavar="N", help="verify at most so many draft nodes in a step; 0: plain decoding")
    add("--priority", type=int, metavar="P", help="from -100 to 100; one level is worth ten seconds of waiting")
    add("--served-model", metavar="NAME", help="which of the models that are served (default: the first)")
    add("--session", metavar="S", help="requests with the same text go to the same workers where gateways route by it")


def add_sample_flags(parser: argparse.ArgumentParser) -> None:
    """What has a meaning for a single prompt, not in a conversation."""
    parser.add_argument("--n", type=int, metavar="N", help="so many samples, each printed when it is finished")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log-probabilities, and of the K likeliest tokens"
    )


def options_from(arguments: argparse.Namespace) -> GenerateOptions:
    """Raises InvalidRequestError, naming the flag."""
    return GenerateOptions(
        max_tokens=arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        logit_bias=_biases(arguments.logit_bias or []),
        bad_words=arguments.bad_word or [],
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        draft_nodes=arguments.draft_nodes,
        priority=arguments.priority,
        session=arguments.session,
        model=arguments.served_model,
    )


def sample_options_from(arguments: argparse.Namespace) -> GenerateOptions:
    """Raises InvalidRequestError, naming the flag."""
    if arguments.logprobs is not None and not arguments.json:
        raise InvalidRequestError("--logprobs: only --json shows them")
    return GenerateOptions(n=arguments.n, logprobs=arguments.logprobs)


def _bias(text: str) -> tuple[int, float]:
    token_id, separator, bias = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"must be ID=BIAS, got {text!r}")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, '=' and a number, got {text!r}") from None


def _biases(pairs: list[tuple[int, float]]) -> dict[int, float]:
    biases = dict(pairs)
    if len(biases) < len(pairs):
        raise InvalidRequestError("--logit-bias: a token is named twice")
    return biases
