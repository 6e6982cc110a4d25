"""The command line: thin verbs over the Python API."""

from zrl.cli.main import main

__all__ = ["main"]
