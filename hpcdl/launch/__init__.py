"""From a config to a running job: compose, validate, render, submit, watch."""
