"""`python -m gateway --config FILE`: a gateway by hand, without Ray."""

import sys

from branchline.core import InvalidRequestError
from branchline.process import run
from gateway.pool import WorkersNotReadyError

if __name__ == "__main__":
    # One thread: the tokenizer's library imports torch, which must not spin on the workers' cores.
    sys.exit(run("gateway", threads=1, user_errors=(WorkersNotReadyError, InvalidRequestError)))
