"""End-to-end fine-tuning of a pre-trained backbone, by DeiT's recipe and timm's parts.

One process (GPU or CPU), after `python main_moco.py @recipes/digits.txt`:
    python main_finetune.py @recipes/finetune_digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_vit_base_150_deit.txt \\
        /data/imagenet --pretrained runs/vit_base_300/checkpoint.pth
Transfer; then the accuracy of what it left:
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_vit_base_cifar10.txt \\
        --pretrained runs/vit_base_300/checkpoint.pth --output-dir runs/vit_base_300_cifar10
    python main_finetune.py cifar10 --pretrained runs/vit_base_300_cifar10/best.pth --evaluate
"""

import random
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from engine import cli, evaluation, launch, weights
from engine.backbones import Classifier, check_bf16_conv_gradients
from engine.datasets import relabel, require_labels
from engine.decode import RGB
from engine.errors import UserError
from engine.evaluation import AccuracyRecord, format_accuracy
from engine.loader import BatchDataset, EpochBatchSampler, UnreadableImages, create_loader
from engine.run import Run
from moco import optimizer_step, scaled_lr
from moco.distributed import rank, world_size

INTERPOLATION = "bicubic"  # of the crops and of the images that are measured

MAX_INITIAL_WEIGHT = 0.1  # largest fraction of the final average that may be initial weights


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags(), cli.downstream_flags()])
    parser.set_defaults(arch=None, img_size=None, in_chans=None, batch_size=1024)
    add = parser.add_argument
    number, below_1 = cli.non_negative_float, cli.fraction_below_1
    lr = "base lr of AdamW, scaled by batch/256 (DeiT's 5e-4 · batch/512)"
    add("--lr", type=cli.positive_float, default=2.5e-4, help=lr)
    wd = "weight decay; none on norms, biases, class token and position embedding"
    add("--wd", "--weight-decay", type=number, default=0.05, help=wd)
    add("--warmup-epochs", type=cli.non_negative_int, default=5, help="linear, from --warmup-lr")
    add("--warmup-lr", type=number, default=1e-6, help="lr at the start, unscaled")
    add("--min-lr", type=number, default=1e-5, help="lr at the end, unscaled")
    add("--lr-per", choices=("iteration", "epoch"), default="epoch", help="how often lr changes")
    decay = "layer-wise lr decay: factor from each block to the one before"
    add("--layer-decay", type=cli.fraction, metavar="FACTOR", help=decay)
    add("--clip-grad", type=cli.positive_float, metavar="NORM", help="largest gradient norm")
    drop_path = "stochastic depth: rate of the last block, rising linearly from 0"
    add("--drop-path", type=below_1, default=0.1, help=drop_path)
    add("--crop-min", type=cli.fraction, default=0.08, help="smallest crop, fraction of the area")
    aa = "timm's name of the augmentation policy, or none"
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help=aa)
    add("--reprob", type=cli.fraction, default=0.25, help="probability of random erasing")
    add("--mixup", type=number, default=0.8, help="mixup alpha; 0: off")
    add("--cutmix", type=number, default=1.0, help="cutmix alpha; 0: off")
    add("--smoothing", type=below_1, default=0.1, help="label smoothing")
    views = "views of an image per epoch (3 in DeiT), of 1/VIEWS of the images"
    add("--repeated-aug", type=cli.positive_int, default=1, metavar="VIEWS", help=views)
    add("--ema", type=below_1, metavar="DECAY", help="keep a moving average of the weights")
    add("--evaluate-ema", action="store_true", help="measure the average instead of the weights")
    args = cli.check_downstream(parser, parser.parse_args(argv))
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What argparse can't check."""
    peak_lr = scaled_lr(args.lr, args.batch_size)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.lr_per == "epoch" and 0 < args.epochs == args.warmup_epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} leaves no epoch at the full --lr")
    for flag, lr in (("--min-lr", args.min_lr), ("--warmup-lr", args.warmup_lr)):
        if lr > peak_lr:
            parser.error(
                f"{flag} {lr:g} is above the peak lr, --lr {args.lr:g} · {args.batch_size}/256 = "
                f"{peak_lr:g}: lower it"
            )
    if args.evaluate_ema and not (args.ema or args.evaluate):
        parser.error("--evaluate-ema needs --ema DECAY")
    if args.ema == 0:
        parser.error("--ema 0 would average nothing: drop it")
    parts = args.aa.split("-")[1:]  # timm skips those that it doesn't know
    unknown = [part for part in parts if not re.fullmatch(r"[a-z]+\d+(\.\d+)?", part)]
    if unknown:
        parser.error(f"--aa {args.aa}: {unknown[0]!r} is not a letter and a number, as in m9")
    if args.layer_decay == 0:
        parser.error("--layer-decay 0 would train the classifier alone: so does main_lincls.py")
    if args.repeated_aug > args.batch_size:
        parser.error(
            f"--repeated-aug {args.repeated_aug} is more than --batch-size {args.batch_size}"
        )
    if not (args.epochs or args.evaluate):
        parser.error("--epochs 0 leaves nothing to do: add --evaluate")


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    if args.evaluate:
        evaluate_saved(args, env)
    else:
        finetune(args, env)


