"""The servers that are compared: each a program of its own, ``python -m tests.bench.servers.NAME PORT``."""
