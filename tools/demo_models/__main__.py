"""`python -m tools.demo_models PHASE --folder DIR --seconds S`: trains one phase within its time.

Phases read and write checkpoint files in the folder, so that each can run in a machine of its own.
"""

import argparse
import time
from pathlib import Path

import torch

from .run import Run, eager, prepare_device


def _tokenizers(folder: Path) -> None:
    from .image_tokenizer import train_tokenizer

    train_tokenizer(folder / "image_tokenizer")
    _video_tokenizer(folder)


def _video_tokenizer(folder: Path) -> Path:
    from .video_tokenizer import train_tokenizer

    train_tokenizer(folder / "video_tokenizer")
    return folder / "video_tokenizer"


def _start(folder: Path) -> None:
    """Checkpoints of the shipped model, to go on from."""
    from .export import import_image

    import_image(Path("src/photogram/demo/image"), folder)


def _image_autoencoder(run: Run, decoder_only: bool) -> None:
    from .image_autoencoder import train_image_autoencoder

    train_image_autoencoder(run, run.folder / "image_tokenizer", decoder_only=decoder_only)


def _image(run: Run, arguments: argparse.Namespace) -> None:
    """Transformer and text encoder, then their distillation, then the LoRAs; each part is kept when it is done."""
    from tokenizers import Tokenizer

    from .distillation import NUM_STEPS, distil
    from .image_trainer import ImageTrainer
    from .lora import STYLES, train_lora
    from .measure import best_guidance, log_scores

    tokenizer = Tokenizer.from_file(str(run.folder / "image_tokenizer" / "tokenizer.json"))
    trainer = ImageTrainer(run, run.folder / "image_tokenizer", seed=int(time.time()) % 9973)
    if (run.folder / "image_base.safetensors").exists():
        trainer.load("image_base")
        run.log("goes on from image_base")
    optimizer = trainer.new_optimizer()
    if run.device.type == "cuda":
        trainer.compile()
    trainer.record(optimizer)
    while not (run.folder / "image_vae.safetensors").exists():
        time.sleep(0.5)
    trainer.load_autoencoder()
    trainer.fill()
    scoring = 0 if run.smoke else arguments.score_seconds
    lora_total = arguments.lora_seconds * len(STYLES)
    trainer.train(optimizer, run.seconds - arguments.distil_seconds - lora_total - scoring, arguments.rate,
                  arguments.end_rate)  # fmt: skip
    trainer.load_autoencoder()  # its decoder may have gone on meanwhile
    if arguments.distil_seconds > 0:
        with eager():
            guidance = best_guidance(trainer, tokenizer)
            base = log_scores(trainer, tokenizer, "base", steps=10, guidance=guidance)
        distil(trainer, guidance, run.seconds - lora_total - scoring * 0.4, arguments.distil_rate)
        trainer.save("image_distilled", {"guidance": guidance, "steps": NUM_STEPS})
        with eager():
            student = log_scores(trainer, tokenizer, "student", steps=NUM_STEPS, guidance=1.0)
        run.log(f"mean of all right: base {base:.3f}, student {student:.3f}")
    if arguments.lora_seconds > 0:
        with eager():  # adapters change every block, which would compile anew
            for style in STYLES:
                train_lora(trainer, style, arguments.lora_seconds)
    trainer.close()


def _video_autoencoder(run: Run) -> None:
    from .video_autoencoder import train_video_autoencoder

    train_video_autoencoder(run, _video_tokenizer(run.folder))


def _video(run: Run, distil_seconds: float, rate: float) -> None:
    """Without distillation a first part of the training; with it the last, which settles."""
    from .video_distillation import NUM_STEPS, best_guidance, distil, report
    from .video_trainer import EARLY, LATE, VideoTrainer

    tokenizer, last = _video_tokenizer(run.folder), distil_seconds > 0
    trainer = VideoTrainer(run, tokenizer, seed=int(time.time()) % 9973, layouts=LATE if last else EARLY)
    if (run.folder / "video_base.safetensors").exists():
        trainer.load("video_base")
    optimizer = trainer.new_optimizer()
    trainer.record(optimizer)
    while not (run.folder / "video_vae.safetensors").exists():
        time.sleep(0.5)
    trainer.load_autoencoder()
    trainer.fill()
    scoring = 0 if run.smoke else 25
    trainer.train(
        optimizer, run.seconds - distil_seconds - scoring * (1.6 if last else 1), rate, "video_base", settle=last
    )
    if last:
        guidance = best_guidance(trainer, tokenizer)
        distil(trainer, guidance, run.seconds - scoring, "video_distilled")
    report(trainer, tokenizer, steps=NUM_STEPS if last else 12, guidance=1.0 if last else 2.5, until=run.seconds - 8)
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
    parser.add_argument("phase", choices=("start", "tokenizers", "image-vae", "image", "lora", "video-vae", "video"))
    parser.add_argument(
        "--folder", type=Path, default=Path(".demo-train"), help="checkpoints are read and written here"
    )
    parser.add_argument("--seconds", type=float, default=480, help="wall-clock limit of this phase")
    parser.add_argument("--decoder-only", action="store_true", help="image-vae: leave the latents as they are")
    parser.add_argument("--distil-seconds", type=float, default=80, help="the last part, spent on distillation")
    parser.add_argument("--score-seconds", type=float, default=40, help="image: what measuring may take of the time")
    parser.add_argument("--lora-seconds", type=float, default=0, help="image: seconds for each LoRA, after all else")
    parser.add_argument("--styles", nargs="+", default=["pastel", "sketch"], help="lora: which ones")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--end-rate", type=float, default=0.02, help="image: the last rate, as a share of the peak")
    parser.add_argument("--distil-rate", type=float, default=6e-4, help="image: peak learning rate of distillation")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that everything runs")
    arguments = parser.parse_args()
    if arguments.phase == "tokenizers":
        _tokenizers(arguments.folder)
        return
    if arguments.phase == "start":
        _start(arguments.folder)
        return
    run = Run(arguments.phase, arguments.folder, arguments.seconds, smoke=arguments.smoke)
    torch.set_num_threads(2)
    if arguments.phase == "image-vae":
        _image_autoencoder(run, arguments.decoder_only)
    elif arguments.phase == "video-vae":
        _video_autoencoder(run)
    elif arguments.phase == "video":
        _video(run, arguments.distil_seconds, arguments.rate)
    elif arguments.phase == "lora":
        _lora(run, arguments.styles, arguments.lora_seconds)
    else:
        _image(run, arguments)
    run.log("done")


if __name__ == "__main__":
    prepare_device()
    main()
