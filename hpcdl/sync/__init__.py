"""A run as trackers show it: made from the run's own files, and sent as a whole.

    story.py    run directory → one row a logged step, with what all nodes measured meanwhile
    sinks.py    where rows go: a wandb server, TensorBoard's event files (the only file that imports either)
    sender.py   the process that sends: `hpcdl sync` starts it, and rank 0 of a run that is tracked live
    courier.py  the other end of that process's pipes: orders, answers, a limit of time
    record.py   what a run directory remembers of what was sent, and the lock
    target.py   which server, and whether it answers
    push.py     `hpcdl sync`: which runs, in which order, a line each, the exit code

What is on a wandb server is known for sure only once it has confirmed a whole sending (it shows the digest that was
sent last). Then later steps are added to it (`resume`), as long as the steps that are there are still those of
metrics.jsonl. In any other case, a sending that was interrupted or steps of a lost try, the run is sent whole under
another id, and the one that is spoiled is deleted once that is there. So nothing is there twice, and nothing is stale.
"""
