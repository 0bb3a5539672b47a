"""The whole of it, for a long time: a real Postfix with mail flowing, while everything happens that can go wrong.

``python -m tests.soak --minutes 20`` runs it as long as you like; a short one is among the tests. It counts what
Postfix and other clients saw, and what the server is made of, before and after.
"""
