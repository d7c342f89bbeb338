"""MoCo v3 linear probe: kNN and linear classifiers on frozen features (paper Sec. 5).

One process (GPU or CPU), after `python main_moco.py @recipes/digits.txt`:
    python main_lincls.py @recipes/lincls_digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_lincls.py @recipes/lincls_vit_small.txt /data/imagenet \\
        --pretrained runs/vit_small_300/checkpoint.pth
kNN, then five learning rates in one pass; then the accuracy of a saved classifier:
    python main_lincls.py /data/imagenet --pretrained CKPT --knn --lr .1 .3 1 3 10
    python main_lincls.py /data/imagenet --pretrained runs/RUN_lincls/linear_lr3.pth --evaluate
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from engine import cli, downstream, evaluation, flags, launch, weights
from engine.compiler import should_compile
from engine.data.crops import LabelledCrops
from engine.data.loader import create_loader
from engine.data.sampler import EpochBatchSampler
from engine.data.splits import load_splits
from engine.data.unreadable import UnreadableImages
from engine.evaluation import KNN, AccuracyRecord, format_accuracy
from engine.flops import peak_images_per_s
from engine.run import Run, find_checkpoints, run_metadata
from moco import optimizer_step, scaled_lr, warmup_cosine_lr
from moco.augmentation import normalize
from moco.batchnorm import ViewBatchNorm, at_least_fp32
from moco.compilation import compile_backbone
from moco.distributed import all_gather


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, usage=flags.USAGE)
    flags.add_image_flags(parser, in_chans=None)
    add = flags.add_model_flags(parser, arch=None, img_size=None)
    downstream.add_flags(add)
    batchnorm = "normalize the features before the classifiers, as MAE's probe does"
    add("--batchnorm", batchnorm, action="store_true")

    add = flags.add_optimization_flags(parser, epochs=90, batch_size=1024)
    lr = "base learning rates, scaled by batch/256; a classifier for each (default: 0.1)"
    add("--lr", lr, type=flags.positive_float, nargs="+", default=[0.1])

    add = flags.add_evaluation_flags(parser)
    add("--knn", "measure kNN accuracy, before the probe", action="store_true")
    bank = "training images that kNN searches (default: all)"
    add("--knn-bank", bank, type=flags.positive_int)
    flags.add_run_flags(parser)
    flags.add_compile_flag(flags.add_hardware_flags(parser))
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What argparse can't check."""
    flags.check_downstream(parser, args)
    if len({f"{lr:g}" for lr in args.lr}) < len(args.lr):  # as files and log.jsonl name them
        parser.error("--lr names a rate twice, in 6 digits")
    if args.knn_bank and not args.knn:
        parser.error("--knn-bank needs --knn")
    if args.epochs == 0 and not (args.knn or args.evaluate):
        parser.error("--epochs 0 trains nothing: add --knn or --evaluate")
    if args.epochs == 0 and (args.resume or args.output_dir):
        parser.error("--epochs 0 has no run: drop --resume and --output-dir")


class LinearClassifiers(nn.Module):
    """A linear classifier for each learning rate, on the same features: [N, d] → [N, classes] each.

    batchnorm: features are normalized first, without affine, as in MAE's probe (arXiv 2111.06377,
    A.1).
    """

    def __init__(self, linears, batchnorm=None):
        super().__init__()
        self.linears, self.batchnorm = nn.ModuleList(linears), batchnorm

    def forward(self, h):
        if self.batchnorm is not None:
            h = self.batchnorm(h)
        return [linear(h) for linear in self.linears]

    @torch.no_grad()
    def export(self):
        """Copies of the classifiers, the BatchNorm folded into weight and bias."""
        linears = copy.deepcopy(list(self.linears))
        if self.batchnorm is not None:
            mean, var = self.batchnorm.running_mean, self.batchnorm.running_var
            for linear in linears:
                linear.weight /= (var + self.batchnorm.eps).sqrt()
                linear.bias -= linear.weight @ mean
        return linears


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    torch.manual_seed(args.seed)
    if args.evaluate:
        evaluate_saved(args, env)
        return
    folder, checkpoint_paths = None, []
    if args.epochs > 0:
        folder = downstream.output_folder(args, "lincls")
        checkpoint_paths = find_checkpoints(folder, args.resume)
    options = flags.backbone_options(args)
    backbone, config = weights.create_pretrained_backbone(
        args.pretrained, options, args.from_scratch
    )
    splits = downstream.load_training_splits(args, config.pixel_format)
    freeze(backbone).to(env.device)
    if args.epochs > 0:  # before kNN, for it refuses a batch size
        sampler = EpochBatchSampler(len(splits.train), args.batch_size, args.seed)
    else:  # a run prints them itself
        model = f"{config.arch}, frozen"
        for name, text in downstream.config_lines(args, model, backbone, splits).items():
            launch.print_rank0(f"{name:<7} {text}")
    if args.knn:
        print_knn(args, splits, backbone, config, env)
    if args.epochs > 0:
        if should_compile(args.compile, backbone, env.device):
            compile_backbone(backbone)
        train(args, env, splits, sampler, backbone, config, folder, checkpoint_paths)


