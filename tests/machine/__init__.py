"""What is shipped, on whole machines: Debian with systemd as PID 1, in namespaces of their own."""
