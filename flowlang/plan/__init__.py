"""Tree to typed plan to physical plan. Layer 2: knows syntax, nothing of running."""