def freeze(backbone):
    """No gradients, and BatchNorm keeps its statistics."""
    return backbone.requires_grad_(False).eval()


def print_knn(args, splits, backbone, config, env):
    knn = KNN(splits, config.img_size, args.knn_bank, args.workers, env)
    k_values = sorted({k for k in (10, 20, 100, 200) if k <= len(knn.bank_indices)} | {knn.k})
    unreadable = UnreadableImages(args.max_bad_images)
    for k, accuracy in zip(k_values, knn(backbone, unreadable, k_values)):
        remark = f", on {len(splits.val):,} images{unreadable.remark(splits.val)}"
        logged = " (that of the pre-training log)" if k == knn.k else ""
        launch.print_rank0(
            f"kNN     {accuracy:.2f} % with k {k}{logged}, bank {knn.num_read:,}{remark}"
        )


def evaluate_saved(args, env):
    """Prints the accuracy of the classifier in --pretrained, and with --knn that of kNN."""
    options = flags.backbone_options(args)
    backbone, config, class_names = weights.create_classifier(args.pretrained, options)
    classifier = weights.detach_classifier(backbone).to(env.device)
    freeze(backbone).to(env.device)
    if args.knn:
        source = flags.source(args, args.data, config.pixel_format)
        print_knn(args, load_splits(source), backbone, config, env)
    splits = downstream.load_test_splits(args, config, class_names, classifier)
    classify = classify_features(backbone, LinearClassifiers([classifier]), env)
    downstream.print_accuracy(args, classify, splits, config, env)


def train(args, env, splits, sampler, backbone, config, folder, checkpoint_paths):
    """Trains the classifiers, prints their table, writes each in the published layout."""
    crop_dataset = LabelledCrops(splits.train, config.img_size, args.crop_min, args.seed)
    loader = create_loader(crop_dataset, sampler, args.workers, env.device, persistent=True)

    classifiers = create_classifiers(args, backbone.num_features, splits.num_classes)
    classifiers.to(env.device)
    optimizer, results = create_sgd(classifiers), AccuracyRecord(len(args.lr))
    metadata = run_metadata(
        config, vars(args), env, splits.train, splits.class_names, splits.val, frozen=backbone
    )
    state = dict(model=classifiers, optimizer=optimizer, results=results)
    can_diverge = dict(allow_divergence=len(args.lr) > 1)  # one of several classifiers may fail
    peak_rate = peak_images_per_s(backbone, config, env, passes=1)
    options = flags.run_options(args) | can_diverge | dict(peak_images_per_s=peak_rate)
    run = Run(folder, env, loader, metadata, state, resume_from=checkpoint_paths, **options)
    run.resume()
    ddp_classifiers = env.wrap_ddp(classifiers)
    classify = classify_features(backbone, classifiers, env)

    with run:
        lrs = ", ".join(f"{lr:g}" for lr in args.lr) + f" · {args.batch_size}/256"
        downstream.print_config(args, run, f"{config.arch}, frozen", backbone, splits, lrs)
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(args, run, ddp_classifiers, backbone, loader, optimizer)
            settings = config.img_size, args.workers, env, run.unreadable, config.interpolation
            accuracies = evaluation.measure_accuracy(classify, len(args.lr), splits.val, *settings)
            results.update(accuracies, epoch)
            log_accuracies(args, run, splits.val, accuracies)
            run.end_epoch()
        print_results(args, splits, classifiers, results, run)
        for lr, linear, (acc1, _) in zip(args.lr, classifiers.export(), results.best):
            backbone.set_submodule(backbone.classifier_name, linear)
            run.save_model(f"linear_lr{lr:g}.pth", backbone, best_acc1=acc1)


