"""Which versions must agree on a GPU host: data files with a source for each row, and pure functions over them.

Start with ``driver.py``: what a host lacks of the driver that its inventory names. ``__main__.py`` is how the role
nvidia_driver asks it. ``resolve.py`` says which driver that should be: ``knowledge.py`` is what the data files say,
``rules.py`` what excludes a stack, ``additions.py`` what comes with one, ``naming.py`` how operators' words are read,
``lock.py`` the stack.lock that keeps the answers.
"""
