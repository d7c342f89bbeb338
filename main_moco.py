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
import contextlib
import math

import torch

from engine import cli, flags, launch, plots, weights
from engine.backbones import check_bf16_conv_gradients, choose_config, create_backbone
from engine.compiler import should_compile
from engine.data.crops import TwoCrops
from engine.data.images import evenly_spaced
from engine.data.loader import create_loader, unpack_batches
from engine.data.sampler import EpochBatchSampler
from engine.data.splits import describe, load_knn_splits, load_splits
from engine.errors import UserError
from engine.evaluation import FeatureMonitor
from engine.flops import peak_images_per_s
from engine.run import Run, find_checkpoints, run_metadata
from moco import (
    MoCo,
    augment,
    augment_compiled,
    cosine_momentum,
    create_optimizer,
    optimizer_step,
    scaled_lr,
    set_lr,
    warmup_cosine_lr,
)
from moco.compilation import is_compiled
from moco.gradients import GradientMonitor
from vits import POOLING, VITS


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, usage=flags.USAGE)
    flags.add_image_flags(parser)

    add = flags.add_model_flags(parser)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add("--stop-grad-conv1", "keep a ViT's patch projection at its random values", **switch)
    poses, pools = ("sincos", "learned", "none"), tuple(POOLING)
    add("--pos-embed", "position embedding of a ViT", choices=poses, default="sincos")
    pool = "a ViT's features: class token, or average of a ViT without one, after LayerNorm or not"
    add("--pool", pool, choices=pools, default="token")
    add("--moco-dim", "width of q and k", type=flags.width, default=256)
    heads = "hidden width of projector and predictor"
    add("--moco-mlp-dim", heads, type=flags.width, default=4096)
    add("--no-head-bn", "projector and predictor without BatchNorm", action="store_true")
    add("--no-predictor", "no predictor after the projector", action="store_true")
    init = "weights to start from, of ours or of other projects"
    add("--init-from", init, metavar="CKPT", may_change=True)

    add = flags.add_optimization_flags(parser, epochs=100, batch_size=4096)
    optimizer = "LARS for ResNets, AdamW for ViTs, SGD for small ResNets"
    add("--optimizer", optimizer, choices=("lars", "adamw", "sgd"), default="lars")
    number = flags.non_negative_float
    add(
        "--lr",
        "base learning rate, scaled by batch/256; the paper's ViTs: 1.5e-4",
        type=number,
        default=0.6,
    )
    add("--wd --weight-decay", "weight decay; the paper's ViTs: 0.1", type=number, default=1e-6)
    add("--warmup-epochs", "epochs of linear warm-up from 0", type=number, default=10)
    add("--clip-grad", "largest gradient norm (default: no limit)", type=flags.positive_float)
    m = "momentum coefficient of the momentum encoder"
    add("--moco-m", m, type=flags.fraction, default=0.99)
    add("--moco-m-cos", "raise m from --moco-m to 1 by half a cosine", **switch)
    temperature = "temperature of the contrastive loss; the paper's ViTs: 0.2"
    add("--moco-t", temperature, type=flags.positive_float, default=1.0)

    flags.add_augmentation_flags(parser)

    add = parser.group("evaluation", may_change=True)
    count = flags.non_negative_int
    add("--knn-every", "measure kNN and RankMe every N epochs; 0: never", type=count, default=10)
    add("--knn-data", "labelled set to measure kNN on, in place of DIR", metavar="DIR")
    bank = "training images that kNN searches"
    add("--knn-bank", bank, type=flags.positive_int, default=50_000)

    add = flags.add_run_flags(parser)
    save = "keep the checkpoint of every so many epochs; 0: only the last ones"
    add("--save-every", save, type=count, default=0)

    add = flags.add_hardware_flags(parser)
    chunk = "images of a view per pass of the backbone: less memory, same gradient; 0: all"
    add("--encode-chunk", chunk, type=count, default=0)
    flags.add_compile_flag(add)
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What argparse can't check."""
    if args.epochs == 0:
        parser.error("--epochs 0 trains nothing (kNN alone: main_lincls.py --knn --epochs 0)")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    if args.knn_every == 0 and args.knn_data:
        parser.error("--knn-data is for kNN, which --knn-every 0 turns off")
    if args.init_from and args.resume not in (None, "auto"):
        parser.error("--init-from starts a run, --resume PATH continues one: give one of them")


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    folder = flags.output_folder(args.output_dir, args.arch, args.data, args.knn_data)
    checkpoint_paths = find_checkpoints(folder, args.resume)

    config = choose_config(flags.backbone_options(args))
    model = create_model(args, config, env)  # before DIR is listed, which may take long
    source = flags.source(args, args.data, config.pixel_format)
    train = source.train()
    knn_splits, why_no_knn = choose_knn_splits(args, source, config.pixel_format)
    policy = flags.augmentation_policy(args)
    crop_dataset = TwoCrops(train.dataset, config.img_size, args.crop_min, args.seed, policy)
    sampler = EpochBatchSampler(len(crop_dataset), args.batch_size, args.seed)
    check_schedule(args, steps_per_epoch=len(sampler))
    loader = create_loader(crop_dataset, sampler, args.workers, env.device, persistent=True)

    optimizer = create_optimizer(args.optimizer, model, args.lr, args.wd)
    scaler = env.grad_scaler()
    metadata = run_metadata(config, vars(args), env, train.dataset, train.class_names)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    # Of each view, the encoders' forward passes and the backward pass of one of them.
    peak_rate = peak_images_per_s(model.base_encoder, config, env, passes=2 * (1 + 2 + 1))
    options = flags.run_options(args) | dict(peak_images_per_s=peak_rate)
    run = Run(folder, env, loader, metadata, state, resume_from=checkpoint_paths, **options)
    if args.init_from and not run.resuming:
        initialize(args, model, config.pixel_format)
    run.resume()
    ddp_model = env.wrap_ddp(model)
    monitor = FeatureMonitor(
        train.dataset, knn_splits, config.img_size, args.knn_bank, args.workers, env
    )

    with run:
        print_config(args, run, model, source, train, knn_splits, why_no_knn)
        launch.on_rank0(lambda: plot_first_views(run, crop_dataset))
        if args.knn_every > 0 and run.step == 0:
            evaluate(run, monitor, model)
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(args, run, ddp_model, model, loader, optimizer, scaler)
            is_last = epoch == args.epochs
            eval_due = args.knn_every > 0 and (is_last or is_due(epoch, args.knn_every))
            if eval_due:
                evaluate(run, monitor, model)
            keep_as = f"checkpoint_{epoch:04}.pth" if is_due(epoch, args.save_every) else None
            run.end_epoch(keep_as, evaluated=eval_due)


