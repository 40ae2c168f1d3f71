"""Arms of the benches of checkpoints."""
