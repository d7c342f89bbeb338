"""MoCo v3 pre-training.

One process (GPU or CPU), scikit-learn's digits:
    python main_moco.py @recipes/digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_moco.py @recipes/vit_small_300.txt /data/imagenet
Two nodes, the same line on both (HOST is the first of them):
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        main_moco.py @recipes/vit_base_300.txt /data/imagenet
"""

import argparse
import math

import torch

from engine import cli, launch, plots, weights
from engine.backbones import BackboneConfig, check_bf16_conv_gradients
from engine.errors import UserError
from engine.evaluation import FeatureMonitor
from engine.loader import EpochBatchSampler, TwoCrops, create_loader, unpack_batches
from engine.run import Run
from moco import (
    MoCo,
    augment,
    cosine_momentum,
    create_optimizer,
    optimizer_step,
    scaled_lr,
    set_lr,
    warmup_cosine_lr,
)
from moco.gradients import GradientMonitor
from vits import POOLING


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags()])
    add = parser.add_argument
    add("--optimizer", choices=("lars", "adamw"), default="lars", help="LARS for ResNets")
    add("--lr", type=cli.non_negative_float, default=0.6, help="base lr, scaled by batch/256")
    add("--wd", "--weight-decay", type=cli.non_negative_float, default=1e-6, help="weight decay")
    add("--warmup-epochs", type=cli.non_negative_float, default=10, help="linear warm-up from 0")
    add("--clip-grad", type=cli.positive_float, metavar="NORM", help="largest gradient norm")
    add("--moco-dim", type=cli.width, default=256, help="width of queries and keys")
    add("--moco-mlp-dim", type=cli.width, default=4096, help="hidden width of the heads")
    add("--moco-m", type=cli.fraction, default=0.99, help="momentum of the momentum encoder")
    switch = argparse.BooleanOptionalAction
    cosine = "raise the momentum to 1 by half a cosine"
    add("--moco-m-cos", action=switch, default=False, help=cosine)
    add("--moco-t", type=cli.positive_float, default=1.0, help="temperature")
    poses, pools = ("sincos", "learned", "none"), tuple(POOLING)
    add("--pos-embed", choices=poses, default="sincos", help="position embedding of a ViT")
    pool = "a ViT's features: class token, or average without it, with or without LayerNorm"
    add("--pool", choices=pools, default="token", help=pool)
    add("--no-head-bn", action="store_true", help="heads without BatchNorm")
    add("--no-predictor", action="store_true", help="no predictor after the projector")
    fixed = "keep a ViT's patch projection random"
    add("--stop-grad-conv1", action=switch, default=False, help=fixed)
    add("--crop-min", type=cli.fraction, default=0.08, help="smallest crop, fraction of the area")
    count = cli.non_negative_int
    chunk = "views that pass the backbone at a time: less memory, the same gradient"
    add("--encode-chunk", type=count, default=0, metavar="VIEWS", help=chunk)
    add("--compile", action="store_true", help="torch.compile the backbones")
    add("--init-from", metavar="PATH", help="weights to start from, of any kind")
    save = "keep every such checkpoint beside the last one"
    add("--save-every", type=count, default=0, metavar="EPOCHS", help=save)
    add("--knn-every", type=count, default=10, metavar="EPOCHS", help="kNN and RankMe; 0: never")
    knn_data = "labelled images for kNN alone, train and val, in any form of DIR"
    add("--knn-data", metavar="DIR", help=knn_data)
    bank = "training images that kNN searches"
    add("--knn-bank", type=cli.positive_int, default=50_000, metavar="IMAGES", help=bank)
    args = parser.parse_args(argv)
    if args.epochs == 0:
        parser.error("--epochs 0 trains nothing (kNN alone: main_lincls.py --knn --epochs 0)")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    if args.knn_data and args.val:
        parser.error("--knn-data has images to validate: give it or --val")
    if args.knn_every == 0 and (args.knn_data or args.val):
        parser.error("--knn-data and --val are for kNN, which --knn-every 0 turns off")
    if args.init_from and args.resume not in (None, "auto"):
        parser.error("--init-from starts a run, --resume PATH continues one: give one of them")
    return args


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    run = Run(args, env, cli.output_folder(args, args.arch))

    config = BackboneConfig.from_args(args)
    splits = cli.load_splits_from_args(args, config.pixel_format)
    knn_splits = cli.load_knn_splits_from_args(args, splits, config.pixel_format)
    crops = TwoCrops(splits.train, config.img_size, args.crop_min, args.seed)
    sampler = EpochBatchSampler(len(crops), args.batch_size, args.seed)
    check_schedule(args, steps_per_epoch=len(sampler))
    loader = create_loader(crops, sampler, args.workers, env.device, persistent=True)

    model = create_model(args, config, env)
    optimizer = create_optimizer(args.optimizer, model, args.lr, args.wd)
    scaler = env.grad_scaler()
    if args.init_from and not run.resuming:
        message = weights.initialize_moco(model, args, config.pixel_format)
        if message:
            launch.print_rank0(f"init    {message}")
    run.restore(loader, config, splits, model=model, optimizer=optimizer, scaler=scaler)
    ddp_model = env.wrap_ddp(model)
    monitor = FeatureMonitor(splits, knn_splits, config.img_size, args.knn_bank, args.workers, env)
    print_config(args, run, model, splits, knn_splits, sampler)
    plot_first_views(run, crops)

    with run:
        if args.knn_every > 0 and run.step == 0:
            evaluate(run, monitor, model)
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(ddp_model, model, loader, optimizer, scaler, run)
            is_last = epoch == args.epochs
            eval_due = args.knn_every > 0 and (is_last or is_due(epoch, args.knn_every))
            if eval_due:
                evaluate(run, monitor, model)
            keep_as = f"checkpoint_{epoch:04}.pth" if is_due(epoch, args.save_every) else None
            run.end_epoch(keep_as, evaluated=eval_due)


