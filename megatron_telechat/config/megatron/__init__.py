"""Megatron-LM's flags: how each is answered, and what their absence means."""
