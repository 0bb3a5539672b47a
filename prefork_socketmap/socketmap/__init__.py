"""The socketmap protocol, pure: no sockets, no processes, no clocks, and nothing else of this package."""
