"""Examples, and the script that makes what they need."""
