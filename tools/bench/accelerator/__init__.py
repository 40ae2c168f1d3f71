"""Sections of accelerator.py: what is run on one accelerator, one file a subject."""
