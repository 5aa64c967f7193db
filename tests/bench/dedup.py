"""BENCH: near duplicates among random hashes: `python tests/bench/dedup.py [--hashes 1000000] [--pairs 1000]`."""

import argparse
import resource
import time

import numpy as np

from pipeline.curation.dedup import NEAR_BITS, groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=1_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    base = rng.integers(1, 2**64, args.hashes, dtype=np.uint64)
    bits = rng.integers(0, NEAR_BITS + 1, args.pairs)
    masks = [sum(1 << bit for bit in rng.choice(64, count, replace=False).tolist()) for count in bits.tolist()]
    hashes = np.concatenate([base, base[: args.pairs] ^ np.array(masks, np.uint64)])
    order = rng.permutation(len(hashes))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))

    started = time.time()
    group = groups(np.arange(len(hashes), dtype=np.uint64), hashes[order], np.ones(len(hashes)))
    seconds = time.time() - started
    found = (group[place[: args.pairs]] == group[place[args.hashes :]]).sum()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    joined = len(hashes) - len(np.unique(group))
    print(f"| near duplicates among {len(hashes):,} hashes | {seconds:.1f} s; {found} of {args.pairs} planted pairs "
          f"found, {joined} joined in all; peak memory {peak:.2f} GiB |")  # fmt: skip


if __name__ == "__main__":
    main()
