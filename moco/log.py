"""What a run says: progress bar, log.jsonl, TensorBoard, curves.png, views.png; rank 0 alone."""

import itertools
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from moco import UserError, checkpoint
from moco.augment import RGB, visible
from moco.data import checked
from moco.distributed import average, rank, world


class Log:
    """Collects scalars on the device and reads them every `print_freq` steps: one wait, not many.

    Lines of log.jsonl are of two kinds: training, averaged since the line before, and what an
    evaluation measured. `epoch_steps`: steps of an epoch; `bad`: data.BadImages; `chance`: the loss
    of a blind guess, where it is worth showing. As a context it writes; its state is a part of the
    checkpoint.
    """

    def __init__(self, folder, args, epoch_steps, bad, chance=None):
        self.folder, self.epoch_steps, self.batch_size = Path(folder), epoch_steps, args.batch_size
        self.epochs, self.print_freq = args.epochs, args.print_freq
        self.tensorboard = args.tensorboard
        self.chance = {} if chance is None else {"chance": chance}
        self.measured = ""  # by the last evaluation
        self.steps = self.rows = 0  # done, and lines of log.jsonl about them
        self.pending, self.names = [], ()  # scalars on the device, not read yet
        self.latest = {}  # the last training line
        self.waited, self.since = 0.0, time.perf_counter()  # since that line, in seconds
        self.timed_steps = 0
        self.drawn = 0.0
        self.unwritten = b""
        self.bad = bad
        bad.say = self.say
        self.speaks = rank() == 0
        self.file = self.board = self.bar = None

    def state_dict(self):
        """Where it stands, with what no line says yet; all ranks together."""
        self.bad.meet()
        pending = self._values() if self.pending else torch.zeros(0, 0)
        return dict(
            steps=self.steps, rows=self.rows, names=self.names, pending=pending,
            latest=self.latest, measured=self.measured,
        )  # fmt: skip

    def load_state_dict(self, state):
        self.steps, self.rows = int(state["steps"]), int(state["rows"])
        if not isinstance(state["names"], tuple):
            raise TypeError("'names' is no tuple")
        self.names, self.pending = state["names"], list(state["pending"].unbind())
        self.latest = {str(name): float(value) for name, value in state["latest"].items()}
        self.measured = str(state["measured"])

    def __enter__(self):
        if not self.speaks:
            return self
        path, total = self.folder / "log.jsonl", self.epochs * self.epoch_steps
        rows = read_rows(path)[: self.rows]  # what came after the checkpoint comes again
        self.rows = len(rows)
        trimmed = path.with_suffix(".tmp")
        trimmed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trimmed.replace(path)
        self.file = open(path, "ab", buffering=0)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder, purge_step=self.steps and self.steps + 1)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=self.steps, unit="step", dynamic_ncols=True)
        if self.steps:
            left = "" if self.steps < total else ": nothing left to do"
            self.say(f"resumed after step {self.steps:,} of {total:,}{left}")
        return self

    def __exit__(self, *_):
        if self.bad.found:
            self.say(self.bad)
        for end in (self.bar, self.board, self.file):
            if end:
                end.close()

    def say(self, text):
        """A line of text, above the bar if there is one."""
        if self.bar:
            self.bar.write(text)
        elif self.speaks:
            print(text, flush=True)

    def timed(self, loader):
        """The loader's batches; the time spent waiting for them is counted."""
        self.since, self.waited, self.timed_steps = time.perf_counter(), 0.0, 0
        asked = time.perf_counter()
        for batch in checked(loader, self.bad):
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, step, settings, **scalars):
        """After `step` steps in all; settings: plain numbers that the step was made with, lr say;
        scalars: 0-d tensors on the device, `loss` among them."""
        self.names, self.steps = tuple(scalars), step
        self.timed_steps += 1
        self.pending.append(torch.stack([v.detach().float() for v in scalars.values()]))
        if self.bar:
            self.bar.update()
        if step % self.print_freq == 0 or step % self.epoch_steps == 0:
            self._flush(step, settings)

    def _flush(self, step, settings):
        values = self._values()
        self._check(step, values[:, self.names.index("loss")])
        now = time.perf_counter()
        seconds = now - self.since
        self.latest = dict(zip(self.names, values.mean(0).tolist())) | self.chance | settings
        self.latest |= dict(
            images_per_s=self.timed_steps * self.batch_size / seconds,
            data_wait=self.waited / seconds,
        )
        self._row(self.latest)
        self.pending, self.waited, self.since, self.timed_steps = [], 0.0, now, 0
        if self.bar:
            self.bar.set_postfix_str(self._short())
        self.bad.meet()

    def _values(self):
        """What is pending, averaged over the ranks: [steps, scalars]. Waits for the device."""
        device = self.pending[-1].device  # those from a checkpoint are on the CPU
        return average(torch.stack([values.to(device) for values in self.pending])).cpu()

    def _check(self, step, losses):
        bad = ~losses.isfinite()
        if bad.any():
            self._stop(
                f"loss became {losses[bad][0]:f}", step - len(losses) + int(bad.int().argmax())
            )

    def check_weights(self, model):
        """Stops the run if a weight is no number: the last step shows in no loss yet."""
        norms = torch.stack(torch._foreach_norm(list(model.parameters())))
        if not norms.isfinite().all():
            self._stop("weights are no numbers any more", self.steps - 1)

    def _stop(self, what, step):
        epoch, iteration = divmod(step, self.epoch_steps)
        last = self.folder / checkpoint.LAST
        raise UserError(
            f"the {what} in epoch {epoch}, iteration {iteration} (both from 0); last good "
            f"checkpoint: {last if last.exists() else 'none yet'}; what helps: a lower --lr, --amp "
            'bf16 or off, and more in README, "When it goes wrong"',
            code=1,
        )

    def evaluation(self, text, **values):
        """What an evaluation measured: a line of log.jsonl, and `text` for other lines."""
        self.measured = text
        self._row(values)
        if self.bar and self.latest:
            self.bar.set_postfix_str(self._short())

    def _row(self, values):
        if not self.speaks:
            return
        values = {key: float(f"{value:.6g}") for key, value in values.items()}
        row = dict(epoch=round(self.steps / self.epoch_steps, 4), step=self.steps) | values
        self.rows += 1
        self.unwritten += json.dumps(row).encode() + b"\n"
        with suppress(OSError):  # a full disk: the next line brings these along
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(key, value, self.steps)

    def _short(self):
        chance = "".join(f" (chance {value:.2f})" for value in self.chance.values())
        measured = self.measured and f", {self.measured}"
        return f"loss {self.latest['loss']:.3f}{chance}{measured}"

    def epoch(self, epoch, evaluated=True):
        """The line after `epoch` epochs. Beside a bar only an evaluation is worth one."""
        if not self.speaks:
            return
        if evaluated or not self.bar:
            monitors = "".join(f"  {n} {self.latest[n]:.2f}" for n in self.names if n != "loss")
            self.say(
                f"epoch {epoch}/{self.epochs}  {self._short()}{monitors}  "
                f"{self.latest['images_per_s']:,.0f} images/s, "
                f"{100 * self.latest['data_wait']:.0f} % of it waiting for data"
            )
        if epoch == self.epochs or time.perf_counter() - self.drawn > 60:  # seconds
            with suppress(OSError):  # a full disk is told when the run is saved
                draw_curves(self.folder)
            self.drawn = time.perf_counter()


