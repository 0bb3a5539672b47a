"""The one table that every server of the bench answers from, and every loader checks the answers against."""

MAP = "users"
ENTRIES = {f"user{number}@example.com": f"mailbox{number}/" for number in range(1000)}
