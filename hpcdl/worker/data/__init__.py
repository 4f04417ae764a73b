"""From documents to batches.

sources.py   documents out of pydoc, text, jsonl, hf, synthetic        records.py  what a document is
pack.py      tokens → rows of seq_len + 1, documents kept apart
prepare.py   split, tokenise and pack once; memory-mapped from the cache afterwards
batches.py   (seed, epoch, global sample index) → rows → tensors
"""
