"""The process model: a master that binds and forks, workers that accept. It knows nothing of socketmap.

``master`` is the loop, ``succession`` how one generation or program follows another, ``staff`` how many workers
there are, ``pool`` their processes, ``watchdog`` their limits. ``worker`` is a worker's life, ``connection`` what it
has in hand, ``parking`` where connections stand that nobody has in hand. ``listener`` holds the endpoints,
``signals`` what the operator says, ``channel`` what master and workers say, ``scoreboard`` and ``tallies`` what all
of them see, ``takeover`` what the next program needs to know. What is done with a connection is the caller's: a
``Plan`` in ``generation`` names it.
"""
