from itarflow.denoise import DenoiseScheduler  # noqa: F401
