"""Every available engine and precision against the PyTorch reference, in one interleaved run.

Same as `hpddrnet-trt benchmark`; `--help` lists the options.
"""

from hpddrnet_trt.cli import benchmark, run

if __name__ == "__main__":
    run(benchmark)
