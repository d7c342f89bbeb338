"""What any training run needs: data, loader, folders, checkpoints, logs, command line.

from engine import load_backbone
backbone, transform = load_backbone("runs/vit_small_300/checkpoint.pth")
"""


def load_backbone(path, arch=None, img_size=None, mean=None, std=None):
    """engine.weights.load_backbone, imported when it is called: `import engine` stays cheap."""
    from engine import weights

    return weights.load_backbone(path, arch, img_size, mean, std)
