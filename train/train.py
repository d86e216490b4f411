"""Train a network: `python train/train.py --config train/configs/demo.yaml [section.key=value ...]`.

Same as `hpddrnet-trt train`. Give the same command again to continue a run that was stopped.
"""

from hpddrnet_trt.cli import run, train

if __name__ == "__main__":
    run(train)
