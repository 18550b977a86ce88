//! Prompt datagrams (`rfsis_common::prompt`): what the standby holds is taken here, and the client told of it,
//! before the active's agent would have been woken.
//!
//! All or nothing: a datagram that names a flow of which the agent has to hear is the agent's, whole.

use aya_ebpf::{
    helpers::generated::{bpf_skb_change_tail, bpf_skb_load_bytes},
    programs::TcContext,
};
use core::ptr::{read_volatile, write_volatile};
use rfsis_common::ack_gate::{Guarded, RELEASE_MARK, release};
use rfsis_common::frame::{Classified, FrameClass};
use rfsis_common::maps::FlowKey;
use rfsis_common::prompt::{
    ACK_LEN, ACK_LEN_BARE, HEAD_AT, HEADER_LEN, MAGIC, MAX_LEN, MAX_RECORDS, PromptPeer,
    PromptRecord, RECORD_LEN, Route, SEQUENCE, SipHash, TAG_LEN, VERSION, WRITTEN, Words,
    acknowledgement, is_unfinished, len_of,
};

use crate::ack_gate::load;
use crate::clock::now_ns;
use crate::maps::{
    confirmation, guarded, has_ack_gate, hop, ifindex, is_guarding, note_prompted, prompt_peer,
    prompt_seen, prompt_words, sent, vip,
};
use crate::skb::is_tagged;

/// Where the datagram begins, behind Ethernet, IPv4 without options, and UDP.
const PAYLOAD: usize = 14 + 20 + 8;

/// Notes with which addresses a segment leaves.
#[inline(always)]
pub fn note_hop(ctx: &TcContext, slot: u32) {
    let (Some(hop), Ok(addresses)) = (hop(slot), ctx.load::<[u32; 3]>(0)) else {
        return;
    };
    // SAFETY: the pointer is to an element of the array; segments of one flow leave with the same addresses,
    // and volatile writes keep each word whole.
    unsafe { write_volatile(&raw mut (*hop).addresses, addresses) }
}

/// Takes a frame if it is a datagram of which all can be taken; it goes no further.
#[inline(always)]
pub fn take(ctx: &TcContext, frame: &Classified) -> bool {
    if !has_ack_gate() || !matches!(frame.class, FrameClass::Other) || is_tagged(ctx) {
        return false;
    }
    let (Some(peer), Some(words)) = (prompt_peer(), prompt_words()) else {
        return false;
    };
    // SAFETY: the pointer is to the array's only element, which the agent may be writing: what is half of it
    // fits no datagram.
    let peer = unsafe { read_volatile(peer) };
    let records = match records_of(ctx, &peer) {
        Some(records) if is_guarding() => records,
        _ => return false,
    };
    // SAFETY: the pointer is to this CPU's element: integers only.
    let words = unsafe { &mut *words };
    read(ctx, words, records)
        && is_authentic(words, records, &peer)
        && take_new(ctx, words, records, &peer)
}

/// Takes it if it is not an old one.
#[inline(always)]
fn take_new(ctx: &TcContext, words: &Words, records: usize, peer: &PromptPeer) -> bool {
    let Some(seen) = prompt_seen(peer.seen) else {
        return false;
    };
    // SAFETY: the pointer is to an element of the array; see `PromptSeen` for who else writes it.
    let before = unsafe { read_volatile(seen) };
    let Some(mut now) = before.accept(u64::from_be(words[SEQUENCE])) else {
        return false;
    };
    if !note(words, records) {
        return false;
    }
    now.taken += 1;
    now.at_ns = now_ns();
    // SAFETY: as above.
    unsafe { write_volatile(seen, now) }
    tell(ctx, words, records);
    true
}

/// Number of records of a datagram that claims to be the peer's.
#[inline(always)]
fn records_of(ctx: &TcContext, peer: &PromptPeer) -> Option<usize> {
    let route = Route {
        from: peer.peer,
        to: peer.node,
        port: peer.port,
        magic: MAGIC,
        version: VERSION,
    };
    let (len, checksum) = route.udp_of(&ctx.load(HEAD_AT).ok()?)?;
    let records = len.wrapping_sub(8 + len_of(0)) / RECORD_LEN;
    // One with a checksum nobody would complete.
    (checksum == 0
        && (1..=MAX_RECORDS).contains(&records)
        && len == 8 + len_of(records)
        && ctx.len() as usize >= PAYLOAD - 8 + len)
        .then_some(records)
}

