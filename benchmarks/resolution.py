"""How often to select again: does it buy anything to compute the masks at every batch?

    OMP_NUM_THREADS=1 python benchmarks/resolution.py --data cifar10 --path DIR_WITH_CIFAR10 --size 16 --images 10000 --epochs 5
    OMP_NUM_THREADS=1 python benchmarks/resolution.py --data digits --epochs 20 --seeds 6 --out benchmarks/results/resolution-digits

One-cycle pruning with several values of `min_change` (`resolution` in version 0.1), from the same start and on the same batches. It is the comparison with another
setting varied; the options are those of `fasterprune-compare`."""
import sys
from fasterprune.experiments.cli import compare_main

if __name__ == '__main__':
    sys.argv[1:1] = ['--schedules', 'onecycle', '--min-change', '0,0.01,0.02,0.05', '--out', 'benchmarks/results/resolution', '--reference', 'onecycle min_change 0.0']
    compare_main()
