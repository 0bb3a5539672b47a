"""Tests against the real programs: Postfix, and the servers that maps ask."""
