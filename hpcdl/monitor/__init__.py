"""What a run's nodes are doing: samples of each, and what follows from them.

records.py     the lines of system-<node>.jsonl, and how they are read
"""
