"""Dashboards, alerts and the table of metrics, made from `grstream.telemetry` so that no name is mistyped."""
