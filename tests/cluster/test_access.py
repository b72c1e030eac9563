"""The flags with which commands get past a gateway's door, and the command that makes keys."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from branchline.client import InvalidRequestError
from cluster.access import add_access_flags, connect
from cluster.cli import main
from gateway.keys import hash_of, read_keys


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_access_flags(parser)
    return parser.parse_args(flags)


def test_a_made_key_is_what_the_file_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "alice", "--concurrency", "3", "--tokens-per-minute", "100"]) == 0
    key, line = capsys.readouterr().out.splitlines()
    (tmp_path / "keys.yaml").write_text(line)
    (found,) = read_keys(str(tmp_path / "keys.yaml")).values()
    assert (found.name, found.hash, found.operator) == ("alice", hash_of(key), False)
    limits = found.limits
    assert (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency) == (0, 100, 3)


@pytest.mark.parametrize("argv", [["a b"], [""], ["alice", "--concurrency", "-1"]], ids=str)
def test_a_key_for_nobody_is_not_made(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tls-key", "k"], "--tls-key: only with --tls-ca"),
        (["--tls-server-name", "n"], "--tls-server-name: only with --tls-ca"),
        (["--tls-ca", "/nowhere"], "tls.ca: /nowhere: No such file"),
        (["--tls-ca", "public", "--tls-certificate", "c"], "tls.key: certificate and key go together"),
        (["--api-key-file", "/nowhere"], "--api-key-file: /nowhere: No such file"),
    ],
    ids=str,
)
def test_wrong_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        connect("127.0.0.1:1", parsed(*flags), {})
    assert str(caught.value).startswith(message)


def test_a_key_comes_by_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("good\n")
    for flags, environ in (
        (["--tls-ca", "public", "--api-key-file", str(tmp_path / "key")], {"BRANCHLINE_API_KEY": "two words"}),
        ([], {"BRANCHLINE_API_KEY": "good"}),
        ([], {}),
    ):
        connect("127.0.0.1:1", parsed(*flags), environ).close()
    with pytest.raises(InvalidRequestError, match="api_key"):
        connect("127.0.0.1:1", parsed(), {"BRANCHLINE_API_KEY": "two words"})
