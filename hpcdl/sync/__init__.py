"""A run as trackers show it: made from the run's own files, and sent as a whole.

    story.py    run directory → one row a logged step, with what all nodes measured meanwhile
    sinks.py    where rows go: a wandb server, TensorBoard's event files (the only file that imports either)
    sender.py   the process that sends: `hpcdl sync` starts it, and rank 0 of a run that is tracked live
    courier.py  the other end of that process's pipes: orders, answers, a limit of time
    record.py   what a run directory remembers of what was sent, and the lock
    target.py   which server, and whether it answers
    push.py     `hpcdl sync`: which runs, in which order, a line each, the exit code

Nothing is added to a run on a server: what is sent replaces what is there under the run's id (wandb.init without
`resume`). So it doesn't matter how far an earlier sending came, and nothing is there twice.
"""
