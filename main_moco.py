"""MoCo v3 pre-training.

One process (GPU or CPU), scikit-learn's digits:
    python main_moco.py @recipes/digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_moco.py @recipes/vit_small_300.txt /data/imagenet
Two nodes, the same line on both (HOST is the first of them):
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_moco.py @recipes/vit_base_300.txt /data/imagenet
"""

import math
from functools import partial
from pathlib import Path

import torch

from moco import checkpoint, cli, data, distributed
from moco.augment import Pixels, Views, augment
from moco.backbones import check_precision, create_backbone
from moco.builder import MoCo
from moco.evaluation import KNN
from moco.keeper import Keeper
from moco.log import Log, describe, draw_views, introduce
from moco.optimizer import cosine_momentum, create_optimizer, descend, set_lr, warmup_cosine


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags()])
    add = parser.add_argument
    add("--optimizer", choices=("lars", "adamw"), default="lars", help="LARS for ResNets")
    add("--lr", type=cli.nonnegative, default=0.6, help="base rate; used: lr · batch/256")
    add("--wd", "--weight-decay", type=cli.nonnegative, default=1e-6, help="weight decay")
    add("--warmup-epochs", type=cli.nonnegative, default=10, help="linear, from 0")
    add("--clip-grad", type=cli.positive_float, metavar="NORM", help="largest norm of the gradient")
    add("--moco-dim", type=cli.width, default=256, help="of queries and keys")
    add("--moco-mlp-dim", type=cli.width, default=4096, help="hidden width of the heads")
    add("--moco-m", type=cli.share, default=0.99, help="momentum of the momentum encoder")
    add("--moco-m-cos", action="store_true", help="momentum rises to 1 by half a cosine")
    add("--moco-t", type=cli.positive_float, default=1.0, help="temperature")
    add("--stop-grad-conv1", action="store_true", help="keep a ViT's patch projection random")
    add("--crop-min", type=cli.share, default=0.08, help="smallest crop, share of the area")
    add("--encode-chunk", type=cli.count, default=0, metavar="VIEWS", help="of a process that go "
        "through the backbone at a time: less memory, the same gradient")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the backbones")
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
    device, amp = distributed.set_up(args.device, args.amp, args.timeout)
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    folder = Path(args.output_dir or f"runs/{args.arch}")
    previous = checkpoint.find_previous(args, folder)

    setting = backbone_setting(args) | Pixels.chosen(args)._asdict()
    dataset = cli.images(args, setting)
    cli.check_apart(folder, args.data)
    batches = data.EpochBatches(len(dataset.train), args.batch_size, args.seed)
    crops = data.TwoCrops(dataset.train, args.img_size, args.crop_min, args.seed)
    loader = data.create_loader(crops, batches, args.workers, device, persistent=True)
    knn = None
    if args.knn_every and dataset.val:
        knn = KNN(dataset, args.img_size, args.knn_bank, args.workers, device)

    model = create_model(args, device, amp)
    optimizer = create_optimizer(args.optimizer, model, args.lr, args.wd)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    chance = 4 * args.moco_t * math.log(args.batch_size)  # 4τ·ln N
    images = len(dataset.train)
    bad = data.BadImages(args.max_bad_images, images, folder, resumed=bool(previous))
    log = Log(folder, args, len(batches), bad, chance)
    parts = dict(optimizer=optimizer, scaler=scaler, batches=batches, log=log)
    if args.init_from and not previous:
        checkpoint.load_model(model, checkpoint.load(args.init_from), args.init_from)
    epoch, iteration, _ = checkpoint.resume(previous, args, model, **parts)
    distributed.check_agreement(device, images=len(dataset.train), steps=iteration)
    ddp = distributed.parallel(model, device)

    about = describe(args, device, amp, **setting)
    parameters = sum(p.numel() for p in model.parameters())
    introduce(
        folder,
        about,
        model=f"{args.arch}, {parameters:,} parameters with both encoders and predictor",
        data=f"{args.data}: {dataset}",
        batch=batches,
        rate=f"{args.lr:g} · {args.batch_size}/256 = {peak_lr(args):g}, {args.optimizer}",
        **left_out(args.in_chans),
    )
    if distributed.rank() == 0:
        draw_views(folder, *first_views(crops, device, bad), crops.source.pixels)

    def get_state():
        log.check_weights(model)
        return checkpoint.training_state(about, keeper.epoch, keeper.iteration, model, **parts)

    def evaluate():
        [found] = knn(model.base_encoder, autocast, bad=bad)
        log.evaluation(f"kNN {found:.1f} %", knn=found)
        return found

    with log, Keeper(folder, args.save_minutes, get_state, epoch, iteration) as keeper:
        if knn and not iteration:
            found = evaluate()
            log.say(f"kNN {found:.1f} % before training, k {knn.k}, bank {len(knn.chosen):,}")
        for done in range(epoch + 1, args.epochs + 1):
            train_one_epoch(ddp, model, loader, optimizer, scaler, autocast, args, log, keeper)
            new_knn = knn and (done % args.knn_every == 0 or done == args.epochs)
            if new_knn:
                evaluate()
            keep = args.save_every and done % args.save_every == 0
            keeper.end_epoch(f"checkpoint_{done:04}.pth" if keep else None)
            log.epoch(done, new_knn)