def evaluate_saved(args, env):
    """Prints the accuracy of the classifier in --pretrained."""
    weights_key = "ema" if args.evaluate_ema else None
    model, config, class_names = weights.create_classifier(args, weights_key, INTERPOLATION)
    splits = cli.load_splits_from_args(args, config.pixel_format)
    require_labels(splits, args.data, train=False)
    splits, message = relabel(splits, class_names, args.pretrained)
    if message:
        launch.print_rank0(message)
    classifier = model.get_submodule(model.classifier_name)
    weights.check_num_classes(classifier, splits.num_classes, args.pretrained)
    unreadable = UnreadableImages(args.max_bad_images, len(splits.val))
    acc1, acc5 = evaluate(args, model.to(env.device), splits, config, env, unreadable)
    text = format_accuracy(acc1, acc5, splits.num_classes)
    launch.print_rank0(f"{text} on {len(splits.val):,} images")


def finetune(args, env):
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model, config = weights.create_pretrained_backbone(args, args.drop_path)
    config = replace(config, interpolation=INTERPOLATION)
    run = Run(args, env, cli.downstream_folder(args, config.arch, "finetune"))
    splits = cli.load_splits_from_args(args, config.pixel_format)
    require_labels(splits, args.data)
    model = add_classifier(model, splits.num_classes, config, env)

    loader = create_training_loader(args, splits.train_labelled, config, env)
    mixup = create_mixup(args, splits.num_classes)

    optimizer = create_adamw(args, model, config.arch)
    schedule = create_schedule(args, optimizer, steps_per_epoch=len(loader))
    ema = create_ema(args, model, num_steps=args.epochs * len(loader))
    scaler, results = env.grad_scaler(), AccuracyRecord(1)
    run.restore(
        loader,
        config,
        splits,
        same_world_size=mixup is not None or args.drop_path > 0,  # they draw in each process
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        ema=ema,
        results=results,
    )
    run.metadata["best_acc1"] = results.best[0][0]
    ddp_model = env.wrap_ddp(model)
    print_config(args, run, splits, config, loader.batch_sampler)

    with run:
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(ddp_model, model, ema, loader, mixup, optimizer, schedule, scaler, run)
            eval_model = ema.module if args.evaluate_ema else model
            acc1, acc5 = evaluate(args, eval_model, splits, config, env, run.unreadable)
            [is_best] = results.update([(acc1, acc5)], epoch)
            run.metadata["best_acc1"] = results.best[0][0]
            run.log_eval(f"top-1 {acc1:.2f} %", acc1=acc1, acc5=acc5)
            run.end_epoch(keep_as="best.pth" if is_best else None)
        (best_acc1, best_epoch), last = results.best[0], results.last[0]
        run.print(
            f"tuned   {format_accuracy(*last, splits.num_classes)} after {args.epochs} epochs; "
            f"best {best_acc1:.2f} % in epoch {best_epoch}"
        )


