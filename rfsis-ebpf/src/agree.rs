//! Openings on which the kernels agree by themselves: `rfsis_common::agree` says how.
//!
//! What one of them cannot do, for whichever reason, it leaves to the agents, who come to the same a little later.

use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::generated::{bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};
use core::ptr::{read_volatile, write_volatile};
use rfsis_common::ack_gate::{
    AckGateVerdict, Agreed, Guarded, OpeningEvent, OpeningKind, RELEASE_MARK, Sent,
};
use rfsis_common::agree::{
    AgreePeer, Answer, AnswerWords, FRAME_LEN, MAGIC, NotedSyn, PAYLOAD, Pending, SYN_ACK_MAX,
    TCP_HEADER_MAX, TcpHeader, VERSION, digest, envelope, is_header_unfinished, is_unfinished,
    window_shift, write_checksum,
};
use rfsis_common::frame::{Classified, FrameClass, TcpPart};
use rfsis_common::prompt::{Delegated, HEAD_AT, HEAD_LEN, Hop, Route};

use crate::clock::now_ns;
use crate::maps::{
    self, GUARDED, OPENINGS, PENDING, SPARE_SLOTS, SYNS, agree_peer, agree_scratch, confirmed,
    count_ack_gate, delegated, has_ack_gate, hop, ifindex, is_guarding, mirror_ifindex,
    mirror_peer, sent, vip,
};
use crate::skb::is_tagged;

/// Where an IPv4 packet begins, and TCP in one without options.
const L3: usize = 14;
const L4: usize = L3 + 20;

/// What does not fit the stack.
#[repr(C)]
pub struct Scratch {
    header: TcpHeader,
    pending: Pending,
    words: AnswerWords,
    /// From the EtherType to the version of an answer.
    head: [u8; HEAD_LEN],
    /// IPv4 and UDP headers of one.
    envelope: [u32; 7],
}

/// The peer, if there is one; its keys are read where they are wanted.
#[inline(always)]
pub fn peer() -> Option<*const AgreePeer> {
    let peer = agree_peer()?;
    // SAFETY: the pointer is to the array's only element, which the agent may be writing: what is half of it
    // fits no answer.
    (unsafe { read_volatile(&raw const (*peer).port) } != 0).then_some(peer)
}

/// Room for a header and a SYN-ACK, this CPU's.
#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the pointer is to this CPU's element: integers only. Programs do not interrupt each other, and each
    // asks once.
    Some(unsafe { &mut *agree_scratch()? })
}

/// Reads a TCP header as a digest takes it.
#[inline(always)]
fn read_header(ctx: &TcContext, tcp: &TcpPart, header: &mut TcpHeader) -> bool {
    *header = [0; 16];
    // Bounded less one: see `capture::copy`.
    let last = core::hint::black_box((tcp.header_len as u32).wrapping_sub(1));
    if last >= TCP_HEADER_MAX as u32 {
        return false;
    }
    // SAFETY: `header` has 64 bytes, `last + 1` is no more than 60, and not 0.
    unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            tcp.offset as u32,
            header.as_mut_ptr().cast(),
            last + 1,
        ) == 0
    }
}

/// Notes a SYN of which the agent will hear, on either node.
#[inline(always)]
pub fn note_syn(ctx: &TcContext, tcp: &TcpPart, is_standby: bool) {
    let (Some(peer), Some(scratch)) = (peer(), scratch()) else {
        return;
    };
    if read_header(ctx, tcp, &mut scratch.header) {
        let digest = digest(key(peer, is_standby), 0, &scratch.header);
        // Cannot fail: an LRU map makes room.
        let _ = SYNS.insert(tcp.flow, NotedSyn { digest }, 0);
    }
}

/// The key of what the standby says to the active.
#[inline(always)]
fn key(peer: *const AgreePeer, is_standby: bool) -> [u64; 2] {
    // SAFETY: as in `peer`.
    unsafe {
        if is_standby {
            read_volatile(&raw const (*peer).giving)
        } else {
            read_volatile(&raw const (*peer).taking)
        }
    }
}

// ---- the active ------------------------------------------------------------------------------------

/// Keeps a SYN-ACK that is held, to let it go upon the standby's answer; `false` where the agent is to.
#[inline(always)]
pub fn keep(ctx: &TcContext, frame: &Classified, tcp: &TcpPart) -> bool {
    let kept = try_keep(ctx, frame, tcp).is_some();
    if !kept {
        // An older one of the same addresses and ports, or the same one, which now looks otherwise. Fails where
        // there is none, which is the usual case.
        let _ = PENDING.remove(tcp.flow);
    }
    kept
}

