//! Tap `mirror`: the active copies the VIP's frames to the standby.
//!
//! ```text
//!  client ──► rfsis_xdp ──► rfsis_mirror ──► kernel ──► rfsis_gate ──► client
//!                               │                          │
//!                               └── copy ──► rfsis_gate ◄── copy        (nothing leaves but through it)
//!                                                │
//!                                                └──► the standby's rfsis_xdp ──► its frame ring
//! ```
//!
//! The program on ingress also notices the SYNs of new connections, for the gate and the ACK gate, whatever the tap.
//!
//! A copy differs from its original in the hardware addresses: to the standby's tap, from the interface
//! that it leaves by, so that switches learn nothing wrong. That of a SYN-ACK which the ACK gate holds also
//! says so, where nobody reads it. There is no extra header: what
//! fitted the LAN fits again, and the kernel segments copies of super-frames and finishes their
//! checksums as it does for any frame.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_STOLEN, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::warn;
use rfsis_common::ack_gate::is_opening;
use rfsis_common::frame::{Classified, TcpPart, classify};
use rfsis_common::maps::{Direction, MirrorPeer, OBSERVED};
use rfsis_common::mirror::{MirrorAction, MirrorEgress, MirrorVerdict, mirror_decide};

use crate::clock::now_ns;
use crate::maps::{
    APPROVED_FLOWS, SERVICE_PORTS, count_mirror, has_ack_gate, mirror_egress, mirror_ifindex,
    mirror_peer, mirror_source, node_state, sent_next, vip, worth_logging,
};
use crate::skb::{SkbFrame, is_for_this_host, is_tagged};
use crate::{ack_gate, agree, prompt};

/// Filter on clsact ingress behind XDP, with tap `mirror` or an ACK gate. It sees what XDP has passed,
/// before anybody else.
#[classifier]
pub fn rfsis_mirror(ctx: TcContext) -> i32 {
    let frame = classify(&SkbFrame(&ctx), vip());
    if prompt::take(&ctx, &frame) || agree::take(&ctx, &frame) {
        return TC_ACT_STOLEN;
    }
    if process(&ctx, &frame) {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// Notices and copies what comes in. `false` as of [`offer`].
#[inline(always)]
pub fn process(ctx: &TcContext, frame: &Classified) -> bool {
    if matches!(frame.direction, Direction::FromVip) || !is_for_this_host(ctx) {
        return true;
    }
    if !is_tagged(ctx) {
        forget_approval(frame);
        ack_gate::notice(ctx, frame);
    }
    offer(ctx, frame, now_ns)
}

/// A new connection does not inherit what was approved of an older one of its ports: if the agent is dead, the
/// kernel would refuse it, and the refusal pass.
#[inline(always)]
fn forget_approval(frame: &Classified) {
    if let Some(tcp) = frame.tcp().filter(|tcp| is_opening(tcp)) {
        // Fails where there is none, which is the usual case.
        let _ = APPROVED_FLOWS.remove(tcp.flow);
    }
}

/// Copies a frame to the standby if it is to have one. `false` where the frame could not be put back
/// as it was: it must not go on.
#[inline(always)]
pub fn offer(ctx: &TcContext, frame: &Classified, now_ns: impl FnOnce() -> u64) -> bool {
    if mirror_ifindex() == 0 || is_tagged(ctx) {
        return true;
    }
    let peer = mirror_peer();
    let known = |tcp: &TcpPart| {
        if has_ack_gate() {
            sent_next(tcp.flow)
        } else {
            None
        }
    };
    let egress = || match frame.tcp() {
        Some(tcp) if is_observed(tcp.flow.service_port) => MirrorEgress::Full,
        // The standby must know which flows it does not protect.
        Some(tcp) if has_ack_gate() && sent_next(tcp.flow).is_none() => MirrorEgress::Full,
        _ => mirror_egress(),
    };
    match mirror_decide(frame, &node_state(), now_ns, peer, egress, known) {
        MirrorAction::Ignore => true,
        MirrorAction::Skip(verdict) => {
            count_mirror(verdict);
            true
        }
        MirrorAction::Clone => {
            let (verdict, intact) = clone_to(ctx, peer);
            let count = count_mirror(verdict);
            if matches!(verdict, MirrorVerdict::Failed) && worth_logging(count) {
                warn!(ctx, "{} copies for the standby failed on this CPU", count);
            }
            intact
        }
    }
}

/// Marks a SYN-ACK that the ACK gate holds, to be copied so; `false` if it is not to be. It goes no further.
#[inline(always)]
pub fn mark_held(ctx: &TcContext, frame: &Classified) -> bool {
    mirror_ifindex() != 0 && frame.tcp().is_some_and(|tcp| ack_gate::mark_held(ctx, tcp))
}

/// Whether the standby cannot compute what this port's service says.
#[inline(always)]
fn is_observed(port: u16) -> bool {
    // SAFETY: one byte, which the loader wrote before the programs were attached.
    unsafe { SERVICE_PORTS.get(port) }.is_some_and(|kind| *kind == OBSERVED)
}

/// Sends a copy, and puts the frame back as it was; the second value says whether that succeeded.
#[inline(always)]
fn clone_to(ctx: &TcContext, peer: MirrorPeer) -> (MirrorVerdict, bool) {
    let Ok(original) = ctx.load::<[u8; 12]>(0) else {
        return (MirrorVerdict::Failed, true);
    };
    let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (peer.mac(), mirror_source().mac());
    let addresses = [a, b, c, d, e, f, g, h, i, j, k, l];
    // The buffer may be shared; writing to it makes it this frame's own, and so does cloning, which
    // leaves the copy what was written (`bpf_clone_redirect`, net/core/filter.c).
    if ctx.store(0, &addresses, 0).is_err() {
        return (MirrorVerdict::Failed, true);
    }
    let verdict = match ctx.clone_redirect(mirror_ifindex(), 0) {
        Ok(()) => MirrorVerdict::Cloned,
        Err(_) => MirrorVerdict::Failed,
    };
    (verdict, ctx.store(0, &original, 0).is_ok())
}
