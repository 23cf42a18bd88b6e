"""What editors ask of a program while it is written: see flowlang.editor.server."""