#[inline(always)]
fn try_keep(ctx: &TcContext, frame: &Classified, tcp: &TcpPart) -> Option<()> {
    if mirror_ifindex() == 0 || mirror_peer().is_nobody() {
        return None;
    }
    if frame.l3_offset != L3 || tcp.offset != L4 || is_tagged(ctx) {
        return None;
    }
    let pending = &mut scratch()?.pending;
    peer()?;
    // SAFETY: copied at once; an entry is replaced as a whole, never written in place.
    pending.syn = unsafe { SYNS.get(tcp.flow).copied() }?.digest;
    let last = core::hint::black_box((tcp.header_len as u32).wrapping_add(20 - 1));
    if last >= SYN_ACK_MAX as u32 {
        return None;
    }
    pending.packet = [0; SYN_ACK_MAX / 4];
    // SAFETY: `packet` has `SYN_ACK_MAX` bytes, `last + 1` is no more, and not 0.
    let read = unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            L3 as u32,
            pending.packet.as_mut_ptr().cast(),
            last + 1,
        )
    };
    if read != 0 {
        return None;
    }
    pending.len = last + 1;
    if !load(ctx, 0, &mut pending.addresses) {
        return None;
    }
    let pending: &Pending = pending;
    PENDING.insert(tcp.flow, pending, 0).ok()
}

/// Lets a SYN-ACK go upon a frame that answers it; the frame goes no further.
#[inline(always)]
pub fn take(ctx: &TcContext, frame: &Classified) -> bool {
    if !has_ack_gate() || !matches!(frame.class, FrameClass::Other) || is_tagged(ctx) {
        return false;
    }
    match answer(ctx) {
        Some(answer) if is_guarding() => let_go(ctx, &answer).is_some(),
        _ => false,
    }
}

/// The answer in a frame, if it is one, and the peer's.
#[inline(always)]
fn answer(ctx: &TcContext) -> Option<Answer> {
    let (peer, scratch) = (peer()?, scratch()?);
    let head = &mut scratch.head;
    if !load(ctx, HEAD_AT, head) {
        return None;
    }
    // SAFETY: as in `peer`.
    let route = unsafe {
        Route {
            from: read_volatile(&raw const (*peer).peer),
            to: read_volatile(&raw const (*peer).node),
            port: read_volatile(&raw const (*peer).port),
            magic: MAGIC,
            version: VERSION,
        }
    };
    let (len, _) = route.udp_of(head)?;
    if len != FRAME_LEN - L4 || !load(ctx, PAYLOAD, &mut scratch.words) {
        return None;
    }
    Answer::open(&scratch.words, key(peer, false))
}

/// Reads as many bytes of a frame as there is room for.
#[inline(always)]
fn load<T>(ctx: &TcContext, offset: usize, to: &mut T) -> bool {
    // SAFETY: `to` has so many bytes, integers only.
    unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            offset as u32,
            (&raw mut *to).cast(),
            size_of::<T>() as u32,
        ) == 0
    }
}

/// From here on the flow is guarded, and the SYN-ACK leaves. The answer's buffer becomes its frame.
#[inline(always)]
fn let_go(ctx: &TcContext, answer: &Answer) -> Option<()> {
    let peer = peer()?;
    let scratch = scratch()?;
    let is_left = is_unfinished(answer, &scratch.words);
    let pending = &mut scratch.pending;
    // SAFETY: copied at once. Should it be another one by the time at which it is removed, that one was the same flow's.
    *pending = unsafe { PENDING.get(answer.flow).copied() }?;
    if !pending.is_answered_by(answer, key(peer, false)) {
        return None;
    }
    let shift = window_shift(&pending.packet, pending.len)?;
    let mut event = OPENINGS.reserve::<OpeningEvent>(0)?;
    let Ok(Some(slot)) = SPARE_SLOTS.pop() else {
        event.discard(0);
        return None;
    };
    write_checksum(&mut pending.packet, pending.len, is_left);
    let is_written = write_frame(ctx, pending);
    // Whoever removes it lets it go: the agent may have been faster.
    if !is_written || PENDING.remove(answer.flow).is_err() {
        let _ = SPARE_SLOTS.push(slot, 0);
        event.discard(0);
        // What was written is no answer any more, and nobody's.
        return is_written.then_some(());
    }
    let now_ns = now_ns();
    let guarded = Guarded {
        slot,
        client_isn: answer.client_isn,
        shift,
    };
    let agreed = Agreed {
        slot,
        client_isn: guarded.client_isn,
        shift,
        guarded: u32::from(begin(answer, guarded, pending, now_ns)),
    };
    let event_ptr = event.as_mut_ptr();
    // SAFETY: the event is ours until submitted, and readers go by `len`.
    unsafe {
        (&raw mut (*event_ptr).at_ns).write(now_ns);
        (&raw mut (*event_ptr).flow).write(answer.flow);
        (&raw mut (*event_ptr).len).write(size_of::<Agreed>() as u32);
        (&raw mut (*event_ptr).kind).write(OpeningKind::Agreed as u32);
        (&raw mut (*event_ptr).packet)
            .cast::<Agreed>()
            .write(agreed);
    }
    // Nobody waits for the agent.
    event.submit(u64::from(BPF_RB_NO_WAKEUP));
    count_ack_gate(AckGateVerdict::Agreed);
    // SAFETY: the context is the one that the kernel gave; programs may write the mark.
    unsafe { (*ctx.skb.skb).mark = RELEASE_MARK };
    // Not sent is as good as lost: the client repeats its SYN.
    let _ = ctx.clone_redirect(ifindex(), 0);
    Some(())
}

