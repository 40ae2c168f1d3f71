"""Dialogs for fine-tuning: parsing, templates, encoded files."""
