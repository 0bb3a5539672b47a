"""The real servers behind the network map types, each started privately for a test session, and stopped with it.

``process`` has what they share. A module per server defines how it is prepared and started, and its session fixture.
"""
