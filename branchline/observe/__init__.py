"""What a process tells of itself: metrics for Prometheus, OpenTelemetry spans, log lines (docs/observability.md)."""
