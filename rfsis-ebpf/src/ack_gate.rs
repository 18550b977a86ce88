//! The ACK gate: what a client is told of what arrived (`rfsis_common::ack_gate` decides).
//!
//! A packet that cannot be rewritten is held. Nothing is lost by that: TCP sends it again, and its
//! acknowledgement is pending meanwhile.
//!
//! Checksums are adjusted by `bpf_l4_csum_replace` without `BPF_F_PSEUDO_HDR`: it leaves alone the ones
//! that the device is to complete, which do not cover the TCP header yet.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_skb_load_bytes,
    programs::TcContext,
};
use aya_log_ebpf::warn;
use core::ptr::{read_volatile, write_volatile};
use rfsis_common::ack_gate::{
    AckDecision, AckGateVerdict, AckVerdict, Guarded, OPENING_CAPTURE, OpeningEvent, OpeningKind,
    Outgoing, RELEASE_MARK, Sent, ack_decide, is_opening, note_open, note_release, syn_ack_decide,
};
use rfsis_common::frame::{Classified, TcpPart};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use rfsis_common::options::{NOP, ONE_BLOCK, TcpOptions, is_told, tcp_options};
use rfsis_common::verdict::is_syn_ack;

use crate::clock::now_ns;
use crate::maps::{
    GUARDED, OPENINGS, PENDING, SERVICE_PORTS, confirmation, count_ack_gate, guarded, has_ack_gate,
    is_guarding, mirror_ifindex, mirror_peer, sent, worth_logging,
};
use crate::skb::{SkbFrame, mark};
use crate::{agree, atomic, prompt};

/// Offsets in a TCP header (RFC 9293 section 3.1).
const ACK_OFFSET: usize = 8;
const WINDOW_OFFSET: usize = 14;
const CHECKSUM_OFFSET: usize = 16;

/// Most bytes of blocks in a SACK option: options have 40 bytes, kind and length take two.
const SACK_WORDS_MAX: usize = 9;

/// Judges a packet that the gate has passed, and changes what it must. What is none of its business passes.
#[inline(always)]
pub fn judge(ctx: &TcContext, frame: &Classified, now_ns: u64) -> AckGateVerdict {
    if !has_ack_gate() {
        return AckGateVerdict::Passed;
    }
    let Some(tcp) = frame.tcp() else {
        return AckGateVerdict::Passed;
    };
    let verdict = match guarded(tcp.flow) {
        Some(guarded) => judge_guarded(ctx, frame, tcp, guarded, now_ns),
        None if is_service(tcp) => judge_unknown(ctx, frame, tcp, now_ns),
        None => return AckGateVerdict::Passed,
    };
    count(ctx, verdict);
    verdict
}

/// Reports a SYN that came in for a service.
#[inline(always)]
pub fn notice(ctx: &TcContext, frame: &Classified) {
    if !has_ack_gate() {
        return;
    }
    let Some(tcp) = frame.tcp() else {
        return;
    };
    if !is_opening(tcp) || !is_service(tcp) {
        return;
    }
    if !report(ctx, frame, tcp, OpeningKind::Syn, now_ns()) {
        count(ctx, AckGateVerdict::OpeningLost);
    } else if is_guarding() {
        agree::note_syn(ctx, tcp, false);
    }
}

#[inline(always)]
fn count(ctx: &TcContext, verdict: AckGateVerdict) {
    let count = count_ack_gate(verdict);
    if matches!(verdict, AckGateVerdict::OpeningLost) && worth_logging(count) {
        warn!(ctx, "openings ring full: {} lost on this CPU", count);
    }
}

#[inline(always)]
fn is_service(tcp: &TcpPart) -> bool {
    // SAFETY: only presence is asked; the value is not read.
    unsafe { SERVICE_PORTS.get(tcp.flow.service_port).is_some() }
}

#[inline(always)]
fn judge_unknown(
    ctx: &TcContext,
    frame: &Classified,
    tcp: &TcpPart,
    now_ns: u64,
) -> AckGateVerdict {
    if mark(ctx) == RELEASE_MARK {
        // A SYN-ACK that the agent lets go: the standby does not take the flow.
        AckGateVerdict::Released
    } else if is_syn_ack(tcp) {
        open(ctx, frame, tcp, None, now_ns)
    } else {
        AckGateVerdict::Unguarded
    }
}

