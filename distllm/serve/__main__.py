"""Rank 0 of an HTTP front, which starts it: `python -m distllm.serve FD ROLE WORDS...`, FD being their socket."""

from __future__ import annotations

import socket
import sys

from distllm.run import Front, main
from distllm.serve.messages import Role

if __name__ == "__main__":
    main(sys.argv[3:], Front(socket.socket(fileno=int(sys.argv[1])), Role(sys.argv[2])))
