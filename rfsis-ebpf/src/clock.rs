//! The time, as the agent sees it, too.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;

/// CLOCK_MONOTONIC, ns.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}
