"""Observability: metrics, the log line of a request, the console, the dashboard.

Never changes what it watches. Begin with `metrics.Metrics`; a new metric is a line in `metric_families`.
"""