#[inline(always)]
fn judge_guarded(
    ctx: &TcContext,
    frame: &Classified,
    tcp: &TcpPart,
    guarded: Guarded,
    now_ns: u64,
) -> AckGateVerdict {
    let Some(slot) = sent(guarded.slot) else {
        return AckGateVerdict::Unguarded;
    };
    if mark(ctx) == RELEASE_MARK {
        let segment = Outgoing::new(tcp, &TcpOptions::default());
        let mut told = load(slot);
        note_release(&segment, &mut told, guarded.shift);
        store_told(slot, &told);
        return AckGateVerdict::Released;
    }
    if is_syn_ack(tcp) {
        return open(ctx, frame, tcp, Some(guarded), now_ns);
    }
    let options = tcp_options(&SkbFrame(ctx), tcp);
    let segment = Outgoing::new(tcp, &options);
    let before = load(slot);
    let mut after = before;
    after.at_ns = now_ns;
    let confirmed = is_guarding().then(|| confirmation(guarded.slot)).flatten();
    let Some(confirmed) = confirmed.filter(|confirmed| !confirmed.is_open()) else {
        note_open(&segment, &mut after, guarded.shift);
        store(slot, &before, &after);
        return AckGateVerdict::Open;
    };
    // For what is held now, and told later.
    prompt::note_hop(ctx, guarded.slot);
    let mut decision = ack_decide(&segment, &mut after, confirmed, guarded.shift);
    let mut stored = false;
    if !matches!(decision.verdict, AckVerdict::Passed) {
        store(slot, &before, &after);
        // Who confirms looks at what the client was not told when it has noted that: one of the two sees the other,
        // with a full barrier between.
        // SAFETY: the pointer is to an element of the array `SENT`; nothing is added.
        unsafe { atomic::fetch_add(&raw mut (*slot).at_ns, 0) };
        match confirmation(guarded.slot) {
            Some(now) if now != confirmed => {
                decision = ack_decide(&segment, &mut after, now, guarded.shift);
            }
            _ if matches!(decision.verdict, AckVerdict::Held) => return AckGateVerdict::Held,
            // A second time would look like another segment, which says what is confirmed meanwhile.
            _ => stored = true,
        }
    }
    let verdict = match decision.verdict {
        AckVerdict::Held => AckGateVerdict::Held,
        _ if !rewrite(ctx, tcp, &options, &decision) => {
            after.told = before.told;
            after.told_edge = before.told_edge;
            store_told(slot, &after);
            AckGateVerdict::Held
        }
        AckVerdict::Lowered => AckGateVerdict::Lowered,
        AckVerdict::Passed => AckGateVerdict::Passed,
    };
    if !stored {
        store(slot, &before, &after);
    }
    verdict
}

#[inline(always)]
fn open(
    ctx: &TcContext,
    frame: &Classified,
    tcp: &TcpPart,
    guarded: Option<Guarded>,
    now_ns: u64,
) -> AckGateVerdict {
    let verdict = syn_ack_decide(tcp.ack, guarded, is_guarding());
    if guarded.is_some() && !matches!(verdict, AckGateVerdict::Passed) {
        // A later connection of the same addresses and ports: what was known of the old one would
        // lower its acknowledgements to nonsense. Fails where the agent was faster.
        let _ = GUARDED.remove(tcp.flow);
    }
    match verdict {
        AckGateVerdict::Opening => {
            let kind = if agree::keep(ctx, frame, tcp) {
                OpeningKind::Kept
            } else {
                OpeningKind::Held
            };
            if report(ctx, frame, tcp, kind, now_ns) {
                return AckGateVerdict::Opening;
            }
            // The agent must hear of it before the kernels agree.
            let _ = PENDING.remove(tcp.flow);
            AckGateVerdict::OpeningLost
        }
        AckGateVerdict::Open => {
            // Lost, the flow stays unprotected.
            report(ctx, frame, tcp, OpeningKind::Passed, now_ns);
            AckGateVerdict::Open
        }
        verdict => verdict,
    }
}

