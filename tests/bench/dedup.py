"""Benchmark: finding near duplicates among random perceptual hashes, with planted pairs that it must find.

Prints the time, the number of planted pairs found and the peak memory.

    python tests/bench/dedup.py --hashes 1000000 --pairs 1000
"""

import argparse
import resource
import time

import numpy as np

from pipeline.curation.dedup import NEAR_BITS, groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=int, default=1_000_000, help="Random hashes. Default: 1000000.")
    parser.add_argument(
        "--pairs", type=int, default=1_000,
        help=f"Hashes that get a copy with at most {NEAR_BITS} flipped bits. Default: 1000.",
    )  # fmt: skip
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
    print(
        f"| dedup: near duplicates among {len(hashes):,} hashes | {seconds:.1f} s; found {found} of {args.pairs} "
        f"planted pairs, joined {joined} rows in total; peak memory {peak:.2f} GiB |"
    )


if __name__ == "__main__":
    main()
