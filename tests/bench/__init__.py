"""The bench: this server beside what a user would otherwise write, under the same load, in alternating rounds."""
