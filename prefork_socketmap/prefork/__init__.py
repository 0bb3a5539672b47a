"""The process model: a master that binds and forks, workers that serve. It knows nothing of socketmap.

Both sides share the ``scoreboard`` with its ``counters``, the connection ``table``, and the rest of ``shared``;
``channel`` is how workers talk to the master.

The master: ``master`` is the loop; ``reload`` how one generation follows another, ``upgrade`` how one program does;
``generation`` a plan's workers and listeners; ``policy`` how many workers there are, ``pool`` their processes,
``watchdog`` their limits; ``connections`` what it keeps of each connection; ``signals`` what the operator says.

A worker: ``worker`` is its life, ``duty`` where it waits, ``connection`` what it has in hand, ``descriptors`` what it
has of all connections, ``orphan`` what it does when the master is gone.

What is done with a connection is the caller's: a ``Plan`` in ``plan`` names it. ``listener`` holds the endpoints.
"""
