"""`python -m hpddrnet_trt` is `hpddrnet-trt`."""

from hpddrnet_trt.cli import main

main()
