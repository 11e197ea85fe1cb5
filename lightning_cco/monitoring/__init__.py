"""What a user sees: tables in the log, pictures and recipes on disk, TensorBoard and other loggers."""

from lightning_cco.monitoring.monitor import Monitor

__all__ = ["Monitor"]
