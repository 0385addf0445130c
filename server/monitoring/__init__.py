"""What a Prometheus and a Grafana beside the server are given: the dashboard, recording rules and alerts.

Made of the registry of metrics, and never read by the server itself. Begin with `dashboard` and `rules`; `promql` says
how the questions are put.
"""
