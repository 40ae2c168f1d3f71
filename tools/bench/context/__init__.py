"""Parts of context_parallel.py: attention over ranks, against other ways to exchange keys and values."""
