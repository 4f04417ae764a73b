"""The run store: run directories with state, events, metrics and logs. State is files, never a database."""
