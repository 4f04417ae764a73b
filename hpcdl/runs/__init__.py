"""The run store: run directories with their state, events, metrics and logs. State is files, never a database."""
