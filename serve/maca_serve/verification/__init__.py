"""`maca-serve verify`: does the running engine compute what the checkpoint says.

prompts.py    short and long prompts of the package's sample
probing.py    what the engine answers, all prompts together and each alone
reference.py  the dequantized checkpoint in transformers, in bfloat16 and in float32
agreement.py  how far answers lie apart, and how far they may
checks.py     a check and its outcome; those of the engine's log
verifying.py  all of it, one after another; view.py shows it
"""

from maca_serve.verification.verifying import verify

__all__ = ["verify"]
