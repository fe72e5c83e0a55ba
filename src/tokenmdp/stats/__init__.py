"""The statistics of a comparison: how large, how sure, and compared with what.

The unit of resampling is the prompt. Several responses to one prompt share its difficulty, so they are one cluster; to
count them as independent makes every interval too narrow. Functions that draw at random take a seed and give the same
numbers for it on every machine. What cannot be answered (no data, a NaN, data without any spread) is an error that says
so: an interval of width zero would look like certainty.

Plain numpy and scipy; tensors on the CPU are accepted wherever arrays are.

Rooms: `interval` what all share, `means` over prompts, `rates` of right and wrong, `runs` of solvers, `correlation`,
`samples` of one prompt.
"""

from tokenmdp.stats.correlation import pearson, spearman
from tokenmdp.stats.interval import FEW, Array, Interval, around, bounded
from tokenmdp.stats.means import bootstrap_mean, bootstrap_of_means, paired_bootstrap
from tokenmdp.stats.rates import calibration, clustered_wilson, wilson
from tokenmdp.stats.runs import (
    improvement,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from tokenmdp.stats.samples import best_of_n_curve, best_of_n_values, distinct_n, pass_at_k, pass_at_k_values

__all__ = [
    "FEW",
    "Array",
    "Interval",
    "around",
    "best_of_n_curve",
    "best_of_n_values",
    "bootstrap_mean",
    "bootstrap_of_means",
    "bounded",
    "calibration",
    "clustered_wilson",
    "distinct_n",
    "improvement",
    "interquartile_mean",
    "paired_bootstrap",
    "pass_at_k",
    "pass_at_k_values",
    "pearson",
    "performance_profile",
    "probability_of_improvement",
    "spearman",
    "stratified_bootstrap",
    "wilson",
]
