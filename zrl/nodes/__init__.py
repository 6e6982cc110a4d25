"""Processes: how workers are started, watched and ended."""
