"""What any training run needs: data, loader, folders, checkpoints, logs, command line."""