def read_rows(path):
    """log.jsonl → list of dicts; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


PANELS = {
    "loss": "loss, and its chance level (dashed)",
    "knn": "kNN accuracy on held-out images, %",
    "acc1": "top-1 accuracy on held-out images, %",
    "top1": "contrastive top-1, share of queries",
    "spread": "spread of the features (0: collapsed)",
    "lr": "learning rate",
    "m": "momentum coefficient m",
}


def draw_curves(*folders, out=None):
    """log.jsonl of one run or several, overlaid → `out`, or curves.png of the first.

    A panel for each kind of number; of several runs, a colour for each.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    runs = [read_rows(Path(folder, "log.jsonl")) for folder in folders]
    lines = {}  # "acc1 lr 0.1" is a line in the panel acc1
    for run, rows in enumerate(runs):
        for row in rows:
            for key, value in row.items():
                if (panel := key.split()[0]) in PANELS:
                    points = lines.setdefault(panel, {}).setdefault((key, run), [])
                    points.append((row["epoch"], value))

    columns = min(3, len(lines)) or 1
    height = -(-len(lines) // columns) or 1
    figure = Figure(figsize=(3.7 * columns, 3 * height), layout="constrained")
    panels = [panel for panel in PANELS if panel in lines]
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(height, columns, place)
        marker = "." if panel in ("knn", "acc1") else None
        _draw_lines(axes, lines[panel], marker, several=len(runs) > 1)
        title = PANELS[panel]
        chances = {row["chance"] for rows in runs for row in rows if "chance" in row}
        if panel == "loss" and chances:
            for chance in chances:
                axes.axhline(chance, ls="--", color="gray")
        elif panel == "loss":
            title = "loss"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        names = distinct_names(folders)
        handles = [Line2D([], [], color=f"C{run}", label=name) for run, name in enumerate(names)]
        ncols = min(len(names), max(1, int(3.7 * columns / (0.07 * max(map(len, names)) + 0.6))))
        figure.set_figheight(3 * height + 0.3 + 0.2 * -(-len(names) // ncols))
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols, fontsize=9)
    figure.savefig(out or Path(folders[0], "curves.png"), dpi=100)


def _draw_lines(axes, lines, marker, several):
    """lines: {(key, run): [(epoch, value)]}. Of several runs, the dashes tell the keys apart."""
    from matplotlib.lines import Line2D

    keys = list(dict.fromkeys(key for key, _ in lines))
    dashes = dict(zip(keys, itertools.cycle(("-", "--", ":", "-."))))
    for (key, run), points in lines.items():
        look = dict(color=f"C{run}", ls=dashes[key], lw=1.2) if several else dict(label=key)
        axes.plot(*zip(*points), marker=marker, **look)
    if len(keys) > 1:
        handles = [Line2D([], [], color="gray", ls=dashes[key], label=key) for key in keys]
        axes.legend(fontsize=8, handles=handles if several else None)


def distinct_names(folders):
    """The last parts of the paths, as few as tell them apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def draw_views(folder, x1, x2, pixels=RGB, most=10):
    """Pairs of normalised views [N, C, H, W], as the model sees them → folder/views.png."""
    from matplotlib.figure import Figure

    n = min(most, len(x1))
    height, width = x1.shape[-2:]
    figure = Figure(figsize=(1.3 * n + 0.3, 2.6 * height / width + 0.3), layout="constrained")
    for row, (views, name) in enumerate(((x1, "view 1"), (x2, "view 2"))):
        for column in range(n):
            axes = figure.add_subplot(2, n, row * n + column + 1, xticks=[], yticks=[])
            image = visible(views[column].float().cpu(), pixels)
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if column == 0:
                axes.set_ylabel(name)
    figure.savefig(Path(folder, "views.png"), dpi=100)


def versions():
    """What a run stood on: package versions and the git revision, `+` if files were changed."""
    import timm
    import torchvision

    found = dict(
        python=sys.version.split()[0],
        torch=str(torch.__version__),  # a plain str: the checkpoint holds it
        torchvision=torchvision.__version__,
        timm=timm.__version__,
    )
    git, here = ("git", "describe", "--always", "--dirty=+"), Path(__file__).parent
    try:
        described = subprocess.run(git, cwd=here, capture_output=True, text=True, check=True)
        found["git"] = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = "none"
    return found


def describe(args, device, amp, **backbone):
    """What a run is, in plain types, for args.json and its checkpoints; backbone: arch, img_size
    and the like as they are used."""
    precision = str(amp).removeprefix("torch.") + " autocast" if amp else "float32"
    return backbone | dict(
        args=vars(args),
        world=world(),
        device=str(device),
        precision=precision,
        versions=versions(),
    )


def introduce(folder, about, **lines):
    """Prints what is about to run, once, and writes it to args.json; lines: what else to print."""
    if rank() != 0:
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write to --output-dir {folder}: {error.strerror}") from None
    lines |= {
        "device": f"{about['device']}, {about['world']} process(es), {about['precision']}",
        "with": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "args": " ".join(f"{name}={value}" for name, value in about["args"].items()),
        "folder": folder,
    }
    for name, text in lines.items():
        print(f"{name:<7} {text}", flush=True)
