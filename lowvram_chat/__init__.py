"""Fine-tune GPT-2-class chat models on a 4 GB graphics card, known to fit before the run starts."""

import signal
import sys

__version__ = "0.2.0"

# A command that is stopped while its libraries are imported ends without a traceback. "-m" stands in `argv` until Python has
# found the module; `stopping.signals_answered` takes over when the command begins.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
