"""Parts of moe_overlap.py: how much of the experts' exchange hides behind their computation."""
