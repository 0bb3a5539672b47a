"""The daemon: the command line, the config file, and what an operating system expects of a long-running program."""
