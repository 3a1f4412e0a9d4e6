"""Train a recipe:  torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml data.root=DIR

The same with one process: python train.py ... . Every recipe key can be overridden as section.key=value.
"""

from lip_commands import train as main

if __name__ == "__main__":
    main()
