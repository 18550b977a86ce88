//! Confirmations of what is in the ring, for the agent that has pledged to take it: `rfsis_common::pledge` says what and why.

use aya_ebpf::programs::TcContext;
use core::ptr::{read_volatile, write_volatile};
use rfsis_common::frame::{Classified, TcpPart};
use rfsis_common::pledge::{Headers, confirmation, grown, is_due, is_sound};
use rfsis_common::prompt::{One, seal};

use crate::agree::{peer, reply};
use crate::atomic::compare_exchange;
use crate::maps::{has_ack_gate, next_sequence, pledge, pledge_scratch, promise, vip};

/// Where an IPv4 packet begins, and TCP in one without options.
const L3: usize = 14;
const L4: usize = L3 + 20;

/// What does not fit the stack.
#[repr(C)]
pub struct Scratch {
    words: One,
    headers: Headers,
    /// IPv4 and UDP headers of a datagram.
    envelope: [u32; 7],
}

/// Confirms the bytes of a frame that is in the ring. The copy's buffer becomes the datagram's.
#[inline(always)]
pub fn confirm(ctx: &TcContext, class: &Classified, tcp: &TcpPart, now_ns: u64) -> Option<()> {
    if !has_ack_gate() || class.l3_offset != L3 || tcp.offset != L4 {
        return None;
    }
    let (pledged, pledge) = pledge(tcp.flow)?;
    let promise = promise();
    if now_ns >= promise.until_ns || promise.from.is_nobody() {
        return None;
    }
    let peer = peer()?;
    // SAFETY: the pointer is to this CPU's element: integers only. Programs do not interrupt each other.
    let scratch = unsafe { &mut *pledge_scratch()? };
    // SAFETY: the context is the one that the kernel gave.
    if u64::from(unsafe { (*ctx.skb.skb).ifindex }) != promise.ifindex {
        return None;
    }
    let source = ctx.load::<[u8; 6]>(6).ok()?;
    scratch.headers = ctx.load(L3).ok()?;
    if source != promise.from.mac() || !is_sound(&scratch.headers, tcp, vip()) {
        return None;
    }
    // SAFETY: the pointer is to an element of the array, words that the agent, or a program on another CPU, may be
    // writing: volatile, so that each is read once.
    let (held, room, told, taken_ns) = unsafe {
        (
            read_volatile(&raw const (*pledge).held),
            read_volatile(&raw const (*pledge).room),
            read_volatile(&raw const (*pledge).told),
            read_volatile(&raw const (*pledge).taken_ns),
        )
    };
    let now_held = grown(pledged, held, room, tcp)?;
    // SAFETY: the word is part of an element, which nobody writes but as a whole.
    let found = unsafe {
        let word = (&raw mut (*pledge).held).cast();
        compare_exchange(word, held.word(), now_held.word())
    };
    if found != held.word() {
        // The agent has just dropped it, or moved it forward: it tells.
        return None;
    }
    // SAFETY: as above; of two CPUs' words either will do.
    unsafe { write_volatile(&raw mut (*pledge).taken_ns, now_ns) };
    if !is_due(now_held, told, tcp, now_ns.saturating_sub(taken_ns)) {
        return None;
    }
    let record = confirmation(now_held, room, tcp);
    // SAFETY: as above.
    unsafe { write_volatile(&raw mut (*pledge).told, record.confirmation) };
    let sequence = next_sequence()?;
    // SAFETY: the pointer is to the array's only element, which the agent may be writing: under half of a key nothing counts.
    let key = unsafe { read_volatile(&raw const (*peer).prompting) };
    scratch.words = seal(&record, sequence, true, key);
    reply(ctx, peer, &mut scratch.envelope, &scratch.words)
}