def train_one_epoch(args, run, ddp_model, model, loader, optimizer, scaler):
    """The steps that are left of an epoch.

    ddp_model averages the gradients over the ranks; the momentum update acts on `model` in it.
    """
    env, pixel_format = run.env, loader.dataset.dataset.pixel_format
    chance = 4 * args.moco_t * math.log(args.batch_size)  # two terms of 2τ · ln N
    peak_lr = scaled_lr(args.lr, args.batch_size)
    grad_monitor = GradientMonitor(model.base_encoder)
    compile = is_compiled(model)
    ddp_model.train()
    for crops, params in run.batches(loader):  # uint8 [2, N, C, H, W], float32 [2, N, 10]
        t = run.step / len(loader)  # in epochs
        lr = warmup_cosine_lr(t, args.epochs, args.warmup_epochs, peak_lr)
        m = cosine_momentum(t, args.epochs, args.moco_m) if args.moco_m_cos else args.moco_m
        set_lr(optimizer, lr)

        dtype = env.amp_dtype or torch.float32
        crops = env.to_device(crops)
        x1, x2 = make_views(crops, params, pixel_format, dtype, args.encode_chunk, compile)
        with env.autocast():
            loss, metrics = ddp_model(x1, x2)
        grads = optimizer_step(loss, optimizer, scaler, args.clip_grad, grad_monitor)
        model.update_momentum_encoder(m)

        # Saves when it is time to; raises Interrupted after a signal.
        run.end_step(loss=loss, **metrics, **grads, chance=chance, lr=lr, m=m)


def make_views(crops, params, pixel_format, dtype=torch.float32, chunk=0, compile=False):
    """crops: uint8 [2, N, C, H, W] on the device; params: float32 [2, N, 10] on the CPU → x1, x2.

    dtype: of the views; that of autocast loses nothing, for the first layer rounds to it anyway.
    chunk: augment so many images at a time, so that a large batch is in float32 nowhere; 0: all.
    """
    images, params = crops.flatten(0, 1), params.flatten(0, 1)
    views = torch.empty(images.shape, dtype=dtype, device=images.device)  # contiguous
    size = chunk or len(images)
    augment_chunk = augment_compiled if compile else augment
    for x, crop, param in zip(views.split(size), images.split(size), params.split(size)):
        x.copy_(augment_chunk(crop, param, pixel_format.mean, pixel_format.std))
    return views.chunk(2)


def create_model(args, config, env):
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    backbone = create_backbone(config, stop_grad_conv1=args.stop_grad_conv1)
    check_bf16_conv_gradients(backbone, config, env)
    model = MoCo(
        env.sync_batchnorm(backbone),
        dim=args.moco_dim,
        mlp_dim=args.moco_mlp_dim,
        T=args.moco_t,
        encode_chunk=args.encode_chunk,
        compile=should_compile(args.compile, backbone, env.device),
        head_bn=not args.no_head_bn,
        use_predictor=not args.no_predictor,
    )
    return model.to(env.device)