def train_one_epoch(ddp, model, loader, optimizer, scaler, autocast, args, log, keeper):
    """What is left of an epoch; `ddp` is `model`, or the model wrapped for several processes."""
    ddp.train()
    device, pixels = next(model.parameters()).device, Pixels.chosen(args)
    loader.batch_sampler.start(keeper.epoch, keeper.iteration)
    for step, (crops, rows) in enumerate(log.timed(loader), keeper.iteration):
        t = step / len(loader)  # in epochs
        lr = warmup_cosine(t, args.epochs, args.warmup_epochs, peak_lr(args))
        m = cosine_momentum(t, args.epochs, args.moco_m) if args.moco_m_cos else args.moco_m
        set_lr(optimizer, lr)

        crops = crops.to(device, non_blocking=device.type == "cuda")  # uint8 [2, N, C, H, W]
        if args.encode_chunk:
            x1, x2 = (Views(*view, pixels) for view in zip(crops, rows))
        else:
            x1, x2 = augment(crops.flatten(0, 1), rows.flatten(0, 1), pixels).chunk(2)
        with autocast():
            loss, monitors = ddp(x1, x2)

        descend(loss, optimizer, scaler, args.clip_grad)
        model.update_momentum_encoder(m)
        log.step(step + 1, dict(lr=lr, m=m), loss=loss, **monitors)
        keeper.step(step + 1)


def peak_lr(args):
    return args.lr * args.batch_size / 256


def backbone_setting(args):
    """What a checkpoint must say for the backbone to be created again."""
    names = ("arch", "img_size", "patch_size", "small_stem", "in_chans")
    return {name: getattr(args, name) for name in names}


def create_model(args, device, amp):
    torch.manual_seed(args.seed)  # the same weights on every rank
    backbone = create_backbone(**backbone_setting(args), stop_grad_conv1=args.stop_grad_conv1)
    check_precision(backbone, args.img_size, device, amp, args.in_chans)
    backbone = distributed.synchronize_batchnorm(backbone, device)
    heads = (args.moco_dim, args.moco_mlp_dim, args.moco_t)
    return MoCo(backbone, *heads, args.encode_chunk, args.compile).to(device)


def left_out(in_chans):
    """What the augmentation leaves out, as a line for `introduce`."""
    colours = f"{in_chans} channel(s): without saturation, hue and grayscale, which need red, green"
    return {} if in_chans == 3 else {"views": f"{colours} and blue"}


def first_views(crops, device, bad):
    """The first ten images, as the first epoch shows them → x1, x2, [10, C, H, W]."""
    batch = crops.__getitems__([(0, i) for i in range(min(10, len(crops)))])
    images, rows = next(data.checked([batch], bad))
    pixels = crops.source.pixels
    return augment(images.flatten(0, 1).to(device), rows.flatten(0, 1), pixels).chunk(2)


if __name__ == "__main__":
    cli.run(main, parse_args)
