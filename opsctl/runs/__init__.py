"""Long work and who is at it: ``running.py`` is the one to read first, then ``judge.py``, which decides.

``identity`` says who asks, ``locking`` holds the locks of a run, ``journal`` writes what it does, ``holding`` knows the
hosts that are to be left alone, ``busy`` waits for what an earlier controller left behind.
"""


class Declined(KeyboardInterrupt):
    """The operator looked at the plan and said no: nothing was done, and nothing is to be resumed."""
