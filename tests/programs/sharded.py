"""A run sharded by FSDP2 on the CPU, and again from its middle.

`accelerate launch --config_file FSDP2 ... sharded.py RUN.yaml AGAIN IMAGES` trains as RUN.yaml says, copies the run to
the folder AGAIN as it was after IMAGES images, and continues it there. Accelerate offers FSDP on GPUs only, so it is
made to believe that it may shard over processes on a CPU.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.runs import at, interrupted_at

from diffusers_vae.cli.parser import TRAININGS, parse_settings
from diffusers_vae.tasks.autoencoder import train


def main(settings: str, again: Path, images_seen: int) -> None:
    begin = AcceleratorState.__init__

    def begin_sharded(self, *args, **kwargs):
        new = not AcceleratorState._shared_state
        begin(self, *args, **kwargs)
        if new:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's config says

    AcceleratorState.__init__ = begin_sharded
    config, _ = parse_settings(TRAININGS["train"], ["--config", settings])
    train(config)
    if torch.distributed.get_rank() == 0:
        interrupted_at(images_seen, config.run.output_dir, again)
    torch.distributed.barrier()
    train(at(config, again))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
