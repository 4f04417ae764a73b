"""How much of a streamed model is in use at a time: what the engine keeps to and what the plan counts with."""

PIECE = 2**22
"""Weights that are updated at a time: 16 MiB in fp32."""
SLICE = 2**24
"""Weights of the output head that are in use at a time: 4,096 rows of 4,096."""
UNDER_WAY = 8
"""Pieces that wait to be written at a time."""
CHUNK_LOGITS = 2**23
"""Logits that are held at a time, in fp32: 32 MiB."""
