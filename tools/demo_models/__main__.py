"""`python -m tools.demo_models PHASE --folder DIR --seconds S`: trains one phase within its time.

Phases read and write checkpoint files in the folder, so that each can run in a machine of its own.
"""

import argparse
import time
from pathlib import Path

import torch

from .run import Run, prepare_device


def _tokenizers(folder: Path) -> None:
    from .image_tokenizer import train_tokenizer

    train_tokenizer(folder / "image_tokenizer")


def _image_autoencoder(run: Run) -> None:
    from .image_autoencoder import train_image_autoencoder

    train_image_autoencoder(run, run.folder / "image_tokenizer")


def _image(run: Run, distil_seconds: float, lora_seconds: float, rate: float) -> None:
    from tokenizers import Tokenizer

    from .distillation import NUM_STEPS, best_guidance, distil, quick_score
    from .image_trainer import ImageTrainer
    from .lora import STYLES, train_lora

    tokenizer = Tokenizer.from_file(str(run.folder / "image_tokenizer" / "tokenizer.json"))
    trainer = ImageTrainer(run, run.folder / "image_tokenizer", seed=int(time.time()) % 9973)
    resumed = (run.folder / "image_base.safetensors").exists()
    if resumed:
        trainer.load("image_base")
    if run.device.type == "cuda":
        trainer.compile()
    while not (run.folder / "image_vae.safetensors").exists():
        time.sleep(0.5)
    trainer.load_autoencoder()
    trainer.fill()
    scoring = 0 if run.smoke else 30
    lora_total = lora_seconds * len(STYLES)
    if run.remaining > distil_seconds + lora_total + scoring + 5:
        trainer.train(run.seconds - distil_seconds - lora_total - scoring, rate)
        trainer.save("image_base", {"resumed": int(resumed)})
    if distil_seconds > 0:
        guidance = best_guidance(trainer, tokenizer)
        distil(trainer, guidance, run.seconds - lora_total - scoring * 0.4, 6e-4)
        trainer.save("image_distilled", {"guidance": guidance, "steps": NUM_STEPS})
        for size in (16, 8):
            run.log(f"student, {size * 16} px: {quick_score(trainer, tokenizer, steps=4, guidance=1.0, size=size)}")
    if lora_seconds > 0:
        torch.compiler.set_stance("force_eager")  # adapters change every block, which would compile anew
        for style in STYLES:
            train_lora(trainer, style, lora_seconds)
    trainer.close()


def _lora(run: Run, styles: list[str], lora_seconds: float) -> None:
    """LoRAs alone, on the distilled checkpoint; works on a CPU too, in some minutes each."""
    from .image_trainer import ImageTrainer
    from .lora import train_lora

    trainer = ImageTrainer(run, run.folder / "image_tokenizer", seed=31)
    trainer.load("image_distilled")
    trainer.load_autoencoder()
    for style in styles:
        train_lora(trainer, style, lora_seconds)
    trainer.close()


def main() -> None:
    """Parse the command line and run one phase."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_models", description=__doc__)
    parser.add_argument("phase", choices=("tokenizers", "image-vae", "image", "lora"))
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo-train"), help="checkpoints are read and written here"
    )
    parser.add_argument("--seconds", type=float, default=480, help="wall-clock limit of this phase")
    parser.add_argument("--distil-seconds", type=float, default=80, help="image: the last part, spent on distillation")
    parser.add_argument("--lora-seconds", type=float, default=0, help="image: seconds for each LoRA, after all else")
    parser.add_argument("--styles", nargs="+", default=["pastel", "sketch"], help="lora: which ones")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="image: peak learning rate")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.phase == "tokenizers":
        _tokenizers(arguments.folder)
        return
    run = Run(arguments.phase, arguments.folder, arguments.seconds, smoke=arguments.smoke)
    torch.set_num_threads(2)
    if arguments.phase == "image-vae":
        _image_autoencoder(run)
    elif arguments.phase == "lora":
        _lora(run, arguments.styles, arguments.lora_seconds)
    else:
        _image(run, arguments.distil_seconds, arguments.lora_seconds, arguments.rate)
    run.log("done")


if __name__ == "__main__":
    prepare_device()
    main()
