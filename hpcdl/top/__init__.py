"""`hpcdl top`: runs live in a terminal.

curve.py      a loss curve in little memory, drawn in one line
warnings.py   what leaks, lags or fails, in words
reading.py    one run, read as its files grow
watch.py      all that are looked at; asks Slurm, at most every 30 s, one batched call for all
rows.py       a run as a line of the table, as wide as the terminal is
details.py    a run's nodes, ranks, logs and events as lines
frame.py      one frame as plain text (--once)
app.py        the terminal: keys, threads; screens.py, widgets.py what it is made of
"""