def initialize(args, model, pixel_format):
    """Starts the encoders, and where they fit the heads, from --init-from."""
    options = flags.backbone_options(args)
    message = weights.initialize_moco(model, args.init_from, options, pixel_format)
    if message:
        launch.print_rank0(f"init    {message}")


def choose_knn_splits(args, source, pixel_format):
    """What kNN is measured on, --knn-data's images or DIR's → Splits or None, why there are none.

    UserError for labels that can't be used.
    """
    if args.knn_every == 0:
        return None, ""
    if args.knn_data:
        knn_source = flags.source(args, args.knn_data, pixel_format)
        return load_splits(knn_source, val_hint="; --knn-data needs train and val"), ""
    try:
        return load_knn_splits(source)
    except UserError as error:
        raise UserError(f"{error}; --knn-every 0 pre-trains without labels") from None


def evaluate(run, monitor, model):
    """Logs kNN, where there are labels, and RankMe."""
    values = monitor(model.base_encoder, run.unreadable)
    text = f"RankMe {values['rankme']:.1f}"
    if "knn" in values:  # log.jsonl has both
        text = f"kNN {values['knn']:.1f} %"
    knn = monitor.knn
    run.log_eval(text, knn.splits.val if knn is not None else None, **values)
    if run.step == 0:
        bank = f" (k {knn.k}, bank {len(knn.bank_indices):,})" if knn is not None else ""
        run.print(f"before training: {text}{bank}")


def print_config(args, run, model, source, train, knn_splits, why_no_knn):
    num_params = sum(p.numel() for p in model.parameters())
    arch = f"{args.arch}, compiled" if is_compiled(model) else args.arch
    val, remarks = None, (*source.remarks, *train.remarks)
    if knn_splits is not None and not args.knn_data:
        val, remarks = knn_splits.val, knn_splits.remarks
    if why_no_knn:
        remarks = (f"kNN is off: {why_no_knn}", *remarks)
    peak_lr = scaled_lr(args.lr, args.batch_size)
    lines = dict(
        model=f"{arch}, {num_params:,} parameters with both encoders and predictor",
        data=f"{args.data}: {describe(train.dataset, val, train.class_names, remarks)}",
        batch=run.loader.batch_sampler,
        lr=f"{args.lr:g} · {args.batch_size}/256 = {peak_lr:g}, {args.optimizer}",
    )
    if args.knn_data:
        lines["knn"] = f"{args.knn_data}: {knn_splits}"
    if args.in_chans != 3:
        lines["views"] = "without saturation, hue and grayscale, which need RGB"
    run.print_config(**lines)
    if args.arch in VITS and args.optimizer == "lars":
        run.print(
            "warning: the paper trains ViTs by other flags than the default ones, which are for "
            "ResNets: @recipes/vit_small_300.txt has them"
        )


def plot_first_views(run, crop_dataset, num_images=10):
    """Images from the whole set, as the first epoch shows them, into views.png."""
    keys = [(0, int(index)) for index in evenly_spaced(len(crop_dataset), num_images)]
    batches = [crop_dataset.__getitems__(keys)]
    crops, params = next(unpack_batches(batches, run.unreadable, crop_dataset))
    pixel_format = crop_dataset.dataset.pixel_format
    if pixel_format.value_range is not None:
        warn_of_value_range(run, crops, pixel_format.value_range)
    x1, x2 = make_views(run.env.to_device(crops), params, pixel_format)
    with contextlib.suppress(OSError):  # a full disk is reported when the run is saved
        plots.plot_views(run.folder, x1, x2, pixel_format)


def warn_of_value_range(run, crops, value_range):
    """Where most pixels of uint8 `crops` are clipped, or all are alike: it is not the files'."""
    low, high = ((crops == end).float().mean().item() for end in (0, 255))
    extent = (crops.max().item() - crops.min().item()) / 255
    flag = "--value-range {:g} {:g}".format(*value_range)
    if low > 0.9 or high > 0.5:  # the background of sound images may well be 0
        run.print(f"warning: {100 * (low + high):.0f} % of the pixels lie at an end of {flag}")
    elif extent < 0.1:
        run.print(f"warning: the pixels take {100 * extent:.0f} % of {flag}")


def check_schedule(args, steps_per_epoch):
    if args.epochs * steps_per_epoch == 1 and args.warmup_epochs > 0:
        raise UserError("the only step would be at learning rate 0: --warmup-epochs 0")


def is_due(epoch, every):
    return every > 0 and epoch % every == 0


if __name__ == "__main__":
    cli.run_script(main, parse_args)
