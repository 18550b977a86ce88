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

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: `bytes` has room for N; the helper fails where the frame ends before `offset + N`
        // and has filled all of it otherwise.
        unsafe {
            self.copy(offset as u32, bytes.as_mut_ptr().cast(), N as u32)
                .then(|| bytes.assume_init())
        }
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