def train_one_epoch(ddp_model, model, loader, optimizer, scaler, run):
    """The steps that are left of an epoch.

    ddp_model averages the gradients over the ranks; the momentum update acts on `model` in it.
    """
    args, env, pixel_format = run.args, run.env, loader.dataset.dataset.pixel_format
    chance = 4 * args.moco_t * math.log(args.batch_size)  # two terms of 2τ · ln N
    grad_monitor = GradientMonitor(model.base_encoder)
    ddp_model.train()
    for crops, params in run.batches(loader):  # uint8 [2, N, C, H, W], float32 [2, N, 9]
        t = run.step / len(loader)  # in epochs
        peak_lr = scaled_lr(args.lr, args.batch_size)
        lr = warmup_cosine_lr(t, args.epochs, args.warmup_epochs, peak_lr)
        m = cosine_momentum(t, args.epochs, args.moco_m) if args.moco_m_cos else args.moco_m
        set_lr(optimizer, lr)

        dtype = env.amp_dtype or torch.float32
        x1, x2 = make_views(env.to_device(crops), params, pixel_format, dtype, args.encode_chunk)
        with env.autocast():
            loss, metrics = ddp_model(x1, x2)
        grads = optimizer_step(loss, optimizer, scaler, args.clip_grad, grad_monitor)
        model.update_momentum_encoder(m)

        # Saves when it is time to; raises Interrupted after a signal.
        run.end_step(loss=loss, **metrics, **grads, chance=chance, lr=lr, m=m)


def make_views(crops, params, pixel_format, dtype=torch.float32, chunk=0):
    """crops: uint8 [2, N, C, H, W] on the device; params: float32 [2, N, 9] on the CPU → x1, x2.

    dtype: of the views; that of autocast loses nothing, for the first layer rounds to it anyway.
    chunk: augment so many images at a time, so that a large batch is in float32 nowhere; 0: all.
    """
    images, params = crops.flatten(0, 1), params.flatten(0, 1)
    views = torch.empty(images.shape, dtype=dtype, device=images.device)  # contiguous
    size = chunk or len(images)
    for x, crop, param in zip(views.split(size), images.split(size), params.split(size)):
        x.copy_(augment(crop, param, pixel_format.mean, pixel_format.std))
    return views.chunk(2)


def create_model(args, config, env):
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    backbone = config.create_backbone(stop_grad_conv1=args.stop_grad_conv1)
    check_bf16_conv_gradients(backbone, config, env)
    model = MoCo(
        env.sync_batchnorm(backbone),
        dim=args.moco_dim,
        mlp_dim=args.moco_mlp_dim,
        T=args.moco_t,
        encode_chunk=args.encode_chunk,
        compile=args.compile,
        head_bn=not args.no_head_bn,
        use_predictor=not args.no_predictor,
    )
    return model.to(env.device)


def evaluate(run, monitor, model):
    """Logs kNN, where there are labels, and RankMe."""
    values = monitor(model.base_encoder, run.unreadable)
    text = f"RankMe {values['rankme']:.1f}"
    if "knn" in values:
        text = f"kNN {values['knn']:.1f} %, {text}"
    run.log_eval(text, **values)
    if run.step == 0:
        knn = monitor.knn
        bank = f" (k {knn.k}, bank {len(knn.bank_indices):,})" if knn is not None else ""
        run.print(f"before training: {text}{bank}")


def print_config(args, run, model, splits, knn_splits, sampler):
    num_params = sum(p.numel() for p in model.parameters())
    peak_lr = scaled_lr(args.lr, args.batch_size)
    lines = dict(
        model=f"{args.arch}, {num_params:,} parameters with both encoders and predictor",
        data=f"{args.data}: {splits}",
        batch=sampler,
        lr=f"{args.lr:g} · {args.batch_size}/256 = {peak_lr:g}, {args.optimizer}",
    )
    if args.knn_data:
        lines["knn"] = f"{args.knn_data}: {knn_splits.labelled_str()}"
    if args.in_chans != 3:
        lines["views"] = "without saturation, hue and grayscale, which need RGB"
    run.print_config(**lines)


def plot_first_views(run, crops, num_images=10):
    """The first images, as the first epoch shows them, into views.png."""
    if not launch.is_main():
        return
    keys = [(0, index) for index in range(min(num_images, len(crops)))]
    images, params = next(unpack_batches([crops.__getitems__(keys)], run.unreadable))
    pixel_format = crops.dataset.pixel_format
    x1, x2 = make_views(run.env.to_device(images), params, pixel_format)
    plots.plot_views(run.folder, x1, x2, pixel_format)


def check_schedule(args, steps_per_epoch):
    if args.epochs * steps_per_epoch == 1 and args.warmup_epochs > 0:
        raise UserError("the only step would be at learning rate 0: --warmup-epochs 0")


def is_due(epoch, every):
    return every > 0 and epoch % every == 0


if __name__ == "__main__":
    cli.run_script(main, parse_args)
