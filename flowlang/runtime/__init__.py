"""Runs a physical plan. Layer 3: knows plans, nothing of files, servers or command lines."""
