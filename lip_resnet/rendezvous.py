"""torchrun's key-value store with a prefix for each start of the processes.

With the c10d rendezvous torchrun keeps one store for all its restarts, and torch separates them by
TORCHELASTIC_RESTART_COUNT, which every node counts for itself: a restarted process can read the addresses of processes
that were killed (https://github.com/pytorch/pytorch/issues/135712, https://github.com/pytorch/pytorch/issues/108158).
"""

import hashlib
import os
import time
import uuid

import torch.distributed as dist

from lip_resnet.errors import InputError

TIMEOUT_SECONDS = 600


def store_of_this_start(rank: int, world_size: int) -> dist.Store:
    """The store of torchrun's agent, under a prefix that all processes of this start agree on and no other start uses.

    Every process publishes a random token. Rank 0 publishes the list of all tokens; every process acknowledges the
    list that contains its own token; rank 0 then confirms the list that all have acknowledged. Its hash is the prefix.

    Raises:
        InputError: not all processes come within ``TIMEOUT_SECONDS``.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False)
    token, deadline = uuid.uuid4().hex, time.monotonic() + TIMEOUT_SECONDS
    token_keys = [f"lip_resnet/hello/{each}" for each in range(world_size)]
    ack_keys = [f"lip_resnet/agreed/{each}" for each in range(world_size)]
    store.set(token_keys[rank], token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(token_keys):
            store.set("lip_resnet/list", b" ".join(store.multi_get(token_keys)).decode())
        tokens = store.get("lip_resnet/list") if store.check(["lip_resnet/list"]) else b""
        if token.encode() in tokens.split():
            store.set(ack_keys[rank], tokens.decode())
            if rank == 0 and store.check(ack_keys) and set(store.multi_get(ack_keys)) == {tokens}:
                store.set("lip_resnet/go", tokens.decode())
            if store.check(["lip_resnet/go"]) and store.get("lip_resnet/go") == tokens:
                return dist.PrefixStore(hashlib.sha256(tokens).hexdigest(), store)
        time.sleep(0.05)
    raise InputError(f"not all of {world_size} processes have started within {TIMEOUT_SECONDS // 60} minutes")
