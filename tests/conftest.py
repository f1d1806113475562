"""What all tests stand on."""

from __future__ import annotations

import signal

# Who is started by nohup, or in the background of a script, ignores these, and so would all that tests start and then
# tell to stop.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
