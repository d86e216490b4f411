"""Accuracy of a checkpoint or any model file on a dataset.

Same as `hpddrnet-trt evaluate`; `--help` lists the options.
"""

from hpddrnet_trt.cli import evaluate, run

if __name__ == "__main__":
    run(evaluate)
