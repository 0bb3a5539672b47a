"""The process model: a master that binds and forks, workers that accept. It knows nothing of socketmap.

``master`` decides, ``worker`` serves, ``listener`` holds the sockets, ``parking`` the connections nobody serves at
the moment, ``scoreboard`` the memory they all see, ``channel`` the messages between them, ``signals`` what the
operator says. What is done with a connection is the caller's: a ``Plan`` names it.
"""
