"""Text to tree and back. Layer 1: knows diagnostics, nothing of plans."""
