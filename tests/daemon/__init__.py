"""The daemon: command line, config file, logging, service management, privileges."""
