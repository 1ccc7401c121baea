"""A rank that a program starts for itself: `python -m distllm.engine --rank ...`."""

import gc

# As in `distllm.run`: thousands of modules are imported and stay, which need not be looked through again and again.
gc.set_threshold(50_000)

from distllm.engine.process import main  # noqa: E402

main()
