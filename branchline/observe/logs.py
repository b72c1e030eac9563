"""Log lines on standard error: text for people, or a JSON object a line.

A record about a request carries its id: `logger.info("…", extra=about(request_id))`. Both formats show it. Records
hold no text of prompts or answers, and no secrets.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from branchline.config_observe import LoggingConfig


def about(request_id: str) -> dict[str, str]:
    """For the `extra` of a record about a request."""
    return {"request_id": request_id}


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        request_id = getattr(record, "request_id", "")
        return f"{line} request={request_id}" if request_id else line


class JsonFormatter(logging.Formatter):
    """Keys: time (RFC 3339, UTC), level, logger, role, message; request_id and exception where there are any."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = int(record.created * 1000)
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
        entry = {
            "time": f"{seconds}.{milliseconds % 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": self._role,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            entry["request_id"] = request_id
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def handler(config: LoggingConfig, role: str) -> logging.Handler:
    """Writes to standard error in the configured format."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(JsonFormatter(role) if config.format == "json" else TextFormatter())
    return made


def set_up(config: LoggingConfig, role: str, level: int) -> None:
    """For the whole process; does nothing where somebody has set logging up already."""
    logging.basicConfig(level=level, handlers=[handler(config, role)])
    logging.captureWarnings(config.format == "json")
