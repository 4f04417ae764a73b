"""`hpcdl top`: a live view of runs, in a terminal."""