/// Puts the headers of a SYN or SYN-ACK into the ring; `false` where it is full.
#[inline(always)]
fn report(
    ctx: &TcContext,
    frame: &Classified,
    tcp: &TcpPart,
    kind: OpeningKind,
    at_ns: u64,
) -> bool {
    let Some(mut event) = OPENINGS.reserve::<OpeningEvent>(0) else {
        return false;
    };
    let len = (tcp.offset - frame.l3_offset + tcp.header_len) as u32;
    let event_ptr = event.as_mut_ptr();
    // SAFETY: the event is ours until submitted; its integers are written here, `len` bytes of the packet
    // by `copy`, and readers go by `len`.
    let copied = unsafe {
        (&raw mut (*event_ptr).at_ns).write(at_ns);
        (&raw mut (*event_ptr).flow).write(tcp.flow);
        (&raw mut (*event_ptr).len).write(len);
        (&raw mut (*event_ptr).kind).write(kind as u32);
        copy(
            ctx,
            frame.l3_offset,
            (&raw mut (*event_ptr).packet).cast(),
            len,
        )
    };
    if copied {
        event.submit(wake(kind));
    } else {
        event.discard(0);
    }
    copied
}

/// Whether a report wakes the agent, which may have left earlier ones unread. Nobody waits for a SYN, and of
/// a SYN-ACK that is held the standby tells by itself, if it gets a copy.
#[inline(always)]
fn wake(kind: OpeningKind) -> u64 {
    let is_copied = || mirror_ifindex() != 0 && !mirror_peer().is_nobody();
    match kind {
        OpeningKind::Syn => u64::from(BPF_RB_NO_WAKEUP),
        OpeningKind::Held | OpeningKind::Kept if is_copied() => u64::from(BPF_RB_NO_WAKEUP),
        OpeningKind::Held | OpeningKind::Kept | OpeningKind::Passed | OpeningKind::Agreed => {
            u64::from(BPF_RB_FORCE_WAKEUP)
        }
    }
}

/// Copies headers; `false` where they do not fit or are not there.
///
/// # Safety
/// `to` has `OPENING_CAPTURE` bytes.
#[inline(always)]
unsafe fn copy(ctx: &TcContext, offset: usize, to: *mut u8, len: u32) -> bool {
    // Opaque to the optimiser, and bounded less one: see the same in `xdp`.
    let last = core::hint::black_box(len.wrapping_sub(1));
    if last >= OPENING_CAPTURE as u32 {
        return false;
    }
    // SAFETY: `to` has room for `OPENING_CAPTURE` bytes, `last + 1` is no more, and not 0.
    unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset as u32, to.cast(), last + 1) == 0 }
}

/// Makes a segment say what was decided; `false` where it could not be written.
#[inline(always)]
fn rewrite(ctx: &TcContext, tcp: &TcpPart, options: &TcpOptions, decision: &AckDecision) -> bool {
    if decision.ack != tcp.ack {
        let (from, to) = (tcp.ack.to_be_bytes(), decision.ack.to_be_bytes());
        if !replace4(ctx, tcp, tcp.offset + ACK_OFFSET, from, to) {
            return false;
        }
    }
    if decision.window != tcp.window {
        let (from, to) = (tcp.window.to_be_bytes(), decision.window.to_be_bytes());
        if !replace2(ctx, tcp, tcp.offset + WINDOW_OFFSET, from, to) {
            return false;
        }
    }
    options.sack_offset == 0 || erase_sack(ctx, tcp, options, decision.ack)
}

/// Notes in a SYN-ACK that it is held; `false` where it could not be written.
#[inline(always)]
pub fn mark_held(ctx: &TcContext, tcp: &TcpPart) -> bool {
    let offset = tcp.offset + URGENT_OFFSET;
    let Ok(from) = ctx.load::<[u8; 2]>(offset) else {
        return false;
    };
    replace2(ctx, tcp, offset, from, HELD_URGENT.to_be_bytes())
}

