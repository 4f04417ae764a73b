"""A Kubernetes cluster as the login node sees it.

names.py    what a run's objects are called
client.py   the API server: asked again while it is away, its refusals in words of ours
asking.py   what it says of the runs' Jobs and pods
judge.py    what that means for a run's state
look.py     makes the state true; ends runs; their pods' logs
"""
