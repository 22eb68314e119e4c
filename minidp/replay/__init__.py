"""Runs with servers, run again from their logs: ``python -m minidp.replay run.log``."""
