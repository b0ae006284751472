"""Train one tiny run of each task and print the SHA-256 of every file that it leaves.

Run `python tests/programs/golden.py` before and after a change of the code: where nothing of the training was meant
to change, its output is the same on the same machine. The group `state` holds numbers (weights, checkpoints, latents,
metrics.jsonl), the group `words` what people read (config.yaml, evaluation, report, card, pictures).
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

STATE = (".safetensors", "metrics.jsonl", "progress.json", "data.json", "index.json")
RUN = [
    "--run.epochs=2", "--run.max_images=200", "--run.batch_size=20", "--run.gradient_accumulation_steps=2",
    "--run.seed=3", "--run.checkpoint_every=60", "--run.keep_checkpoints=2", "--run.log_every=40",
    "--run.ema_decay=0.9", "--run.mixed_precision=no", "--run.step=eager", "--run.deterministic=true",
    "--run.tracker=null", "--run.on_nonfinite=stop", "--optimizer.learning_rate=2e-3", "--optimizer.warmup_images=50",
    "--optimizer.schedule=cosine", "--optimizer.max_grad_norm=1",
]  # fmt: skip
DIGITS = [
    "--data.name=digits", "--data.channels=1", "--data.fit=crop", "--data.heldout_fraction=0.9", "--data.num_workers=0"
]  # fmt: skip
AUTOENCODER = [
    *DIGITS, *RUN, "--model.architecture=vae", "--model.block_out_channels=[8,8]", "--model.norm_num_groups=4",
    "--model.latent_channels=4", "--objective.kl_weight=1", "--evaluation.max_images=32", "--evaluation.draws=1",
]  # fmt: skip
WHOLE = [
    "--data.resolution=24", "--objective.likelihood=gaussian", "--objective.scale=learned",
    "--objective.kl_schedule=cosine", "--objective.kl_warmup_images=100", "--objective.free_bits=3",
    "--objective.perceptual=squeeze", "--objective.perceptual_weight=0.1", "--adversarial.weight=0.1",
    "--adversarial.start_images=40", "--adversarial.warmup_images=60", "--adversarial.width=8",
    "--adversarial.layers=2", "--adversarial.lecam_weight=0.1", "--adversarial.r1_weight=0.01",
]  # fmt: skip
TEXT_TO_IMAGE = [
    *DIGITS, *RUN, "--data.resolution=8", "--vae=runs/plain/model", "--model.block_out_channels=[16]",
    "--model.norm_num_groups=8", "--model.text_width=16", "--model.text_layers=1", "--sampling.steps=2",
    "--sampling.seeds=1", "--sampling.guidance=[2]", '--sampling.prompts=["a handwritten two"]',
    "--sampling.heldout_images=20",
]  # fmt: skip
COMMANDS = (
    ["train", *AUTOENCODER, "--data.resolution=8", "--objective.scale=0.5", "--run.output_dir=runs/plain"],
    ["train", *AUTOENCODER, *WHOLE, "--run.output_dir=runs/whole"],
    ["train-text-to-image", *TEXT_TO_IMAGE, "--run.output_dir=runs/text-to-image"],
    [
        "encode", "digits", "--vae=runs/plain", "--out=runs/latents", "--split=training", "--kind=posterior",
        "--dtype=float32", "--compute_dtype=float32", "--batch_size=16", "--shard_images=100", "--data.num_workers=0",
    ],
)  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"TORCH_HOME": f"{scratch}/torch", "HF_HUB_OFFLINE": "1"}
        os.chdir(scratch)  # cards and reports name the folder as it was given
        import torch
        from torchvision.models import squeezenet1_1

        from diffusers_vae import encode_images
        from diffusers_vae.cli import main as command
        from diffusers_vae.data import DataConfig, load_data
        from diffusers_vae.models import load_autoencoder

        torch.set_num_threads(1)
        torch.manual_seed(0)
        Path("torch/hub/checkpoints").mkdir(parents=True)  # for LPIPS, whose published weights need a download
        torch.save(squeezenet1_1().state_dict(), "torch/hub/checkpoints/squeezenet1_1-b8a52dc0.pth")
        output = os.dup(1)
        os.dup2(2, 1)
        for arguments in COMMANDS:
            if arguments[0] == "train-text-to-image":  # whose latents would be bfloat16 where that is fast
                images, _ = load_data(DataConfig(name="digits", resolution=8, heldout_fraction=0.9))
                folder, said = "runs/text-to-image/latents", "training images of digits"
                encode_images(load_autoencoder("runs/plain"), images, folder, compute_dtype=torch.float32, data=said)
            if command(arguments):
                return 1
        os.dup2(output, 1)
        files = [path for path in sorted(Path("runs").rglob("*")) if path.is_file() and path.name != ".lock"]
        for group in ("state", "words"):
            for path in files:
                of_state = path.name.endswith(STATE) or path.name.startswith("process-")
                if of_state == (group == "state"):
                    print(f"{group} {path} {hashlib.sha256(path.read_bytes()).hexdigest()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