#[inline(always)]
fn write_frame(ctx: &TcContext, pending: &Pending) -> bool {
    let last = core::hint::black_box(pending.len.wrapping_sub(1));
    if last >= SYN_ACK_MAX as u32 {
        return false;
    }
    // SAFETY: the context is the one that the kernel gave; `packet` has `SYN_ACK_MAX` bytes, `last + 1` is no more,
    // and not 0.
    unsafe {
        bpf_skb_change_tail(ctx.skb.skb.cast(), L3 as u32 + last + 1, 0) == 0
            && ctx.store(0, &pending.addresses, 0).is_ok()
            && bpf_skb_store_bytes(
                ctx.skb.skb.cast(),
                L3 as u32,
                pending.packet.as_ptr().cast(),
                last + 1,
                0,
            ) == 0
    }
}

/// Begins to guard a flow, as the agent does where it lets a SYN-ACK go. Returns whether there was room.
#[inline(always)]
fn begin(answer: &Answer, guarded: Guarded, pending: &Pending, now_ns: u64) -> bool {
    let begun = Sent::new(answer.client_isn, answer.active_isn, pending.window()).at(now_ns);
    let slot = guarded.slot;
    let (Some(sent), Some(confirmed), Some(delegated), Some(hop)) =
        (sent(slot), confirmed(slot), delegated(slot), hop(slot))
    else {
        return false;
    };
    // SAFETY: the pointers are to elements of arrays, of a slot that nobody has: integers only.
    unsafe {
        write_volatile(sent, begun);
        write_volatile(confirmed, begun.everything());
        write_volatile(delegated, Delegated::of(guarded.client_isn));
        write_volatile(
            hop,
            Hop {
                addresses: pending.addresses,
            },
        );
    }
    GUARDED.insert(answer.flow, guarded, 0).is_ok()
}

// ---- the standby -----------------------------------------------------------------------------------

/// What the active's kernel may be told of the copy of a SYN-ACK, once this is in the ring, too.
#[inline(always)]
pub fn promise(ctx: &TcContext, tcp: &TcpPart, now_ns: u64) -> Option<Answer> {
    if now_ns >= maps::promise().until_ns {
        return None;
    }
    let (peer, scratch) = (peer()?, scratch()?);
    // SAFETY: as in `try_keep`.
    let syn = unsafe { SYNS.get(tcp.flow).copied() }?;
    if tcp.payload != 0 || !read_header(ctx, tcp, &mut scratch.header) {
        return None;
    }
    let len = tcp.header_len as u32;
    // Another buffer for the answer there is not.
    let unfinished = is_header_unfinished(vip(), tcp.flow, &scratch.header, len)?;
    // Once: who asks again has not been heard, or not believed, and the agent answers.
    SYNS.remove(tcp.flow).ok()?;
    Some(Answer {
        flow: tcp.flow,
        client_isn: tcp.ack.wrapping_sub(1),
        active_isn: tcp.seq,
        digest: digest(key(peer, true), syn.digest, &scratch.header),
        unfinished,
    })
}

/// Tells it. The copy's buffer becomes the answer's. Lost, the active's agent asks this one's.
#[inline(always)]
pub fn tell(ctx: &TcContext, answer: &Answer) -> Option<()> {
    let (peer, scratch) = (peer()?, scratch()?);
    scratch.words = answer.seal(key(peer, true));
    reply(ctx, peer, &mut scratch.envelope, &scratch.words)
}

/// Sends a datagram to the peer, back on the way on which a copy came. The copy's buffer becomes the datagram's.
#[inline(always)]
pub fn reply<const N: usize>(
    ctx: &TcContext,
    peer: *const AgreePeer,
    headers: &mut [u32; 7],
    words: &[u64; N],
) -> Option<()> {
    // SAFETY: as in `peer`.
    let (node, to, port) = unsafe {
        (
            read_volatile(&raw const (*peer).node),
            read_volatile(&raw const (*peer).peer),
            read_volatile(&raw const (*peer).port),
        )
    };
    *headers = envelope(node, to, port as u16, N * 8);
    let [own_mac, active_mac] = ctx.load::<[[u8; 6]; 2]>(0).ok()?;
    // SAFETY: the context is the one that the kernel gave.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    let len = (PAYLOAD + N * 8) as u32;
    // SAFETY: as above.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb.cast(), len, 0) } != 0 {
        return None;
    }
    ctx.store(0, &[active_mac, own_mac], 0).ok()?;
    ctx.store(12, &0x0800_u16.to_be_bytes(), 0).ok()?;
    ctx.store(L3, headers, 0).ok()?;
    ctx.store(PAYLOAD, words, 0).ok()?;
    ctx.clone_redirect(ifindex, 0).ok()
}
