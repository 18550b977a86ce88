//! Atomic operations of Linux 5.12 (`BPF_ATOMIC` in the kernel's instruction-set document), for which `core` has
//! no functions on this target. Those that give the old value are full barriers.

use core::arch::asm;

/// Replaces a word if it is `known`; gives what stood there.
///
/// # Safety
/// `word` is aligned and valid, and nobody writes part of it.
#[inline(always)]
pub unsafe fn compare_exchange(word: *mut u64, known: u64, new: u64) -> u64 {
    let found;
    // SAFETY: by the caller.
    unsafe {
        asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inlateout("r0") known => found,
            options(nostack),
        );
    }
    found
}

/// Adds to a word; gives what stood there.
///
/// # Safety
/// As [`compare_exchange`].
#[inline(always)]
pub unsafe fn fetch_add(word: *mut u64, by: u64) -> u64 {
    let found;
    // SAFETY: by the caller.
    unsafe {
        asm!(
            "{by} = atomic_fetch_add((u64 *)({word} + 0), {by})",
            word = in(reg) word,
            by = inlateout(reg) by => found,
            options(nostack),
        );
    }
    found
}