def train_one_epoch(ddp_model, model, ema, loader, mixup, optimizer, schedule, scaler, run):
    """The steps that are left of an epoch; `model` is inside ddp_model, and `ema` averages it."""
    args, env = run.args, run.env
    ddp_model.train()
    for images, labels in run.batches(loader):  # float32 [N, C, H, W], [N]
        # Mixup and drop path draw from the global generators: seeded by the step, a resumed run
        # repeats them exactly.
        seed_generators(args.seed, run.step, rank())
        if args.lr_per == "iteration":
            schedule.step_update(run.step)
        else:
            schedule.step(run.epoch)

        images, labels = env.to_device(images, labels)
        if mixup is not None:
            images, labels = mixup(images, labels)  # labels: [N, num_classes], smoothed
        with env.autocast():
            logits = ddp_model(images)  # [N, num_classes]
        smoothing = args.smoothing if mixup is None else 0.0
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        optimizer_step(loss, optimizer, scaler, args.clip_grad)
        if ema is not None:
            ema.update(model)
        # The last group is the classifier's, whose lr --layer-decay leaves as it is.
        run.end_step(loss=loss, lr=optimizer.param_groups[-1]["lr"])


def print_config(args, run, splits, config, sampler):
    peak_lr = scaled_lr(args.lr, args.batch_size)
    run.print_config(
        model=f"{config.arch}, {cli.weights_origin(args)}",
        data=f"{args.data}: {splits.labelled_str()}",
        batch=sampler,
        lr=f"{args.lr:g} · {args.batch_size}/256 = {peak_lr:g}, adamw",
    )


def create_training_loader(args, dataset, config, env):
    transform = create_transform_from_args(args, config.img_size, config.pixel_format)
    crops = AugmentedCrops(dataset, transform, args.seed)
    repeats = args.repeated_aug
    sampler = EpochBatchSampler(len(dataset), args.batch_size, args.seed, repeats)
    return create_loader(crops, sampler, args.workers, env.device, persistent=True)


def add_classifier(model, num_classes, config, env):
    """A new classifier on the backbone, all of which trains, patch projection and position too."""
    check_bf16_conv_gradients(model, config, env)
    model.requires_grad_(True)
    classifier = Classifier(model.num_features, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    model.set_submodule(model.classifier_name, classifier)
    return env.sync_batchnorm(model).to(env.device)


def create_adamw(args, model, arch):
    """timm leaves norms, biases, class token and position embedding without weight decay."""
    if args.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError(f"--layer-decay is for ViTs and timm's models, not {arch}: drop it")
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=scaled_lr(args.lr, args.batch_size),
        weight_decay=args.wd,
        layer_decay=args.layer_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def create_schedule(args, optimizer, steps_per_epoch):
    """Linear warm-up, then half a cosine.

    Per iteration (MMPretrain) the cosine starts after the warm-up and spans the epochs that are
    left. Per epoch (DeiT) it spans all epochs, and the warm-up replaces its first part.
    """
    per_iteration = args.lr_per == "iteration"
    decay_epochs = args.epochs - args.warmup_epochs if per_iteration else args.epochs
    updates_per_epoch = steps_per_epoch if per_iteration else 1
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, decay_epochs) * updates_per_epoch,
        lr_min=args.min_lr,
        warmup_t=args.warmup_epochs * updates_per_epoch,
        warmup_lr_init=args.warmup_lr,
        warmup_prefix=per_iteration,
        t_in_epochs=not per_iteration,
    )


