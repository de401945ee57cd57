"""Images and codes: found, opened, ordered and read."""

from itarflow.data.load import DataConfig, load_data

__all__ = ["DataConfig", "load_data"]
