"""For scripts/prepare_imagenet.py: ImageNet's archives, Kaggle's copy, and how images are written or linked."""
