"""Errors that users can fix; commands print their message and exit with 1."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run folder can't be used as asked; the message says what to do."""


class DataError(ValueError):
    """Data that cannot be used. The message names the thing, its value, what was expected and what to do."""


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and what to try."""


class CheckpointError(ValueError):
    """A file that can't be read as an official checkpoint; the message says why, and what to do."""
