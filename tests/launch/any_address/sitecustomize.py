"""On PYTHONPATH: two "nodes" of a test are one machine, and meet on the loopback."""

import hpcdl.launch.network

hpcdl.launch.network.local_address = lambda head, port: head
