"""hpcdl: describe a deep-learning experiment once, run it anywhere."""

__version__ = "0.1.0"