#[inline(always)]
fn read(ctx: &TcContext, words: &mut Words, records: usize) -> bool {
    // Bounded less one: see `capture::copy`.
    let last = core::hint::black_box(len_of(records) as u32 - 1);
    if last >= MAX_LEN as u32 {
        return false;
    }
    // SAFETY: `words` has `MAX_LEN` bytes, `last + 1` is no more, and not 0.
    unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            PAYLOAD as u32,
            words.as_mut_ptr().cast(),
            last + 1,
        ) == 0
    }
}

#[inline(always)]
fn is_authentic(words: &Words, records: usize, peer: &PromptPeer) -> bool {
    let signed = (HEADER_LEN + records * RECORD_LEN) / 8;
    let mut hash = SipHash::new(peer.key);
    let mut tag = [0; 2];
    for (index, word) in words.iter().enumerate() {
        if index == WRITTEN {
            hash.absorb(0);
        } else if index < signed {
            hash.absorb(*word);
        } else if index == signed {
            tag[0] = *word;
        } else if index == signed + 1 {
            tag[1] = *word;
        }
    }
    const _: () = assert!(TAG_LEN == 16);
    let [a, b] = hash.finish(signed * 8);
    (a ^ tag[0]) | (b ^ tag[1]) == 0
}

#[inline(always)]
fn record(words: &Words, index: usize) -> PromptRecord {
    let at = (HEADER_LEN + index * RECORD_LEN) / 8;
    PromptRecord::from_words([words[at], words[at + 1], words[at + 2]])
}

/// Notes all confirmations; `false` if the agent has to hear of one.
#[inline(always)]
fn note(words: &Words, records: usize) -> bool {
    for index in 0..MAX_RECORDS {
        if index >= records {
            break;
        }
        let record = record(words, index);
        let noted = match guarded(record.flow) {
            Some(guarded) => note_prompted(guarded.slot, &record),
            None => false,
        };
        if !noted {
            return false;
        }
    }
    true
}

/// Tells the clients what they may know now. The datagram's buffer becomes their frames.
#[inline(always)]
fn tell(ctx: &TcContext, words: &Words, records: usize) {
    for index in 0..MAX_RECORDS {
        if index >= records {
            break;
        }
        let flow = record(words, index).flow;
        if let Some(guarded) = guarded(flow) {
            tell_one(ctx, flow, guarded, is_unfinished(words));
        }
    }
}

#[inline(always)]
fn tell_one(ctx: &TcContext, flow: FlowKey, guarded: Guarded, unfinished: bool) -> Option<()> {
    let slot = sent(guarded.slot)?;
    let sent = load(slot);
    if sent.version & 1 != 0 {
        // The gate is noting a segment, and looks at the confirmation behind it.
        return None;
    }
    let confirmed = confirmation(guarded.slot)?;
    if confirmed.is_open() {
        // The agent has just opened the gate for it, and tells the rest.
        return None;
    }
    let due = release(&sent, confirmed, guarded.shift)?;
    // SAFETY: the pointer is to an element of the array: integers only.
    let hop = unsafe { read_volatile(hop(guarded.slot)?) };
    if hop.is_unknown() {
        // Nothing has left yet: what leaves says it.
        return None;
    }
    let ack = acknowledgement(vip(), flow, &due, unfinished).map(u32::to_be);
    let len = match due.timestamp {
        Some(_) => ACK_LEN,
        None => ACK_LEN_BARE,
    };
    // SAFETY: the context is the one that the kernel gave.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb.cast(), len as u32, 0) } != 0 {
        return None;
    }
    ctx.store(0, &hop.addresses, 0).ok()?;
    let [a, b, c, d, e, f, g, h, i, j, options @ ..] = ack;
    ctx.store(14, &[a, b, c, d, e, f, g, h, i, j], 0).ok()?;
    if due.timestamp.is_some() {
        ctx.store(ACK_LEN_BARE, &options, 0).ok()?;
    }
    if load(slot).version != sent.version {
        // A segment has left meanwhile, and said it: this would come behind it with an older number.
        return None;
    }
    // SAFETY: the context is the one that the kernel gave; programs may write the mark.
    unsafe { (*ctx.skb.skb).mark = RELEASE_MARK };
    ctx.clone_redirect(ifindex(), 0).ok()
}
