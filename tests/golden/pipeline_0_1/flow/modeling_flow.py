from itarflow.flow import TARFlow  # noqa: F401
