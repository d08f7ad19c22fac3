#!/usr/bin/env bash
# Compiler flags for a training step whose communication hides behind its computation. Sourced by the launchers, or by you:
#
#   . launch/xla_flags.sh
#
# What you have set yourself in LIBTPU_INIT_ARGS or XLA_FLAGS stays, and comes last, so it wins. VLA_NO_XLA_FLAGS=1 leaves all as it is.
# Any of them can be tried without a TPU: `LIBTPU_INIT_ARGS=... vla-jax compile-check ...` compiles with them, and refuses those it
# does not know. See README.md here for what each does and what was checked.
if [ -z "${VLA_NO_XLA_FLAGS:-}" ]; then
    # TPU: gathers of the next layer's weights run, in steps, beside this layer's matrix products
    vla_tpu_flags='--xla_tpu_enable_async_collective_fusion=true'
    vla_tpu_flags="$vla_tpu_flags --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
    vla_tpu_flags="$vla_tpu_flags --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
    vla_tpu_flags="$vla_tpu_flags --xla_tpu_overlap_compute_collective_tc=true"
    vla_tpu_flags="$vla_tpu_flags --xla_enable_async_all_gather=true"
    # several slices: gradients are reduced between them while the backward pass goes on
    vla_tpu_flags="$vla_tpu_flags --xla_tpu_enable_data_parallel_all_reduce_opt=true"
    vla_tpu_flags="$vla_tpu_flags --xla_tpu_data_parallel_opt_different_sized_ops=true"
    export LIBTPU_INIT_ARGS="$vla_tpu_flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    unset vla_tpu_flags
    # GPU, several of them: the scheduler that starts collectives early and waits for them late
    if command -v nvidia-smi >/dev/null 2>&1; then
        export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
    fi
fi
