"""What lies in etc/: the sample configuration, the init script, the systemd units."""
