//! Ingress, by XDP in the driver.
//!
//! Bytes are read by `bpf_xdp_load_bytes` (Linux 5.18), never by packet pointers: the headers of a
//! multi-buffer frame need not lie in its first buffer.

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
    macros::xdp,
    programs::XdpContext,
};
use core::mem::MaybeUninit;
use rfsis_common::frame::{Frame, classify};

use crate::capture::{Captured, capture};
use crate::maps::vip;

struct XdpFrame<'a>(&'a XdpContext);

impl XdpFrame<'_> {
    /// What stands at `offset`, if the frame does not end before its end.
    ///
    /// # Safety
    /// Any bytes make a valid `T`.
    #[inline(always)]
    unsafe fn read<T>(&self, offset: usize) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: `value` has room for a `T`; the helper fails where the frame ends before that is full, and has
        // filled it otherwise.
        unsafe {
            self.copy(
                offset as u32,
                value.as_mut_ptr().cast(),
                size_of::<T>() as u32,
            )
            .then(|| value.assume_init())
        }
    }
}

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        // SAFETY: bytes are valid whatever they are.
        unsafe { self.read(offset) }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        // SAFETY: integers are valid whatever they are.
        let words = unsafe { self.read::<[u32; N]>(offset) };
        words.map(|words| words.map(u32::from_be))
    }

    #[inline(always)]
    fn frame_len(&self) -> usize {
        // SAFETY: the context is the one that the kernel gave.
        unsafe { bpf_xdp_get_buff_len(self.0.ctx) as usize }
    }
}

impl Captured for XdpFrame<'_> {
    type Context = XdpContext;

    #[inline(always)]
    fn context(&self) -> &XdpContext {
        self.0
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.0.ingress_ifindex() as u32
    }

    #[inline(always)]
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is the one that the kernel gave, `to` has `len` bytes.
        unsafe { bpf_xdp_load_bytes(self.0.ctx, offset, to.cast(), len) == 0 }
    }
}

/// `frags` (Linux 5.18): multi-buffer frames are welcome (jumbo MTU on veth, receive aggregation on
/// NICs).
#[xdp(frags)]
pub fn rfsis_xdp(ctx: XdpContext) -> u32 {
    let frame = XdpFrame(&ctx);
    let class = classify(&frame, vip());
    if capture(&frame, &class) {
        xdp_action::XDP_PASS
    } else {
        xdp_action::XDP_DROP
    }
}