def train_one_epoch(args, run, ddp_classifiers, backbone, loader, optimizer):
    """The steps that are left of an epoch: one forward pass of the backbone for all classifiers."""
    env, pixel_format = run.env, loader.dataset.dataset.pixel_format
    lrs = epoch_lrs(args, run.epoch)
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
    logged_lrs = {f"lr/{base_lr:g}": lr for base_lr, lr in zip(args.lr, lrs)}
    ddp_classifiers.train()
    for crops, labels in run.batches(loader):  # uint8 [N, C, H, W], [N]
        crops, labels = env.to_device(crops, labels)
        images = normalize(crops.float() / 255, pixel_format.mean, pixel_format.std)
        with torch.no_grad(), env.autocast():
            h = backbone(images)  # [N, d]
        losses = classifier_losses(ddp_classifiers, h, labels)
        # The classifiers share no parameters: the sum trains each of them on its own loss.
        optimizer_step(losses.sum(), optimizer)
        # The log has the lowest loss of the sweep, over the batch of all ranks; a diverged
        # classifier never has it.
        losses = all_gather(losses.detach()).mean(0)
        best_loss = losses.nan_to_num(nan=torch.inf, posinf=torch.inf).min()
        run.end_step(loss=best_loss, **logged_lrs)


def classifier_losses(classifiers, h, labels):
    """Features [N, d], labels [N] → the loss of each classifier, in fp32."""
    logits = classifiers(at_least_fp32(h))  # [N, num_classes] each
    return torch.stack([F.cross_entropy(y, labels) for y in logits])


def epoch_lrs(args, epoch):
    """Each classifier's lr in an epoch: scaled, then a cosine to 0, updated once per epoch."""
    peaks = [scaled_lr(lr, args.batch_size) for lr in args.lr]
    return [warmup_cosine_lr(epoch, args.epochs, warmup=0, peak_lr=peak) for peak in peaks]


def create_classifiers(args, d, num_classes):
    """Weights from N(0, std 0.01), biases 0.

    The seed is the same for every lr: training a single one gives the bits that a sweep gives.
    """
    linears = [nn.Linear(d, num_classes) for _ in args.lr]
    for linear in linears:
        torch.manual_seed(args.seed)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    batchnorm = ViewBatchNorm(d, affine=False) if args.batchnorm else None
    return LinearClassifiers(linears, batchnorm)


def create_sgd(classifiers):
    """SGD with a parameter group for each classifier, whose lr is set in each epoch."""
    groups = [dict(params=linear.parameters()) for linear in classifiers.linears]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)


def classify_features(backbone, classifiers, env):
    """→ a function: images → logits of each classifier, in fp32 on the backbone's features."""

    def classify(images):
        classifiers.eval()
        with env.autocast():
            h = backbone(images)
        return classifiers(at_least_fp32(h))

    return classify


def log_accuracies(args, run, val, accuracies):
    values = {}
    for lr, (acc1, acc5) in zip(args.lr, accuracies):
        suffix = f"/lr{lr:g}" if len(args.lr) > 1 else ""
        values |= {f"acc1{suffix}": acc1, f"acc5{suffix}": acc5}
    highest = "highest " if len(args.lr) > 1 else ""
    run.log_eval(f"{highest}top-1 {max(accuracies)[0]:.2f} %", val, **values)


def print_results(args, splits, classifiers, results, run):
    """A line for each learning rate, last and best accuracy; then the headline: the best last."""
    rows = zip(args.lr, classifiers.linears, results.last, results.best)
    for lr, linear, last, (best_acc1, epoch) in rows:
        diverged = "" if linear.weight.isfinite().all() else "  (diverged)"
        run.print(
            f"lr {lr:<7g} last {format_accuracy(*last, splits.num_classes)}; "
            f"best {best_acc1:.2f} % in epoch {epoch}{diverged}"
        )
    (acc1, acc5), lr = max(zip(results.last, args.lr), key=lambda pair: pair[0])
    text = format_accuracy(acc1, acc5, splits.num_classes)
    remark = run.unreadable.remark(splits.val)
    run.print(f"linear  {text} after {args.epochs} epochs, lr {lr:g}{remark}")


if __name__ == "__main__":
    cli.run_script(main, parse_args)
