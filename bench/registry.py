"""The experiments, by name, in the order in which they run and are reported."""

from __future__ import annotations

from bench import (
    access_checks,
    cached_access,
    ept_qualification,
    fast_faults,
    faults,
    import_speed,
    lock_scaling,
    mmio_cache,
    mmio_mmu,
    mmu_cost,
    nested_caches,
    nested_walk,
    replay_cost,
    shadow_caches,
    shadow_faults,
    shadow_memory,
    split_latency,
    startup,
    walk_speed,
)
from bench.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        mmio_cache.EXPERIMENT,
        access_checks.EXPERIMENT,
        fast_faults.EXPERIMENT,
        lock_scaling.EXPERIMENT,
        replay_cost.EXPERIMENT,
        walk_speed.EXPERIMENT,
        walk_speed.THREADS,
        nested_walk.EXPERIMENT,
        nested_caches.EXPERIMENT,
        ept_qualification.EXPERIMENT,
        cached_access.EXPERIMENT,
        split_latency.EXPERIMENT,
        faults.EXPERIMENT,
        mmu_cost.EXPERIMENT,
        mmio_mmu.EXPERIMENT,
        shadow_faults.EXPERIMENT,
        shadow_caches.EXPERIMENT,
        shadow_memory.EXPERIMENT,
        startup.EXPERIMENT,
        import_speed.EXPERIMENT,
    )
}