def create_ema(args, model, num_steps):
    """The moving average of the weights, or None. UserError if it would hardly leave its start."""
    if args.ema is None:
        return None
    initial_weight = args.ema**num_steps
    if initial_weight > MAX_INITIAL_WEIGHT:
        raise UserError(
            f"--ema {args.ema:g} after {num_steps} steps would still be {100 * initial_weight:.0f} "
            "% initial weights: lower it"
        )
    return ModelEmaV3(model, decay=args.ema)


def create_transform_from_args(args, size, pixel_format=RGB):
    """timm's training transform: uint8 [C, H, W] → float32 [C, *size], normalized."""
    if pixel_format.in_chans not in (1, 3):
        return create_transform_without_policy(args, size, pixel_format)
    patch_posterize()
    # timm's transforms are for RGB: gray is expanded to three equal channels and reduced again.
    repeats = 3 // pixel_format.in_chans
    try:
        transform = create_transform(
            (3, *size),
            is_training=True,
            scale=(args.crop_min, 1.0),
            color_jitter=0.0,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=INTERPOLATION,
            mean=pixel_format.mean * repeats,
            std=pixel_format.std * repeats,
            re_prob=args.reprob,
            re_mode="pixel",
        )
        with seeded(0):  # some policies fail only when they see an image
            transform(Image.new("RGB", (8, 8)))
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"timm knows no augmentation policy --aa {args.aa}; none: off") from None
    return partial(apply_pil_transform, transform)


def apply_pil_transform(transform, image):
    """image: uint8 [C, H, W] with C 1 or 3 → float32 [C, H, W]."""
    num_channels = len(image)
    return transform(tv.to_pil_image(image.expand(3, -1, -1)))[:num_channels]


def create_transform_without_policy(args, size, pixel_format):
    """The same for numbers of channels that PIL can't hold."""
    if args.aa != "none":
        raise UserError(
            f"--aa {args.aa} is for RGB and gray, the images have {pixel_format.in_chans} "
            "channels: --aa none"
        )
    interpolation = v2.InterpolationMode(INTERPOLATION)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (args.crop_min, 1.0), interpolation=interpolation),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pixel_format.mean, pixel_format.std),
            RandomErasing(args.reprob, mode="pixel", device="cpu"),
        ]
    )


def create_mixup(args, num_classes):
    if not args.mixup and not args.cutmix:
        return None
    if args.batch_size // world_size() % 2:
        raise UserError("--mixup and --cutmix need an even number of images in each process")
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


def patch_posterize():
    """Replaces timm's posterize: its strongest level keeps no bits, which Pillow 13 refuses."""
    NAME_TO_OP["PosterizeIncreasing"] = NAME_TO_OP["Posterize"] = posterize


def posterize(image, bits, **_):
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class AugmentedCrops(BatchDataset):
    """Keys (epoch, index) → float32 [N, C, H, W], labels [N]; transform: of one image."""

    def __init__(self, dataset, transform, seed):
        super().__init__(dataset, seed)
        self.transform = transform

    def make_batch(self, keys, unreadable):
        crops, indices = [], []
        for epoch, index in keys:
            image, read_index = self.read(epoch, index, unreadable)
            with seeded(self.seed, epoch, index):
                crops.append(self.transform(image))
            indices.append(read_index)  # the label is that of the image that is shown
        return torch.stack(crops), self.dataset.labels[indices]


@contextmanager
def seeded(*key):
    """The CPU's generators, which timm draws from, are seeded by `key`, and restored afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_generators(*key, include_gpu=False)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_generators(*key, include_gpu=True):
    """Seeds every global generator by `key`; a GPU's, too, for drop path draws there."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if include_gpu:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def evaluate(args, model, splits, config, env, unreadable):
    """(acc1, acc5) on the validation images, in percent."""
    model.eval()

    def classify(images):
        with env.autocast():
            return [model(images)]

    [accuracy] = evaluation.accuracy(classify, 1, splits.val, config, args.workers, env, unreadable)
    return accuracy


if __name__ == "__main__":
    cli.run_script(main, parse_args)
