"""Which pipeline stage holds which layers: solved exactly, with a proof."""
