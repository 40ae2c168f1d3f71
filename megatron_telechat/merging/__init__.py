"""Merging weights: averages, loss-weighted and task-vector merges of checkpoints and Hugging Face folders."""