/// Overwrites the SACK option by NOPs, kind and length and then its words, but for a first block that says only what has
/// come twice.
///
/// The kernel that sent it says what *it* holds; the client would not send such bytes again to a standby
/// that lacks them. Linux aligns options, so each piece lies at an even offset, as the checksum needs it.
#[inline(always)]
fn erase_sack(ctx: &TcContext, tcp: &TcpPart, options: &TcpOptions, ack: u32) -> bool {
    let Ok(head) = ctx.load::<[u8; 2]>(options.sack_offset) else {
        return false;
    };
    let right = ctx.load::<[u8; 4]>(options.sack_offset + ONE_BLOCK - 4);
    let keeps = options.sack_len >= ONE_BLOCK
        && right.is_ok_and(|right| is_told(ack, u32::from_be_bytes(right)));
    let (kept, first) = if keeps {
        ([head[0], ONE_BLOCK as u8], ONE_BLOCK)
    } else {
        ([NOP; 2], 2)
    };
    if !replace2(ctx, tcp, options.sack_offset, head, kept) {
        return false;
    }
    for word in 0..SACK_WORDS_MAX {
        let at = 2 + word * 4;
        if at >= options.sack_len {
            break;
        }
        if at < first {
            continue;
        }
        let offset = options.sack_offset + at;
        let Ok(from) = ctx.load::<[u8; 4]>(offset) else {
            return false;
        };
        if !replace4(ctx, tcp, offset, from, [NOP; 4]) {
            return false;
        }
    }
    true
}

#[inline(always)]
fn replace4(ctx: &TcContext, tcp: &TcpPart, offset: usize, from: [u8; 4], to: [u8; 4]) -> bool {
    let (old, new) = (u32::from_ne_bytes(from), u32::from_ne_bytes(to));
    let checksum = tcp.offset + CHECKSUM_OFFSET;
    let adjusted = ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), 4);
    adjusted.is_ok() && ctx.store(offset, &to, 0).is_ok()
}

#[inline(always)]
fn replace2(ctx: &TcContext, tcp: &TcpPart, offset: usize, from: [u8; 2], to: [u8; 2]) -> bool {
    let (old, new) = (u16::from_ne_bytes(from), u16::from_ne_bytes(to));
    let checksum = tcp.offset + CHECKSUM_OFFSET;
    let adjusted = ctx.l4_csum_replace(checksum, u64::from(old), u64::from(new), 2);
    adjusted.is_ok() && ctx.store(offset, &to, 0).is_ok()
}

/// What a slot holds. A word that another CPU is writing is read old or new.
#[inline(always)]
pub fn load(slot: *mut Sent) -> Sent {
    // SAFETY: the pointer is to an element of the array `SENT`: integers only, always initialised.
    unsafe { read_volatile(slot) }
}

/// Writes what a segment of the kernel changed, for the agent to see all of it or nothing: `version` is
/// odd in between.
#[inline(always)]
fn store(slot: *mut Sent, before: &Sent, after: &Sent) {
    let writing = before.version | 1;
    // SAFETY: the pointer is to an element of the array `SENT`. Volatile, so that the writes stay in
    // their order. Should two segments of a flow pass at once after all, as those of a connection in
    // TIME-WAIT can, the version still ends even.
    unsafe {
        write_volatile(&raw mut (*slot).version, writing);
        write_volatile(&raw mut (*slot).at_ns, after.at_ns);
        write_volatile(&raw mut (*slot).next, after.next);
        write_volatile(&raw mut (*slot).ack, after.ack);
        write_volatile(&raw mut (*slot).edge, after.edge);
        write_volatile(&raw mut (*slot).tsval, after.tsval);
        write_volatile(&raw mut (*slot).tsecr, after.tsecr);
        write_volatile(&raw mut (*slot).flags, after.flags);
        // A released ACK on another CPU writes these too: leave them alone where they did not change.
        if (after.told, after.told_edge) != (before.told, before.told_edge) {
            store_told(slot, after);
        }
        write_volatile(&raw mut (*slot).version, writing.wrapping_add(1));
    }
}

/// Writes what the client was told.
#[inline(always)]
fn store_told(slot: *mut Sent, sent: &Sent) {
    // SAFETY: the pointer is to an element of the array `SENT`. Volatile: each word is written once.
    unsafe {
        write_volatile(&raw mut (*slot).told, sent.told);
        write_volatile(&raw mut (*slot).told_edge, sent.told_edge);
    }
}
