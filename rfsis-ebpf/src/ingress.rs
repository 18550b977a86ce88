//! Ingress, by TC: where the driver has no XDP, and on veth.
//!
//! It sees a super-frame whole, as it came, and nothing is copied but what the agent gets. The generic
//! mode of XDP would be in its place: it makes every super-frame linear in memory that counts against the
//! socket's buffer, and passes over frames that came straight from a redirect.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_STOLEN, TC_ACT_UNSPEC},
    helpers::generated::bpf_skb_load_bytes,
    macros::classifier,
    programs::TcContext,
};
use rfsis_common::agree::Answer;
use rfsis_common::frame::{Classified, FrameClass, TcpPart, classify};

use crate::capture::{Captured, capture};
use crate::maps::vip;
use crate::skb::{SkbFrame, is_tagged};
use crate::{agree, mirror, pledge, prompt};

impl Captured for SkbFrame<'_> {
    type Context = TcContext;

    #[inline(always)]
    fn context(&self) -> &TcContext {
        self.0
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is the one that the kernel gave.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the context is the one that the kernel gave, `to` has `len` bytes.
        unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), offset, to.cast(), len) == 0 }
    }

    #[inline(always)]
    fn note_syn(&self, tcp: &TcpPart) {
        agree::note_syn(self.0, tcp, true);
    }

    #[inline(always)]
    fn promise(&self, tcp: &TcpPart, now_ns: u64) -> Option<Answer> {
        agree::promise(self.0, tcp, now_ns)
    }

    #[inline(always)]
    fn tell(&self, answer: &Answer) {
        // Not sent is as good as lost.
        let _ = agree::tell(self.0, answer);
    }

    #[inline(always)]
    fn confirm(&self, class: &Classified, tcp: &TcpPart, now_ns: u64) {
        // Not sent is as good as lost: the client repeats itself, and the agent confirms.
        let _ = pledge::confirm(self.0, class, tcp, now_ns);
    }
}

/// Filter on clsact ingress, before all others: what `rfsis_xdp` does, then what `rfsis_mirror` does.
#[classifier]
pub fn rfsis_ingress(ctx: TcContext) -> i32 {
    let frame = SkbFrame(&ctx);
    let mut class = classify(&frame, vip());
    if is_tagged(&ctx) {
        class.class = FrameClass::Tagged;
    }
    if !capture(&frame, &class) || prompt::take(&ctx, &class) || agree::take(&ctx, &class) {
        return TC_ACT_STOLEN;
    }
    if mirror::process(&ctx, &class) {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}
