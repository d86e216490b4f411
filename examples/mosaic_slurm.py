"""Segment a mosaic on a SLURM cluster, on a file system that all its machines share.

Untried: no such cluster was at hand. pip install 'hpddrnet-trt[mosaic]' dask-jobqueue, and run it
on a login node; a job is submitted for each GPU, and all end with it.

    python mosaic_slurm.py /scratch/specimen.ome.zarr /scratch/model.engine --jobs 16 --partition gpu
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from hpddrnet_trt import ClusterSettings, segment_mosaic


def main() -> None:
    parser = argparse.ArgumentParser(description="Segment a mosaic on a SLURM cluster.")
    parser.add_argument("store", type=Path)
    parser.add_argument("model")
    parser.add_argument("--jobs", type=int, default=4, help="one GPU each")
    parser.add_argument("--partition", default="gpu")
    parser.add_argument("--walltime", default="04:00:00", help="of one job; the run goes on in the next one")
    given = parser.parse_args()

    jobqueue = importlib.import_module("dask_jobqueue")
    with jobqueue.SLURMCluster(
        queue=given.partition,
        cores=1,  # one block at a time
        processes=1,
        memory="16GB",
        walltime=given.walltime,
        job_extra_directives=["--gres=gpu:1"],  # SLURM sets CUDA_VISIBLE_DEVICES of each job
        worker_extra_args=["--lifetime", "3h50m", "--lifetime-stagger", "5m"],  # shorter than the walltime
    ) as cluster:
        cluster.adapt(minimum_jobs=1, maximum_jobs=given.jobs)  # jobs that ended are submitted again
        workers = ClusterSettings(scheduler=cluster.scheduler_address, patience=24 * 3600)  # the queue may be long
        print(segment_mosaic(given.store, given.model, cluster=workers))


if __name__ == "__main__":
    main()
