"""Where answers come from: one file per map type, over one base (``base``), found by name (``registry``).

What a map may answer is in ``socketmap``; who asks it, and in which process, is not known here.
"""
