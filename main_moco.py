"""MoCo v3 pre-training.

One process (GPU or CPU), scikit-learn's digits:
    python main_moco.py @recipes/digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_moco.py @recipes/vit_small_300.txt /data/imagenet
Two nodes, the same line on both (HOST is the first of them):
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_moco.py @recipes/vit_base_300.txt /data/imagenet
"""

import json
import math
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad_norm_

from moco import UserError, checkpoint, cli, data, distributed
from moco.augment import augment
from moco.builder import MoCo
from moco.evaluation import KNN
from moco.log import Log, draw_views, versions
from moco.optimizer import cosine_momentum, create_optimizer, set_lr, warmup_cosine
from vits import RESNETS, create_backbone


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags()])
    add = parser.add_argument
    add("--optimizer", choices=("lars", "adamw"), default="lars", help="LARS for ResNets")
    add("--lr", type=cli.nonnegative, default=0.6, help="base rate; used: lr · batch/256")
    add("--wd", "--weight-decay", type=cli.nonnegative, default=1e-6, help="weight decay")
    add("--warmup-epochs", type=cli.nonnegative, default=10, help="linear, from 0")
    add("--clip-grad", type=cli.positive_float, metavar="NORM", help="largest norm of the gradient")
    add("--moco-dim", type=cli.positive, default=256, help="of queries and keys")
    add("--moco-mlp-dim", type=cli.positive, default=4096, help="hidden width of the heads")
    add("--moco-m", type=cli.share, default=0.99, help="momentum of the momentum encoder")
    add("--moco-m-cos", action="store_true", help="momentum rises to 1 by half a cosine")
    add("--moco-t", type=cli.positive_float, default=1.0, help="temperature")
    add("--stop-grad-conv1", action="store_true", help="keep a ViT's patch projection random")
    add("--crop-min", type=cli.share, default=0.08, help="smallest crop, share of the area")
    add("--init-from", metavar="PATH", help="start from the weights of a checkpoint")
    add("--save-every", type=cli.count, default=0, metavar="EPOCHS", help="keep these checkpoints "
        "beside the last one")  # fmt: skip
    add("--knn-every", type=cli.count, default=10, metavar="EPOCHS", help="0: never")
    add("--knn-bank", type=cli.positive, default=50_000, metavar="IMAGES", help="training images "
        "that kNN searches")  # fmt: skip
    args = parser.parse_args(argv)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    if args.init_from and args.resume not in (None, "auto"):
        parser.error("--init-from starts a run, --resume PATH continues one: give one of them")
    return args


