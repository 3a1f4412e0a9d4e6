"""Evaluate weights exactly:  python eval.py --checkpoint RUN_OR_FILE --data DIR [--dataset imagenet-v2 imagenet-a ...]

Under torchrun it is faster and counts the same. A run folder and our own checkpoints know their
model and protocol; for bare files add --model NAME or --config FILE.
"""

from lip_commands import evaluate as main

if __name__ == "__main__":
    main()
