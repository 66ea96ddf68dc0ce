"""fbnas: convolutional networks searched for a device and a latency budget, measured on it."""

__version__ = "0.1.0"
