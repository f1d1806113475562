"""Which versions must agree on a GPU host: data files with a source for each row, and pure functions over them.

Start with ``driver.py``: what a host lacks of the driver that its inventory names. ``__main__.py`` is how the role
nvidia_driver asks it.
"""