def main(args):
    device, amp = distributed.set_up(args.device, args.amp)
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    folder = Path(args.output_dir or f"runs/{args.arch}")
    previous = find_previous(args, folder)

    dataset = data.load_data(args.data, args.data_root)
    batches = data.EpochBatches(len(dataset.train), args.batch_size, args.seed)
    crops = data.TwoCrops(dataset.train, args.img_size, args.crop_min, args.seed)
    loader = data.create_loader(crops, batches, args.workers, device, persistent=True)
    knn = None
    if args.knn_every and dataset.val:
        knn = KNN(dataset, args.img_size, args.knn_bank, args.workers, device)

    model = create_model(args, device, amp)
    optimizer = create_optimizer(args.optimizer, model, args.lr, args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    first_epoch = 0
    if previous:
        first_epoch = resume(previous, args, len(batches), model, optimizer, scaler)
    elif args.init_from:
        checkpoint.load_model(model, checkpoint.load(args.init_from), args.init_from)
    distributed.check_agreement(device, images=len(dataset.train), epoch=first_epoch)
    ddp = distributed.parallel(model, device)

    about = describe(args, device, amp)
    if distributed.rank() == 0:
        introduce(about, folder, dataset, batches, model)
        draw_views(folder, *first_views(crops, device))
    log = Log(
        folder,
        steps=args.epochs * len(batches),
        epoch_steps=len(batches),
        step=first_epoch * len(batches),
        batch_size=args.batch_size,
        chance=4 * args.moco_t * math.log(args.batch_size),  # 4τ·ln N
        print_freq=args.print_freq,
        tensorboard=args.tensorboard,
    )
    with closing(log):
        if knn and first_epoch == 0:
            accuracy = knn(model.base_encoder, autocast)
            log.row(0, knn=accuracy)
            log.say(f"kNN {accuracy:.1f} % before training, k {knn.k}, bank {len(knn.chosen):,}")
        for epoch in range(first_epoch, args.epochs):
            train_one_epoch(ddp, model, loader, optimizer, scaler, autocast, epoch, args, log)
            done, step = epoch + 1, (epoch + 1) * len(batches)
            log.check_weights(step, model)
            new_knn = knn and (done % args.knn_every == 0 or done == args.epochs)
            if new_knn:
                log.row(step, knn=knn(model.base_encoder, autocast))
            if distributed.rank() == 0:
                keep = args.save_every and done % args.save_every == 0
                state = training_state(about, done, step, model, optimizer, scaler)
                checkpoint.save(folder, state, f"checkpoint_{done:04}.pth" if keep else None)
            log.epoch(done, args.epochs, new_knn)


def train_one_epoch(ddp, model, loader, optimizer, scaler, autocast, epoch, args, log):
    """One pass over the data; `ddp` is `model`, or the model wrapped for several processes."""
    ddp.train()
    device = next(model.parameters()).device
    peak_lr = args.lr * args.batch_size / 256
    loader.batch_sampler.epoch = epoch
    for step, (crops, rows) in enumerate(log.timed(loader), epoch * len(loader)):
        t = step / len(loader)  # in epochs
        lr = warmup_cosine(t, args.epochs, args.warmup_epochs, peak_lr)
        m = cosine_momentum(t, args.epochs, args.moco_m) if args.moco_m_cos else args.moco_m
        set_lr(optimizer, lr)

        crops = crops.to(device, non_blocking=device.type == "cuda")  # uint8 [2, N, 3, H, W]
        x1, x2 = augment(crops.flatten(0, 1), rows.flatten(0, 1)).chunk(2)
        with autocast():
            loss, monitors = ddp(x1, x2)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if args.clip_grad:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        model.update_momentum_encoder(m)
        log.step(step + 1, lr, m, loss=loss, **monitors)


def create_model(args, device, amp):
    if amp and device.type == "cpu" and args.arch in RESNETS and min(args.img_size) <= 16:
        # Taps of a 3×3 kernel that lie on padding alone (the last stage is 1 pixel wide) get
        # uninitialised memory as their gradient, in torch 2.6 as in 2.15.
        raise UserError("torch's bf16 gradients on a CPU are wrong for ResNets at 16 pixels or "
                        "less: --amp off, or a larger --img-size")  # fmt: skip
    torch.manual_seed(args.seed)  # the same weights on every rank
    backbone = create_backbone(args.arch, args.img_size, args.patch_size, args.stop_grad_conv1)
    backbone = distributed.synchronize_batchnorm(backbone, device)
    return MoCo(backbone, args.moco_dim, args.moco_mlp_dim, args.moco_t).to(device)


def find_previous(args, folder):
    """Path of the checkpoint to continue, or None. UserError if a run would be overwritten."""
    last = folder / checkpoint.LAST
    if args.resume == "auto":
        return last if last.exists() else None
    if last.exists() and not (
        args.resume and Path(args.resume).resolve().parent == last.resolve().parent
    ):
        raise UserError(
            f"{folder} holds a run: --resume auto continues it, --output-dir starts another"
        )
    if args.resume and not Path(args.resume).is_file():
        raise UserError(f"no checkpoint at {args.resume}")
    return args.resume


# What may differ when a run continues; anything else would change its mathematics.
MAY_CHANGE = set(
    "data data_root workers amp device output_dir resume init_from print_freq tensorboard "
    "save_every knn_every knn_bank".split()
)


def resume(path, args, epoch_steps, model, optimizer, scaler):
    """Loads a training checkpoint into model, optimizer and scaler → epochs done."""
    state = checkpoint.load(path)
    if "args" not in state:
        raise UserError(f"{path} has weights but no arguments to continue with: use --init-from")
    changed = [
        f"--{name.replace('_', '-')} {state['args'].get(name)} → {value}"
        for name, value in vars(args).items()
        if name not in MAY_CHANGE and value != state["args"].get(name)
    ]
    if changed:
        raise UserError(f"{path} was trained with other arguments: {', '.join(changed)}")
    if state["iteration"] != state["epoch"] * epoch_steps:
        raise UserError(f"{path} was trained on another number of images than DIR holds now")
    checkpoint.load_model(model, state, path)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # empty unless the run was in fp16
        scaler.load_state_dict(state["scaler"])
    return state["epoch"]


def training_state(about, epoch, iteration, model, optimizer, scaler):
    """The published layout, and beside it what an exact continuation needs; plain types alone."""
    return dict(
        epoch=epoch,
        iteration=iteration,
        arch=about["args"]["arch"],
        num_heads=checkpoint.num_heads(model),
        state_dict=checkpoint.model_state(model),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        **about,
    )


def first_views(crops, device):
    """The first ten images, as the first epoch shows them → x1, x2, [10, 3, H, W]."""
    batch = crops.__getitems__([(0, i) for i in range(min(10, len(crops)))])
    images, rows = next(data.checked([batch]))
    return augment(images.flatten(0, 1).to(device), rows.flatten(0, 1)).chunk(2)


def describe(args, device, amp):
    """What a run is: arguments, processes, precision, versions; for args.json and checkpoints."""
    precision = str(amp).removeprefix("torch.") + " autocast" if amp else "float32"
    return dict(
        args=vars(args),
        world=distributed.world(),
        device=str(device),
        precision=precision,
        versions=versions(),
    )


def introduce(about, folder, dataset, batches, model):
    """Prints what is about to run, once, and writes it to args.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to --output-dir {folder}: {error.strerror}") from None

    args = SimpleNamespace(**about["args"])
    parameters = sum(p.numel() for p in model.parameters())
    labels = f"{len(dataset.val):,} to validate" if dataset.val else dataset.note
    flags = " ".join(f"{name}={value}" for name, value in about["args"].items())
    print(
        f"model   {args.arch}, {parameters:,} parameters with both encoders and predictor\n"
        f"data    {args.data}: {len(dataset.train):,} images to train on, {labels}\n"
        f"batch   {args.batch_size} in {about['world']} process(es): {len(batches)} steps an "
        f"epoch, {batches.left_out} images left over\n"
        f"rate    {args.lr:g} · {args.batch_size}/256 = {args.lr * args.batch_size / 256:g}, "
        f"{args.optimizer}\n"
        f"device  {about['device']}, {about['precision']}\n"
        f"with    {', '.join(f'{name} {version}' for name, version in about['versions'].items())}\n"
        f"args    {flags}\n"
        f"folder  {folder}",
        flush=True,
    )


if __name__ == "__main__":
    cli.run(main, parse_args)
