"""From text to `.bin`: documents, tokens, one writer."""
