"""The supervisor of a training: starts the ranks of a node or of many, restarts what is worth it, keeps account of what
was lost. Without torch; ``tools/launch.py`` is its door."""
