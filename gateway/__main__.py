"""`python -m gateway --config FILE`: a gateway by hand, without Ray."""

import sys

from branchline.core import InvalidRequestError
from branchline.process import run
from gateway.pool import WorkersNotReadyError

if __name__ == "__main__":
    sys.exit(run("gateway", user_errors=(WorkersNotReadyError, InvalidRequestError)))
