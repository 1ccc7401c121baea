"""A rank that a program starts for itself: `python -m distllm.engine --rank ...`."""

from distllm.engine.process import main

main()
