"""Attention whose tokens are spread over the ranks of a context-parallel group ([long_context.md])."""
